// The run, and how its numbers, colours and marks are written.

const RUN = JSON.parse(document.getElementById("run").textContent);

const ARRAYS = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array, f8: Float64Array,
};

function unpack(packed) {
  const text = atob(packed.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return new ARRAYS[packed.type](bytes.buffer);
}

const STEPS = { step: unpack(RUN.steps.step), begin: unpack(RUN.steps.begin_s), time: unpack(RUN.steps.time_s) };

// Paths around (0, 0), about 12 wide: each category has a shape of its own, not only a colour.
const MARKS = {
  "worker killed": ["vermilion", "M-5.5-3 -3-5.5 0-2.5 3-5.5 5.5-3 2.5 0 5.5 3 3 5.5 0 2.5 -3 5.5 -5.5 3 -2.5 0Z"],
  "worker lost": ["vermilion", "M-4.7-3.3 -3.3-4.7 0-1.4 3.3-4.7 4.7-3.3 1.4 0 4.7 3.3 3.3 4.7 0 1.4 -3.3 4.7 -4.7 3.3 -1.4 0Z"],
  "worker stopped or hung": ["orange", "M-4.8-4.8H4.8V4.8H-4.8Z"],
  "worker slowed": ["gold", "M0-6 3.6 0 0 6 -3.6 0Z"],
  "NaN or overflow": ["purple", "M-2-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z"],
  "aggregator fault, takeover": ["violet", "M0-6.2 6.2 0 0 6.2 -6.2 0Z"],
  "coordinator fault, restart": ["sky", "M0-6 5.7-1.9 3.5 4.9H-3.5L-5.7-1.9Z"],
  "worker joins": ["green", "M0-5.6 5.8 4.6H-5.8Z"],
  "worker leaves": ["grey", "M0 5.6 5.8-4.6H-5.8Z"],
  "checkpoint": ["grey", "M-1.1-5H1.1V5H-1.1Z"],
  "job starts, resumes, ends": ["ink", "M0-6.4 1.7-2 6.3-1.9 2.7 1 4 5.4 0 2.8 -4 5.4 -2.7 1 -6.3-1.9 -1.7-2Z"],
  "verdict begins": ["bad", "M-2.8-5H2.8L5.6 0 2.8 5H-2.8L-5.6 0Z"],
  "evaluation": ["vermilion", "M-4.2 0A4.2 4.2 0 1 0 4.2 0 4.2 4.2 0 1 0-4.2 0ZM-1.8 0A1.8 1.8 0 1 1 1.8 0 1.8 1.8 0 1 1-1.8 0Z"],
  "other": ["grey", "M-2.6 0A2.6 2.6 0 1 0 2.6 0 2.6 2.6 0 1 0-2.6 0Z"],
};
const UNMARKED = new Set(["evaluation", "other"]);
const PATHS = Object.fromEntries(Object.entries(MARKS).map(([name, mark]) => [name, new Path2D(mark[1])]));

// Read once for each theme: canvases cannot use the colours of the style sheet by name.
let palette = {};
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  palette = new Proxy({}, {
    get(known, name) {
      return (known[name] ??= style.getPropertyValue(`--${name}`).trim());
    },
  });
}

function count(number) {
  return number.toLocaleString("en-US", { maximumFractionDigits: 20 });
}

function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

function value(number) {
  if (!Number.isFinite(number)) return "not finite";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-4 || size >= 1e9)) return number.toExponential(4);
  return number.toLocaleString("en-US", { maximumSignificantDigits: Math.max(6, Math.ceil(Math.log10(size + 1))) });
}

// A time as precise as a width of `span` seconds needs.
function seconds(time, span) {
  const digits = Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(span))));
  return time.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function milliseconds(time) {
  const ms = time * 1000;
  return ms < 10000 ? `${value(Number(ms.toPrecision(4)))} ms` : `${value(Number(time.toPrecision(4)))} s`;
}

// How many of the sorted `values` are less than `limit` (or equal to it, with `orEqual`).
function search(values, limit, orEqual = false) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < limit || (orEqual && values[middle] === limit)) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The next 1, 2 or 5 times a power of ten.
function roundUp(number) {
  const power = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 5, 10].find((one) => one * power >= number * 0.999) * power;
}

// Round numbers between two bounds, about `wanted` of them.
function ticks(from, to, wanted, least = 0) {
  const rough = (to - from) / Math.max(1, wanted);
  if (!(rough > 0)) return [from];
  const apart = Math.max(least, roundUp(rough));
  const found = [];
  for (let i = Math.ceil(from / apart - 1e-9); i * apart <= to + apart * 1e-9; i++) found.push(i * apart + 0);  // never -0
  return found;
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, setting] of Object.entries(attributes)) {
    if (name in made && typeof setting !== "string") made[name] = setting;
    else made.setAttribute(name, setting);
  }
  made.append(...children);
  return made;
}

function drawing(path, style, size = 14) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("width", size);
  svg.setAttribute("height", size);
  svg.setAttribute("viewBox", "-7 -7 14 14");
  svg.setAttribute("aria-hidden", "true");
  const shape = document.createElementNS(space, "path");
  shape.setAttribute("d", path);
  shape.setAttribute("style", style);
  svg.append(shape);
  return svg;
}

function glyph(category) {
  const [colour, path] = MARKS[category];
  return drawing(path, `fill: var(--${colour})`);
}
