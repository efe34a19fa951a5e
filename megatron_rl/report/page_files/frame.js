// What every figure has: title, values at a step, plot with its axis of steps, pointer and keys.

const MARGIN = { left: 58, right: 12, top: 8, bottom: 22 };

class Frame {
  /** data: of the chart; page: the state that all figures share (`page.js`). */
  constructor(data, page) {
    this.page = page;
    this.at = element("span", { class: "at" });
    this.heading = element("h3", { id: `title-${data.id}` });
    this.buttons = element("span", { class: "buttons" });
    this.legend = element("div", { class: "legend" });
    this.plot = element("div", {
      class: "plot",
      tabindex: 0,
      role: "application",
      "aria-labelledby": `title-${data.id}`,
      "aria-describedby": "keys",
    });
    this.caption = element("figcaption");
    const head = element("div", { class: "head" }, [this.heading, this.buttons, this.at]);
    this.node = element("figure", { id: data.id, class: data.kind }, [
      head,
      this.legend,
      this.plot,
      this.caption,
    ]);
    this.listen();
  }

  /** Take newer data, with what the figure says of them. */
  take(data) {
    this.data = data;
    this.heading.textContent = data.title;
    this.caption.textContent = data.caption;
  }

  get inner() {
    return this.width - MARGIN.left - MARGIN.right;
  }

  /** Place of a step, in pixels from the left of the inner part. */
  x(step) {
    const [first, last] = this.page.view();
    return ((step - first) / (last - first)) * this.inner;
  }

  /** Step (not whole) at a place. */
  stepAt(x) {
    const [first, last] = this.page.view();
    return first + (x / this.inner) * (last - first);
  }

  /** Take the width that there is; of all figures before any is drawn: one layout, not many. */
  measure() {
    this.width = Math.max(240, this.plot.clientWidth || 480);
  }

  /** An empty picture of a height, with the axis of steps and marks; the inner part is clipped. */
  picture(height) {
    this.height = height;
    const bottom = height - MARGIN.bottom;
    this.inside = drawn("svg", {
      x: MARGIN.left,
      y: 0,
      width: this.inner,
      height: bottom + 1,
      class: "inside",
    });
    const svg = drawn("svg", { viewBox: `0 0 ${this.width} ${height}`, "aria-hidden": true });
    svg.append(drawn("path", { class: "axis", d: `M${MARGIN.left} ${bottom + 0.5}h${this.inner}` }));
    const [first, last] = this.page.view();
    for (const step of ticks(first, last, this.inner / 90, true).values) {
      svg.append(this.text(MARGIN.left + this.x(step), height - 6, String(step), "middle"));
    }
    svg.append(this.inside);
    for (const mark of this.data.marks) {
      this.inside.append(drawn("path", { class: "mark", d: `M${this.x(mark)} 0V${bottom}` }));
    }
    this.cursor = drawn("path", { class: "cursor", d: `M0 0V${bottom}`, visibility: "hidden" });
    this.selection = drawn("rect", { class: "selection", y: 0, height: bottom, width: 0 });
    return svg;
  }

  text(x, y, words, anchor = "end") {
    return drawn("text", { x: x.toFixed(1), y: y.toFixed(1), "text-anchor": anchor }, [words]);
  }

  /** Put the picture into the figure, with cursor and selection on top. */
  finish(svg) {
    this.inside.append(this.cursor, this.selection);
    this.plot.replaceChildren(svg);
    this.show();
  }

  /** The step that values are shown of: under the pointer, else the last in view. */
  shownStep() {
    return this.page.step ?? this.page.view()[1];
  }

  /** Show the cursor and the values of a step. */
  show() {
    const step = this.page.step;
    const steps = this.steps();
    const known = steps[Math.max(0, lastAt(steps, this.shownStep()))];
    const words = `${step === null ? "last, " : ""}step ${step ?? known}`;
    this.at.textContent = steps.length ? words : "no values";
    this.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) this.cursor.setAttribute("transform", `translate(${this.x(step)} 0)`);
    this.showValues(this.shownStep());
  }

  listen() {
    let start = null; // where a drag began
    const place = (event) => {
      const box = this.plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) * this.width) / box.width - MARGIN.left;
      return Math.max(0, Math.min(this.inner, x));
    };
    const drop = () => {
      start = null;
      this.selection.setAttribute("width", 0);
    };
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      start = place(event);
      this.point(event, start);
      if (event.pointerType === "mouse") this.plot.setPointerCapture(event.pointerId);
    });
    this.plot.addEventListener("pointermove", (event) => {
      const x = place(event);
      this.point(event, x);
      if (start === null || Math.abs(x - start) < 5) return;
      this.selection.setAttribute("x", Math.min(x, start));
      this.selection.setAttribute("width", Math.abs(x - start));
    });
    this.plot.addEventListener("pointerup", (event) => {
      const x = place(event);
      if (start !== null && Math.abs(x - start) >= 5) {
        this.page.zoom(this.stepAt(Math.min(x, start)), this.stepAt(Math.max(x, start)));
      }
      drop();
    });
    this.plot.addEventListener("pointercancel", drop);
    this.plot.addEventListener("pointerleave", () => {
      if (start === null) this.page.point(null);
    });
    this.plot.addEventListener("blur", () => this.page.point(null));
    this.plot.addEventListener("dblclick", () => this.page.zoom(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  /** The pointer is at a place: heatmaps look at its row as well. */
  point(event, x) {
    const steps = this.steps();
    if (steps.length) this.page.point(nearest(steps, this.stepAt(x)));
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const steps = this.steps();
    const [first, last] = this.page.view();
    const now = lastAt(steps, this.shownStep());
    const by = event.shiftKey ? 10 : 1;
    const clamp = (i) => steps[Math.max(0, Math.min(steps.length - 1, i))];
    const half = (last - first) / 2;
    const middle = this.page.step ?? (first + last) / 2;
    const actions = {
      ArrowLeft: () => this.page.point(clamp(now - by)),
      ArrowRight: () => this.page.point(clamp(this.page.step === null ? now : now + by)),
      Home: () => this.page.point(steps[0]),
      End: () => this.page.point(steps[steps.length - 1]),
      Escape: () => (this.page.step === null ? this.page.zoom(null) : this.page.point(null)),
      "=": () => actions["+"](), // the same key without Shift
      "+": () => this.page.zoom(middle - half / 2, middle + half / 2),
      "-": () => this.page.zoom(middle - 2 * half, middle + 2 * half),
      ...this.ownKeys(),
    };
    if (!actions[event.key] || !steps.length) return;
    event.preventDefault();
    actions[event.key]();
  }

  ownKeys() {
    return {};
  }

  emphasise() {}

  /** A small button beside the title that is pressed or not. */
  toggle(words, title, pressed, act) {
    const button = element("button", { type: "button", "aria-pressed": pressed, title }, [words]);
    button.addEventListener("click", act);
    return button;
  }
}
