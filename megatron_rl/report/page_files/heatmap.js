// Rows x steps as colours, below the curve of all rows.

const SPARK = 46; // height of the curve of all rows, and the gap below it
const LABEL_GAP = 18; // pixels between the numbers of rows, at least
const ROWS_HEIGHT = 190; // of few rows; many have 4 pixels each

class Heatmap extends Frame {
  constructor(data, page) {
    super(data, page);
    this.row = null; // that the pointer or the keys are at
    this.take(data);
  }

  take(data) {
    super.take(data);
    this.made = null;
    const flat = data.values.flat().filter((value) => value !== null);
    this.low = flat.reduce((a, b) => Math.min(a, b), Infinity);
    this.high = flat.reduce((a, b) => Math.max(a, b), -Infinity);
    const log = data.log && this.low > 0 && this.high > WIDE * this.low;
    this.map = log ? Math.log : (value) => value;
    this.readings = ["overall", "largest", "row"].map(() => element("span", { class: "reading" }));
    const label = (value) => element("span", {}, [brief(value, data.percent)]);
    const bar = element("span", { class: "bar" }, [
      label(this.low),
      element("i", { class: data.notable === "low" ? "reversed" : null }),
      label(this.high),
      ...(log ? [element("span", { class: "note" }, ["log"])] : []),
    ]);
    const [all, most, row] = this.readings;
    this.legend.replaceChildren(all, row, most, bar);
  }

  steps() {
    return this.data.steps;
  }

  draw() {
    const count = this.data.rows.length;
    this.cell = Math.max(4, Math.min(18, Math.floor(ROWS_HEIGHT / count)));
    this.top = MARGIN.top + (this.data.overall ? SPARK : 0);
    const svg = this.picture(this.top + this.cell * count + MARGIN.bottom);
    if (this.data.overall) this.spark(svg);
    this.labels(svg);
    this.inside.append(
      drawn("image", {
        href: this.pixels(),
        x: 0,
        y: this.top,
        width: this.inner,
        height: this.cell * count,
        preserveAspectRatio: "none",
      }),
    );
    this.frameOfRow = drawn("rect", { class: "row", x: -2, width: this.inner + 4, height: this.cell });
    this.inside.append(this.frameOfRow);
    this.finish(svg);
  }

  /** Numbers of rows on the left, as many as can be read. */
  labels(svg) {
    const { rows } = this.data;
    const every = Math.ceil(LABEL_GAP / this.cell);
    const distance = [1, 2, 4, 5, 8, 10, 20, 25, 50, 100].find((n) => n >= every) ?? every;
    rows.forEach((row, i) => {
      if (row % distance) return;
      const y = this.top + (i + 0.5) * this.cell + 4;
      svg.append(this.text(MARGIN.left - 8, y, String(row)));
    });
  }

  /** The curve of all rows, with its least and largest value in view. */
  spark(svg) {
    const { steps, values } = this.data.overall;
    const [first, last] = this.page.view();
    const seen = values.filter((_, i) => steps[i] >= first && steps[i] <= last);
    if (!seen.length) return;
    const low = seen.reduce((a, b) => Math.min(a, b));
    const high = seen.reduce((a, b) => Math.max(a, b));
    const [top, tall] = [MARGIN.top + 4, SPARK - 18];
    const y = (value) => top + (high > low ? tall * (1 - (value - low) / (high - low)) : tall / 2);
    const points = steps.map((step, i) => [this.x(step), y(values[i])]);
    this.inside.append(drawn("path", { class: "spark", d: path(thinned(points)) }));
    svg.append(this.text(MARGIN.left - 8, top + 4, brief(high, this.data.percent)));
    if (high > low) svg.append(this.text(MARGIN.left - 8, top + tall + 4, brief(low, this.data.percent)));
  }

  /** The picture of the steps in view, made anew where it would differ. */
  pixels() {
    const wide = Math.max(1, Math.round(this.inner));
    const made = [wide, this.page.view(), rampOf("--ramp")].join();
    if (made !== this.made) [this.made, this.cells] = [made, this.colours(wide)];
    return this.cells;
  }

  /** A picture of a pixel a row, and a column for each pixel of the width. */
  colours(wide) {
    const { values, steps, width, largest: extreme } = this.data;
    const canvas = element("canvas", { width: wide, height: values.length });
    const context = canvas.getContext("2d");
    const image = context.createImageData(wide, values.length);
    const ramp = rampOf("--ramp");
    if (this.data.notable === "low") ramp.reverse();
    const [low, high] = [this.map(this.low), this.map(this.high)];
    for (let column = 0; column < wide; column++) {
      const from = this.stepAt(column) + 0.5;
      let first = lastAt(steps, from);
      let end = lastAt(steps, this.stepAt(column + 1) + 0.5) + 1;
      if (end - first > 1) first += 1; // columns that begin in this pixel
      if (first < 0 || from >= steps[end - 1] + width) continue;
      for (let row = 0; row < values.length; row++) {
        const found = values[row].slice(first, end).filter((value) => value !== null);
        if (!found.length) continue;
        const value = extreme
          ? found.reduce((a, b) => Math.max(a, b))
          : found.reduce((a, b) => a + b) / found.length;
        const part = high > low ? (this.map(value) - low) / (high - low) : 0;
        image.data.set([...between(ramp, part), 255], 4 * (row * wide + column));
      }
    }
    context.putImageData(image, 0, 0);
    return canvas.toDataURL();
  }

  point(event, x) {
    const box = this.plot.getBoundingClientRect();
    const y = ((event.clientY - box.top) * this.height) / box.height - this.top;
    const row = Math.floor(y / this.cell);
    this.row = row >= 0 && row < this.data.rows.length ? row : null;
    super.point(event, x);
    this.show();
  }

  ownKeys() {
    const move = (by) => {
      const count = this.data.rows.length;
      this.row = this.row === null ? 0 : Math.max(0, Math.min(count - 1, this.row + by));
      this.show();
    };
    return { ArrowUp: () => move(-1), ArrowDown: () => move(1) };
  }

  showValues(step) {
    const { percent, row_name: name, rows, steps, values, overall } = this.data;
    const at = lastAt(steps, step);
    const column = values.map((row) => (at < 0 ? null : row[at]));
    const known = column.map((value, i) => [value, rows[i]]).filter(([value]) => value !== null);
    const sign = this.data.notable === "low" ? -1 : 1;
    const further = (a, b) => (a[0] === null || sign * (b[0] - a[0]) > 0 ? b : a);
    const [best, where] = known.reduce(further, [null, null]);
    const most = sign > 0 ? "largest" : "smallest";
    const all = overall ? lastAt(overall.steps, step) : -1;
    const texts = [
      [overall?.name, all < 0 ? null : overall.values[all]],
      [where === null ? null : `${most}: ${name} ${where}`, best],
      [this.row === null ? null : `${name} ${rows[this.row]}`, column[this.row]],
    ];
    texts.forEach(([label, value], i) => {
      const parts = label ? [`${label} `, element("b", {}, [shown(value, percent)])] : [];
      this.readings[i].replaceChildren(...parts);
    });
    const row = this.frameOfRow;
    row.setAttribute("visibility", this.row === null ? "hidden" : "visible");
    row.setAttribute("y", this.top + (this.row ?? 0) * this.cell);
  }
}
