// Charts of curves over steps, and of areas on top of each other.

const LINES_HEIGHT = 220;
const FEW_POINTS = 25; // up to here each has a dot
const MANY = 6;
const WIDE = 5; // largest / smallest value from which a logarithmic axis pays

class LineChart extends Frame {
  constructor(data, page) {
    super(data, page);
    this.log = null; // until the reader chooses: where it pays
    this.take(data);
  }

  take(data) {
    super.take(data);
    this.colours = data.series.map((one, i) => this.page.colour(one.name, i));
    this.allSteps = [...new Set(data.series.flatMap((one) => one.steps))].sort((a, b) => a - b);
    this.values = data.series.map((one) => element("b", {}, []));
    this.entries = data.series.map((one, i) => this.entry(one, i));
    this.legend.replaceChildren(...this.entries);
    this.legend.classList.toggle("many", this.many);
  }

  /** A button that names a curve, shows its value, and switches it on and off. */
  entry(one, i) {
    const key = this.page.key(this.data.id, one.name);
    const line = drawn("svg", { viewBox: "0 0 18 8", class: "key", "aria-hidden": true }, [
      drawn("path", { d: "M0 4H18", ...this.stroke(i) }),
    ]);
    const name = element("span", { class: "name", title: one.name }, [one.name]);
    const children = [line, name, this.values[i]];
    const pressed = !this.page.off.has(key);
    const button = element("button", { type: "button", "aria-pressed": pressed }, children);
    button.addEventListener("click", () => this.page.switch(key));
    for (const event of ["pointerenter", "focus"]) {
      button.addEventListener(event, () => this.page.emphasise(key));
    }
    for (const event of ["pointerleave", "blur"]) {
      button.addEventListener(event, () => this.page.emphasise(null));
    }
    return button;
  }

  /** Too many curves to draw the values behind the smoothed ones. */
  get many() {
    return this.data.series.length > MANY;
  }

  halfWidth() {
    return this.data.smoothed ? this.page.halfWidth() : 0;
  }

  stroke(i) {
    const { colour, dashes } = this.colours[i];
    return { style: `stroke: var(--c${colour})`, "stroke-dasharray": dashes };
  }

  /** Make all curves but one faint; a key of no curve of the chart changes nothing. */
  emphasise(key) {
    const chosen = this.data.series.findIndex((one) => this.page.key(this.data.id, one.name) === key);
    for (const node of this.inside.querySelectorAll("[data-curve]")) {
      const mine = Number(node.dataset.curve) === chosen;
      node.classList.toggle("faded", chosen >= 0 && !mine);
      node.classList.toggle("chosen", mine);
    }
  }

  steps() {
    return this.allSteps;
  }

  /** Numbers of the curves that are on. */
  on() {
    const all = this.data.series.map((_, i) => i);
    return all.filter((i) => !this.page.off.has(this.page.key(this.data.id, this.data.series[i].name)));
  }

  draw() {
    this.entries.forEach((entry, i) => {
      const key = this.page.key(this.data.id, this.data.series[i].name);
      entry.setAttribute("aria-pressed", !this.page.off.has(key));
    });
    const svg = this.picture(LINES_HEIGHT);
    if (this.data.kind === "stack") this.drawStack(svg);
    else this.drawLines(svg);
    this.dots = this.on().map((i) =>
      drawn("circle", { r: 3.5, class: "dot", style: `fill: var(--c${this.colours[i].colour})` }),
    );
    if (this.data.kind !== "stack") this.inside.append(...this.dots);
    this.finish(svg);
  }

  drawLines(svg) {
    const parts = this.on().map((i) => this.visible(i));
    const numbers = parts.flatMap((part) => part.extent);
    const low = numbers.length ? numbers.reduce((a, b) => Math.min(a, b)) : 0;
    const high = numbers.length ? numbers.reduce((a, b) => Math.max(a, b)) : 1;
    this.axis(svg, low, high);
    for (const part of parts.filter(({ band }) => band)) this.band(part);
    for (const part of parts) this.curve(part);
  }

  /** What of a curve is in view, with a point on either side, and its range of values. */
  visible(i) {
    const one = this.data.series[i];
    const [first, last] = this.page.view();
    const from = Math.max(0, lastAt(one.steps, first));
    const end = Math.min(one.steps.length, lastAt(one.steps, last) + 2);
    const half = this.halfWidth();
    const calm = (values) => smooth(one.steps, values, half);
    const cut = (values) => values && values.slice(from, end);
    const steps = cut(one.steps);
    const part = { i, half, steps, raw: cut(one.values), line: cut(calm(one.values)) };
    part.band = one.low ? [cut(calm(one.low)), cut(calm(one.high))] : null;
    const seen = (step) => step >= first && step <= last;
    part.faint = half > 0 && !part.band && !this.many;
    const lists = [part.line, part.faint ? part.raw : [], ...(part.band ?? [])];
    part.extent = lists.flatMap((list) => list.filter((_, n) => seen(steps[n])));
    return part;
  }

  /** Scale and grid for values from low to high. */
  axis(svg, low, high) {
    const pays = low > 0 && high > WIDE * low;
    const log = low > 0 && (this.log ?? (this.data.log && pays));
    if (this.data.log && low > 0) {
      const act = () => {
        this.log = !log;
        this.draw();
      };
      this.buttons.replaceChildren(this.toggle("log", "Logarithmic axis", log, act));
    }
    const top = MARGIN.top;
    const tall = LINES_HEIGHT - MARGIN.bottom - top;
    const map = log ? Math.log : (value) => value;
    let [least, most] = [map(low), map(high)];
    const room = most > least ? (most - least) * 0.06 : Math.max(Math.abs(most) * 0.1, 1e-6);
    const zero = !log && low >= 0 && low < 0.25 * high && this.data.kind !== "stack";
    [least, most] = [zero || this.data.kind === "stack" ? 0 : least - room, most + room];
    this.y = (value) => top + tall * (1 - (map(value) - least) / (most - least));
    const plain = ticks(least, most, 5);
    const values = log ? logTicks(Math.exp(least), Math.exp(most)) : plain.values;
    for (const value of values) {
      const y = this.y(value);
      const label = log ? shown(value, this.data.percent) : this.label(value, plain.distance);
      svg.prepend(drawn("path", { class: "grid", d: `M${MARGIN.left} ${y.toFixed(1)}h${this.inner}` }));
      svg.append(this.text(MARGIN.left - 8, y + 4, label));
    }
  }

  label(value, distance) {
    return tickLabel(value, distance, this.data.percent);
  }

  points(part, values) {
    return part.steps.map((step, n) => [this.x(step), this.y(values[n])]);
  }

  band(part) {
    const [low, high] = part.band.map((values) => this.points(part, values));
    const d = `${path(high)}${path(low.reverse()).replace("M", "L")}Z`;
    const style = `fill: var(--c${this.colours[part.i].colour})`;
    const name = this.many ? "band thin" : "band";
    this.inside.append(drawn("path", { "data-curve": part.i, class: name, style, d }));
  }

  curve(part) {
    const own = { "data-curve": part.i, class: "curve", ...this.stroke(part.i) };
    const colour = `var(--c${this.colours[part.i].colour})`;
    if (part.faint) {
      const raw = { ...own, class: "raw", "stroke-dasharray": null };
      this.inside.append(drawn("path", { ...raw, d: path(thinned(this.points(part, part.raw))) }));
    }
    const line = this.points(part, part.line);
    this.inside.append(drawn("path", { ...own, d: path(thinned(line)) }));
    if (line.length > FEW_POINTS) return;
    for (const [cx, cy] of line) {
      const dot = { cx, cy, r: 2.6, "data-curve": part.i, style: `fill: ${colour}` };
      this.inside.append(drawn("circle", dot));
    }
  }

  drawStack(svg) {
    const steps = this.allSteps;
    let below = steps.map(() => 0);
    const layers = this.on().map((i) => {
      const one = this.data.series[i];
      const known = new Map(one.steps.map((step, n) => [step, one.values[n]]));
      const above = below.map((value, n) => value + (known.get(steps[n]) ?? 0));
      const layer = { i, below, above };
      below = above;
      return layer;
    });
    const [first, last] = this.page.view();
    const high = below.filter((_, n) => steps[n] >= first && steps[n] <= last);
    this.axis(svg, 0, high.reduce((a, b) => Math.max(a, b), 1e-9));
    for (const { i, below: lower, above } of layers) {
      const edge = (values) =>
        steps.flatMap((step, n) => [-0.5, 0.5].map((by) => [this.x(step + by), this.y(values[n])]));
      const d = `${path(edge(above))}${path(edge(lower).reverse()).replace("M", "L")}Z`;
      const style = `fill: var(--c${this.colours[i].colour})`;
      this.inside.append(drawn("path", { "data-curve": i, class: "area", style, d }));
    }
  }

  /** Values at a step, or the last before it, in the legend, and a dot on each curve. */
  showValues(step) {
    this.data.series.forEach((one, i) => {
      const at = lastAt(one.steps, step);
      const read = this.many ? brief : shown;
      this.values[i].textContent = at < 0 ? "–" : read(one.values[at], this.data.percent);
    });
    this.on().forEach((i, n) => {
      const one = this.data.series[i];
      const at = lastAt(one.steps, step);
      const dot = this.dots[n];
      dot.setAttribute("visibility", this.page.step === null || at < 0 ? "hidden" : "visible");
      if (this.page.step === null || at < 0) return;
      const value = smooth(one.steps, one.values, this.halfWidth())[at];
      dot.setAttribute("cx", this.x(one.steps[at]));
      dot.setAttribute("cy", this.y(value));
    });
  }
}
