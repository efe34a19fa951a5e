// The browser of samples: chosen by step, reward and arm, tokens coloured by what is known of them.

const AT_ONCE = 8; // samples shown before "Show more"
const LONG = 1200; // characters of a prompt that are shown before it is opened
const HINT = "Point at a token for its values.";
const COLOURINGS = {
  gamma: { words: "Gamma", ramp: "--gamma", about: "gamma; 1 where no router has moved" },
  ratio: { words: "Ratio", ramp: "--diverging", about: "new / old probability, log scale" },
  advantage: { words: "Advantage", ramp: "--diverging", about: "of the token" },
};

class Samples {
  constructor(data, place) {
    this.place = place;
    this.chosen = { step: "", arm: "", from: "", to: "" };
    this.shownCount = AT_ONCE;
    this.colouring = null; // until the reader chooses: the first there is
    if (place) this.take(data);
  }

  take(data) {
    if (!this.place) return;
    this.note = data.sample_note ?? "";
    if (JSON.stringify(data.samples) === this.known) return;
    this.known = JSON.stringify(data.samples);
    this.all = data.samples;
    this.place.hidden = !this.all.length;
    if (!this.all.length) return;
    this.scales = Object.fromEntries(
      Object.keys(COLOURINGS).map((name) => [name, scaleOf(name, this.all)]),
    );
    this.list = element("div", { class: "list" });
    this.count = element("span", { class: "count", role: "status" });
    this.key = element("span", { class: "bar" });
    const filters = element("div", { class: "filters" }, this.filters());
    this.place.replaceChildren(element("h2", {}, ["Samples"]), filters, this.list);
    this.draw();
  }

  filters() {
    const values = (name) => [...new Set(this.all.map((sample) => sample[name] ?? ""))];
    const parts = [this.select("Step", "step", values("step").sort((a, b) => a - b))];
    if (values("arm").length > 1) parts.push(this.select("Arm", "arm", values("arm").sort()));
    const ends = [this.number("Reward from", "from"), this.number("to", "to")];
    parts.push(element("span", { class: "between" }, ends));
    const known = Object.keys(COLOURINGS).filter((name) => this.scales[name]);
    if (known.length) parts.push(this.colourings(known), this.key);
    return [...parts, this.count];
  }

  /** A labelled field that chooses samples. */
  field(words, name, input) {
    input.value = this.chosen[name];
    input.addEventListener("input", () => {
      this.chosen[name] = input.value;
      this.shownCount = AT_ONCE;
      this.draw();
    });
    return element("label", { class: `of-${name}` }, [words, input]);
  }

  select(words, name, values) {
    const options = ["", ...values].map((value) =>
      element("option", { value }, [value === "" ? "all" : String(value)]),
    );
    return this.field(words, name, element("select", {}, options));
  }

  number(words, name) {
    return this.field(words, name, element("input", { type: "number", step: "any" }));
  }

  colourings(known) {
    this.colouring ??= known[0];
    const buttons = [...known, "none"].map((name) => {
      const words = COLOURINGS[name]?.words ?? "None";
      const button = element("button", { type: "button", "data-colouring": name }, [words]);
      button.addEventListener("click", () => {
        this.colouring = name;
        this.draw();
      });
      return button;
    });
    const group = { class: "choice", role: "group", "aria-label": "Colour of tokens" };
    this.choices = buttons;
    return element("span", group, buttons);
  }

  matching() {
    const { step, arm, from, to } = this.chosen;
    return this.all.filter(
      (sample) =>
        (step === "" || String(sample.step) === step) &&
        (arm === "" || sample.arm === arm) &&
        (from === "" || sample.reward >= Number(from)) &&
        (to === "" || sample.reward <= Number(to)),
    );
  }

  draw() {
    for (const button of this.choices ?? []) {
      button.setAttribute("aria-pressed", button.dataset.colouring === this.colouring);
    }
    this.drawKey();
    const found = this.matching();
    const some = found.slice(0, this.shownCount);
    this.count.textContent = `${some.length} of ${found.length} shown. ${this.note}`.trim();
    const more = element("button", { type: "button", class: "more" }, ["Show more"]);
    more.addEventListener("click", () => {
      this.shownCount += AT_ONCE;
      this.draw();
    });
    const cards = some.map((sample) => this.card(sample));
    this.list.replaceChildren(...cards, ...(some.length < found.length ? [more] : []));
  }

  drawKey() {
    const scale = this.scales[this.colouring];
    this.key.hidden = !scale;
    if (!scale) return;
    const { ramp, about } = COLOURINGS[this.colouring];
    const strip = element("i", { style: `background: linear-gradient(to right, var(${ramp}))` });
    const [low, high] = scale.ends.map((value) => element("span", {}, [shown(value)]));
    this.key.replaceChildren(low, strip, high, element("span", { class: "note" }, [about]));
  }

  card(sample) {
    const reward = typeof sample.reward === "number" ? shown(sample.reward) : String(sample.reward ?? "–");
    const fact = (words, value) => element("span", {}, [`${words} `, element("b", {}, [value])]);
    const facts = [fact("step", String(sample.step)), fact("reward", reward)];
    if (sample.arm) facts.unshift(element("span", {}, [element("b", {}, [sample.arm])]));
    if (sample.reason) facts.push(element("span", { class: "reason" }, [sample.reason]));
    const readout = element("footer", { role: "status" }, [sample.tokens ? HINT : ""]);
    const prompt = sample.prompt ?? "";
    const cut = prompt.length > LONG ? `${prompt.slice(0, LONG)} …` : prompt;
    const asked = element("pre", { class: "prompt" }, [cut]);
    if (cut !== prompt) {
      const rest = element("button", { type: "button", class: "more" }, ["Whole prompt"]);
      rest.addEventListener("click", () => asked.replaceChildren(prompt));
      asked.append(rest);
    }
    return element("article", {}, [
      element("header", {}, facts),
      asked,
      this.answer(sample, readout),
      ...(sample.tokens ? [readout] : []),
    ]);
  }

  /** The completion; of known tokens each with its colour, and its values under pointer or keys. */
  answer(sample, readout) {
    const { tokens } = sample;
    if (!tokens) return element("pre", { class: "answer" }, [sample.completion ?? ""]);
    const scale = this.scales[this.colouring];
    const ramp = scale ? rampOf(COLOURINGS[this.colouring].ramp) : null;
    const spans = tokens.text.map((text, i) => {
      const value = scale && tokens[this.colouring]?.[i];
      const known = typeof value === "number";
      const colour = known ? `background: rgb(${between(ramp, scale.part(value))})` : null;
      return element("span", { "data-token": i, style: colour }, [text]);
    });
    const label = "Completion; left and right move from token to token";
    const answer = element("pre", { class: "answer", tabindex: 0, "aria-label": label }, spans);
    let at = null;
    const choose = (i) => {
      if (at !== null) spans[at].classList.remove("chosen");
      at = i;
      readout.textContent = i === null ? HINT : valuesOf(tokens, i);
      if (i !== null) spans[i].classList.add("chosen");
    };
    answer.addEventListener("pointerover", (event) => {
      const i = event.target.dataset.token;
      if (i !== undefined) choose(Number(i));
    });
    answer.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") choose(null);
      if (!by || !spans.length) return;
      event.preventDefault();
      choose(Math.max(0, Math.min(spans.length - 1, (at ?? (by > 0 ? -1 : 1)) + by)));
    });
    return answer;
  }
}

/** "token 3: “ 12”, gamma 0.93, ratio 1.02". */
function valuesOf(tokens, i) {
  const numbers = Object.keys(COLOURINGS)
    .filter((name) => typeof tokens[name]?.[i] === "number")
    .map((name) => `${name} ${shown(tokens[name][i])}`);
  return [`token ${i}: ${JSON.stringify(tokens.text[i])}`, ...numbers].join(", ");
}

/** The ends of a colouring over all samples, and the place of a value between them; null: unknown. */
function scaleOf(name, samples) {
  const values = samples
    .flatMap((sample) => sample.tokens?.[name] ?? [])
    .filter((value) => typeof value === "number");
  if (!values.length) return null;
  if (name === "gamma") {
    const low = Math.min(0.99, values.reduce((a, b) => Math.min(a, b)));
    return { ends: [low, 1], part: (value) => (value - low) / (1 - low) };
  }
  const map = name === "ratio" ? (value) => Math.log(Math.max(value, 1e-9)) : (value) => value;
  const most = values.reduce((a, b) => Math.max(a, Math.abs(map(b))), 1e-6);
  const reach = name === "ratio" ? Math.min(most, Math.log(4)) : most;
  const ends = name === "ratio" ? [Math.exp(-reach), Math.exp(reach)] : [-reach, reach];
  return { ends, part: (value) => 0.5 + map(value) / (2 * reach) };
}
