// Curves over the time of the run.

const FAULTS = RUN.events.filter((event) => event.fault);

class Chart extends Panel {
  constructor(parent, chart, low) {
    const canvas = element("canvas", { tabindex: "0", role: "img" });
    super(canvas, describe(chart));
    this.title = chart.title;
    this.unit = chart.unit;
    this.log = chart.log;
    this.curves = chart.curves.map((curve) => ({
      name: curve.name, style: curve.style, y: unpack(curve.y), x: curve.x ? unpack(curve.x) : STEPS.time,
      isOfSteps: !curve.x,
    }));
    this.isStepped = ["stairs", "spans"].includes(chart.curves[0].style);
    this.hasMarks = chart.title === "Step time";
    const keys = element("span", { class: "keys" });
    if (chart.curves.length > 1 || chart.curves[0].style === "line" && chart.curves[0].name !== "each step") {
      for (const curve of chart.curves) keys.append(element("span", { class: "key" }, sample(curve.style), curve.name));
    }
    const toggle = element("button", { title: "Linear or logarithmic axis" });
    toggle.onclick = () => {
      this.log = !this.log;
      label();
      this.redraw();
    };
    const label = () => {
      toggle.textContent = this.log ? "log" : "linear";
      toggle.setAttribute("aria-label", `${chart.title}: ${toggle.textContent} axis, change it`);
    };
    label();
    keys.append(toggle);
    const unit = chart.unit ? element("span", { class: "muted" }, ` ${chart.unit}`) : "";
    parent.append(element("div", { class: low ? "chart low" : "chart" },
      element("header", {}, element("h2", {}, chart.title, unit), keys), canvas));
    useGestures(canvas, { wheelNeedsCtrl: true });
    canvas.addEventListener("pointermove", (event) => showTip(event, this.describeAt()));
    canvas.addEventListener("pointerleave", () => showTip(null, ""));
  }

  // The bounds of what is shown, on the axis that is drawn.
  bounds() {
    let low = Infinity, high = -Infinity;
    for (const { x, y, style } of this.curves) {
      const first = Math.max(0, search(x, view.from) - 1);
      const last = Math.min(x.length, search(x, view.to, true) + (style === "stairs" ? 0 : 1));
      for (let i = first; i < last; i++) {
        if (!Number.isFinite(y[i]) || (this.log && y[i] <= 0)) continue;
        if (y[i] < low) low = y[i];
        if (y[i] > high) high = y[i];
      }
    }
    if (low > high) return [this.log ? 1 : 0, this.log ? 10 : 1];
    if (this.log) {
      const room = Math.max(0.02, 0.06 * Math.log10(high / low));
      return [low / 10 ** room, high * 10 ** (this.hasMarks ? 3.5 * room : room)];
    }
    if (this.curves[0].style === "stairs" || this.title === "Workers" || (low > 0 && low < 0.45 * high)) low = 0;
    const room = (high - low || Math.abs(high) || 1) * 0.07;
    return [low === 0 ? 0 : low - room, high + (this.hasMarks ? 2.6 : 1) * room];
  }

  draw(pen, width, height) {
    const top = 6, bottom = height - 22;
    const [low, high] = this.bounds();
    const to = this.log ? Math.log10 : (number) => number;
    const y = (number) => bottom - ((to(number) - to(low)) / (to(high) - to(low))) * (bottom - top);
    this.drawGrid(pen, width, y, low, high, bottom - top);
    drawAxis(pen, width, bottom);
    const x = view.scale(width);
    this.inside(top, bottom, () => {
      for (const fault of FAULTS) {
        if (fault.time_s < view.from || fault.time_s > view.to) continue;
        pen.globalAlpha = 0.4;
        line(pen, x(fault.time_s), top, x(fault.time_s), bottom, palette[MARKS[fault.category][0]], 1);
        pen.globalAlpha = 1;
      }
      const alone = this.curves.length === 1;
      for (const curve of this.curves) this.drawCurve(pen, curve, x, y, width, bottom, alone);
    });
    if (this.hasMarks) this.drawMarks(pen, x, top + 8, width);
    this.drawCursor(top, bottom);
  }

  drawGrid(pen, width, y, low, high, height) {
    const places = this.log ? logTicks(low, high) : ticks(low, high, height / 38, this.isStepped && this.title !== "Step time" ? 1 : 0);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    let last = Infinity;
    for (const place of places) {
      if (last - y(place) < 14 || place < low || place > high) continue;
      last = y(place);
      line(pen, LEFT, last, width - RIGHT, last, palette.faint);
      pen.fillStyle = palette.muted;
      pen.fillText(short(place), LEFT - 7, last);
    }
  }

  drawCurve(pen, { x: times, y: values, style }, x, y, width, bottom, alone) {
    const first = Math.max(0, search(times, view.from) - 1);
    const last = Math.min(times.length, search(times, view.to, true) + 1);
    const colour = style === "dots" ? palette.vermilion : style === "thin" ? palette.pale : palette.line;
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = style === "thin" ? 1.2 : alone ? 1.4 : 2.1;
    pen.lineJoin = "round";
    pen.beginPath();
    let isDown = false, end = 0;
    for (let i = first; i < last; i++) {
      const usable = Number.isFinite(values[i]) && !(this.log && values[i] <= 0);
      if (!usable) { isDown = false; continue; }
      const px = x(times[i]), py = y(values[i]);
      if (style === "spans") {  // at this height since the step before
        const begun = x(STEPS.begin[i]);
        if (isDown) pen.lineTo(begun, py);
        else pen.moveTo(begun, py);
        pen.lineTo(px, py);
      } else if (!isDown) pen.moveTo(px, py);
      else if (style === "stairs") { pen.lineTo(px, end); pen.lineTo(px, py); }
      else pen.lineTo(px, py);
      [isDown, end] = [true, py];
    }
    if (style === "stairs" && isDown) pen.lineTo(x(Math.min(RUN.end_s, view.to)), end);
    pen.stroke();
    const room = (width - LEFT) / Math.max(1, last - first);
    if ((style === "dots" && room > 8) || (room > 14 && !this.isStepped && (alone || style === "thin"))) {
      for (let i = first; i < last; i++) {
        if (Number.isFinite(values[i])) dot(pen, x(times[i]), y(values[i]), style === "dots" ? 3.2 : 2.2);
      }
    }
    for (let i = first; i < last; i++) {
      if (!Number.isFinite(values[i]) && this.title === "Loss") {  // shown, never just left out
        line(pen, x(times[i]), bottom - 9, x(times[i]), bottom, palette.purple, 2);
      }
    }
  }

  drawMarks(pen, x, top, width) {
    let last = -Infinity;
    for (const fault of FAULTS) {
      const place = x(fault.time_s);
      if (place < LEFT || place > width - RIGHT || place - last < 9) continue;
      last = place;
      stamp(pen, fault.category, place, top, 1);
    }
  }

  describeAt() {
    if (view.cursor === null) return "";
    const at = Math.min(search(STEPS.time, view.cursor), STEPS.time.length - 1);
    const lines = [`step ${count(STEPS.step[at])}, committed at ${seconds(STEPS.time[at], view.span)} s`];
    for (const curve of this.curves) {
      const index = curve.isOfSteps ? at : curve.style === "stairs"
        ? Math.max(0, search(curve.x, view.cursor, true) - 1) : nearest(curve.x, view.cursor);
      const unit = this.unit ? ` ${this.unit}` : "";
      const where = curve.isOfSteps || curve.style === "stairs" ? "" : ` (${seconds(curve.x[index], view.span)} s)`;
      lines.push(`${curve.name}: ${value(curve.y[index])}${unit}${where}`);
    }
    const close = FAULTS.filter((fault) => Math.abs(fault.time_s - view.cursor) < view.span * 0.006);
    return [...lines, ...close.slice(0, 4).map((fault) => `fault: ${fault.text}`)].join("\n");
  }
}

function describe(chart) {
  const y = unpack(chart.curves.at(-1).y).filter(Number.isFinite);
  if (!y.length) return `${chart.title}: no finite value`;
  const [low, high] = y.reduce(([least, most], one) => [Math.min(least, one), Math.max(most, one)], [Infinity, -Infinity]);
  return `${chart.title}: from ${value(y[0])} to ${value(y.at(-1))} ${chart.unit}, between ${value(low)} and ${value(high)}`;
}

function sample(style) {
  const colour = { thin: "pale", dots: "vermilion" }[style] ?? "line";
  const path = style === "dots" ? "M-7 0H7M-3 0A3 3 0 1 0 3 0 3 3 0 1 0-3 0Z" : "M-7 0H7";
  return drawing(path, `stroke: var(--${colour}); stroke-width: ${style === "thin" ? 1.5 : 2.5}; fill: var(--${colour})`);
}

function dot(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 7);
  pen.fill();
}

function nearest(values, wanted) {
  const next = Math.min(search(values, wanted), values.length - 1);
  return next && wanted - values[next - 1] < values[next] - wanted ? next - 1 : next;
}

function logTicks(low, high) {
  const found = [];
  const dense = Math.log10(high / low) < 1 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const one of dense) found.push(one * 10 ** power);
  }
  return found;
}

function short(number) {
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return number.toExponential().replace("e+", "e");
  return Number(number.toPrecision(6)).toLocaleString("en-US", { maximumFractionDigits: 6 });
}

// A mark; injected faults stand out by a ring, what was noticed has none.
function stamp(pen, category, x, y, size, hasRing = false) {
  pen.save();
  pen.translate(x, y);
  pen.scale(size, size);
  if (hasRing) {
    pen.beginPath();
    pen.arc(0, 0, 8.6, 0, 7);
    pen.fillStyle = palette.paper;
    pen.fill();
    pen.strokeStyle = palette.ink;
    pen.lineWidth = 1.3;
    pen.stroke();
  }
  pen.strokeStyle = palette.paper;
  pen.lineWidth = 2;
  pen.lineJoin = "round";
  pen.stroke(PATHS[category]);
  pen.fillStyle = palette[MARKS[category][0]];
  pen.fill(PATHS[category]);
  pen.restore();
}
