// The state that all figures share, the tools above them, and newer data of a run that goes on.

const HALF_WIDTHS = [0, 1, 2, 3, 5, 8, 12, 20, 35, 60, 100];
const COLOURS = 12;
const DASHES = [null, "5 3", "1.5 2.5", "7 2 1.5 2"]; // where colours run out
const ASK_EVERY_MS = 2000;
const KEYS =
  "Left and right: step; with Shift: ten steps; Home, End. Plus and minus: zoom. " +
  "Up and down: row of a heatmap. Escape: back.";

class Page {
  constructor(data) {
    this.step = null; // that values are shown of; null: the last
    this.range = null; // steps in view; null: all
    this.off = new Set(); // keys of curves that are switched off
    this.frames = new Map();
    this.take(data);
    this.level = this.calmLevel();
    this.levelChosen = false; // by the reader
    this.tools();
    this.samples = new Samples(data, document.getElementById("samples"));
    this.draw();
    this.follow();
  }

  take(data) {
    this.data = data;
    this.arms = data.arms;
    const steps = data.groups.flatMap(({ charts }) => charts.flatMap(stepsOf));
    this.first = steps.reduce((a, b) => Math.min(a, b), Infinity);
    this.last = steps.reduce((a, b) => Math.max(a, b), -Infinity);
    data.groups.forEach((group, n) => this.place(group, n));
  }

  /** Figures of a group, in their place of the document. */
  place(group, n) {
    const section = document.querySelector(`[data-group="${n}"]`);
    for (const chart of group.charts) {
      const frame = this.frames.get(chart.id);
      if (frame?.data.kind === chart.kind) frame.take(chart);
      else {
        const made = chart.kind === "heatmap" ? new Heatmap(chart, this) : new LineChart(chart, this);
        this.frames.set(chart.id, made);
      }
    }
    const figures = group.charts.map((chart) => this.frames.get(chart.id).node);
    const old = section.querySelectorAll("figure");
    if (figures.length === old.length && figures.every((node, i) => node === old[i])) return;
    const heading = group.title ? [element("h2", {}, [group.title])] : [];
    section.replaceChildren(...heading, element("div", { class: "charts" }, figures));
    section.hidden = !figures.length;
  }

  /** Smoothing that calms long curves: over about 4% of their length. */
  calmLevel() {
    const charts = this.data.groups.flatMap(({ charts: all }) => all).filter((c) => c.smoothed);
    const longest = charts
      .flatMap((chart) => chart.series.map((one) => one.steps.length))
      .reduce((a, b) => Math.max(a, b), 0);
    if (longest < 60) return 0;
    return HALF_WIDTHS.findLastIndex((half) => half <= Math.max(2, longest / 50));
  }

  halfWidth() {
    return HALF_WIDTHS[this.level];
  }

  /** First and last step in view, with a margin. */
  view() {
    const [first, last] = this.range ?? [this.first, this.last];
    const margin = this.range ? 0.5 : Math.max(0.5, (last - first) * 0.01);
    return [first - margin, last + margin];
  }

  /** Of a curve: an arm has one colour everywhere, by the order of the arms' names. */
  colour(name, place) {
    const number = this.arms.includes(name) ? this.arms.indexOf(name) : place;
    return { colour: number % COLOURS, dashes: DASHES[Math.floor(number / COLOURS) % DASHES.length] };
  }

  /** What a curve is switched by: an arm everywhere, another in its chart. */
  key(chart, name) {
    return this.arms.includes(name) ? `arm ${name}` : `curve ${chart} ${name}`;
  }

  switch(key) {
    if (!this.off.delete(key)) this.off.add(key);
    this.draw();
  }

  emphasise(key) {
    for (const frame of this.frames.values()) frame.emphasise(key);
  }

  point(step) {
    if (step === this.step) return;
    this.step = step;
    for (const frame of this.frames.values()) frame.show();
  }

  /** Show the steps from first to last; null: all of them. */
  zoom(first, last) {
    if (first !== null) {
      const spread = last - first < 2 ? 1 : 0; // at least three steps
      const least = Math.max(this.first, Math.round(first) - spread);
      this.range = [least, Math.min(this.last, Math.round(last) + spread)];
    }
    const all = first === null || (this.range[0] <= this.first && this.range[1] >= this.last);
    if (all) this.range = null;
    this.draw();
  }

  tools() {
    const bar = document.getElementById("tools");
    bar.hidden = !this.frames.size;
    const input = { type: "range", min: 0, max: HALF_WIDTHS.length - 1, value: this.level };
    this.slider = element("input", { ...input, id: "smoothing" });
    this.slider.addEventListener("input", () => {
      this.levelChosen = true;
      this.level = Number(this.slider.value);
      this.draw();
    });
    this.smoothing = element("output", { for: "smoothing" });
    const label = element("label", { for: "smoothing" }, ["Smoothing"]);
    const button = (words, act) => {
      const made = element("button", { type: "button" }, [words]);
      made.addEventListener("click", act);
      return made;
    };
    this.range_text = element("span", { class: "range" });
    this.reset = button("Reset zoom", () => this.zoom(null));
    this.showAll = button("Show all curves", () => {
      this.off.clear();
      this.draw();
    });
    this.live = element("span", { class: "live", role: "status" });
    const smoothing = element("span", { class: "smoothing" }, [label, this.slider, this.smoothing]);
    const keys = element("span", { id: "keys", class: "keys" }, [KEYS]);
    bar.replaceChildren(smoothing, this.range_text, this.reset, this.showAll, this.live, keys);
  }

  draw() {
    const half = this.halfWidth();
    this.smoothing.textContent = half ? `mean of ${2 * half + 1} steps` : "none";
    const [first, last] = this.range ?? [this.first, this.last];
    this.range_text.textContent = `Steps ${first} to ${last}${this.range ? "" : ", drag to zoom"}`;
    this.reset.hidden = this.range === null;
    this.showAll.hidden = this.off.size === 0;
    for (const frame of this.frames.values()) frame.measure();
    for (const frame of this.frames.values()) frame.draw();
  }

  /** Draw again when widths or colours change. */
  follow() {
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return;
      width = window.innerWidth;
      this.draw();
    });
    for (const query of ["(prefers-color-scheme: dark)", "print"]) {
      window.matchMedia(query).addEventListener("change", () => this.draw());
    }
    if (this.data.version) window.setTimeout(() => this.ask(), ASK_EVERY_MS);
  }

  /** Ask the server for newer data, again and again. */
  async ask() {
    try {
      const answer = await fetch(`data.json?have=${this.data.version}`, { cache: "no-store" });
      if (answer.status === 200) this.renew(await answer.json());
      const good = `live, ${new Date().toLocaleTimeString()}`;
      this.live.textContent = answer.ok ? good : await answer.text();
    } catch {
      this.live.textContent = "the server does not answer";
    }
    window.setTimeout(() => this.ask(), ASK_EVERY_MS);
  }

  renew(data) {
    this.take(data);
    document.getElementById("summary").textContent = data.summary;
    const facts = document.getElementById("facts");
    if (facts) facts.innerHTML = data.facts; // made and escaped by the server
    document.getElementById("tools").hidden = !this.frames.size;
    if (!this.levelChosen) this.slider.value = this.level = this.calmLevel();
    this.samples.take(data);
    this.draw();
  }
}

function stepsOf(chart) {
  const ends = (steps) => (steps.length ? [steps[0], steps[steps.length - 1]] : []);
  if (chart.kind !== "heatmap") return chart.series.flatMap((one) => ends(one.steps));
  return [...ends(chart.steps), ...ends(chart.overall?.steps ?? [])];
}

const report = new Page(JSON.parse(document.getElementById("data").textContent));
