"use strict";
// Elements, numbers for reading, ticks, smoothing: functions without state.

/** An element of HTML with attributes and children; text children stay text. */
function element(name, attributes = {}, children = []) {
  return filled(document.createElement(name), attributes, children);
}

/** An element of SVG. */
function drawn(name, attributes = {}, children = []) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** A number for reading: four significant digits, or percent. */
function shown(value, percent = false) {
  if (value === null || value === undefined) return "–";
  if (percent) return `${(100 * value).toFixed(1)}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return tidy(value.toExponential(2));
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return value.toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

/** A number for a narrow place: three significant digits. */
function brief(value, percent = false) {
  const short = Number(value.toPrecision(3));
  return shown(percent ? Number(value.toFixed(3)) : short, percent);
}

function tidy(exponential) {
  return exponential.replace(/\.?0*e\+?/, "e");
}

/** Label of a tick: all of an axis have as many decimals as their distance needs. */
function tickLabel(value, distance, percent) {
  const factor = percent ? 100 : 1;
  const scaled = value * factor;
  const gap = distance * factor;
  if (Math.abs(scaled) < gap / 2) return percent ? "0%" : "0";
  if (gap < 5e-4 || Math.abs(scaled) >= 1e7) return tidy(scaled.toExponential(1));
  const digits = Math.max(0, -Math.floor(Math.log10(gap) + 1e-9));
  const text = scaled.toLocaleString("en-US", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
  return text + (percent ? "%" : "");
}

/** About ``count`` round numbers from low to high. */
function ticks(low, high, count, whole = false) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  let distance = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  if (whole) distance = Math.max(1, Math.round(distance));
  const values = [];
  for (let n = Math.ceil(low / distance - 1e-9); n * distance <= high + distance * 1e-9; n++) {
    values.push(n * distance);
  }
  return { values, distance };
}

/** Powers of ten, and their double and fivefold where few powers are in sight. */
function logTicks(low, high) {
  const few = high / low < 100;
  const values = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const part of few ? [1, 2, 5] : [1]) {
      const value = part * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) values.push(value);
    }
  }
  if (values.length < 2) return [low, high];
  const every = Math.ceil(values.length / 6);
  return values.filter((_, i) => i % every === 0);
}

/** Centred moving mean over the values at most ``half`` steps away; fewer at the ends. */
function smooth(steps, values, half) {
  if (half === 0) return values;
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  let [first, end] = [0, 0];
  return values.map((_, i) => {
    while (steps[first] < steps[i] - half) first++;
    while (end < steps.length && steps[end] <= steps[i] + half) end++;
    return (sums[end] - sums[first]) / (end - first);
  });
}

/** Index of the last of the rising steps that is at most ``step``; -1: none is. */
function lastAt(steps, step) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** The one of the rising steps that is nearest. */
function nearest(steps, step) {
  const at = lastAt(steps, step);
  if (at < 0) return steps[0];
  const after = steps[Math.min(at + 1, steps.length - 1)];
  return after - step < step - steps[at] ? after : steps[at];
}

/** Points [x, y] of a curve; of many in one pixel column the first, least, largest and last. */
function thinned(points) {
  const kept = [];
  for (let i = 0; i < points.length; ) {
    const column = Math.floor(points[i][0]);
    let end = i;
    let [least, largest] = [i, i];
    while (end < points.length && Math.floor(points[end][0]) === column) {
      if (points[end][1] < points[least][1]) least = end;
      if (points[end][1] > points[largest][1]) largest = end;
      end++;
    }
    const chosen = [...new Set([i, least, largest, end - 1])].sort((a, b) => a - b);
    for (const n of chosen) kept.push(points[n]);
    i = end;
  }
  return kept;
}

/** Path through points. */
function path(points) {
  return points
    .map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`)
    .join("");
}

/** A colour between those of a ramp, [red, green, blue]; ``part`` from 0 to 1. */
function between(ramp, part) {
  const place = Math.max(0, Math.min(1, part)) * (ramp.length - 1);
  const first = Math.min(Math.floor(place), ramp.length - 2);
  return ramp[first].map((v, i) => Math.round(v + (place - first) * (ramp[first + 1][i] - v)));
}

/** The colours of a custom property such as "#102030, #ffffff". */
function rampOf(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name);
  return text.split(",").map((part) => {
    const digits = part.trim().slice(1);
    return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
  });
}
