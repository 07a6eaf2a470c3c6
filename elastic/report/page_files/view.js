// The part of the run that is shown: one for all panels. And the gestures that change it.

const LEFT = 66, RIGHT = 10;  // margins of every plot, in pixels, so that panels lie below one another

class View {
  constructor() {
    this.limits = [Math.min(0, RUN.first_step_s), RUN.end_s];
    const firstSeen = Math.min(RUN.first_work_s, ...RUN.lives.map((life) => life[1]));
    const lead = 0.012 * (RUN.end_s - firstSeen);
    this.home = [Math.max(this.limits[0], firstSeen - lead), RUN.end_s + lead];
    this.limits[1] = this.home[1];
    this.byStep = false;
    this.cursor = null;  // a time, or null
    this.visited = null;  // the event looked at last
    this.selection = null;  // two times, while they are being marked
    this.listeners = [];
    [this.from, this.to] = this.home;
  }

  // Between seconds and what the axis is linear in: seconds, or steps done.
  unit(time) {
    if (!this.byStep) return time;
    const { step, time: done } = STEPS;
    const next = search(done, time);
    if (next >= done.length) return step[done.length - 1] + 1;
    const before = next ? done[next - 1] : RUN.first_step_s;
    const base = next ? step[next - 1] + 1 : step[0];
    const share = Math.max(0, (time - before) / Math.max(1e-12, done[next] - before));
    return base + share * (step[next] + 1 - base);
  }

  time(unit) {
    if (!this.byStep) return unit;
    const { step, time: done } = STEPS;
    const next = Math.min(search(step, unit - 1), done.length - 1);
    const before = next ? done[next - 1] : RUN.first_step_s;
    const base = next ? step[next - 1] + 1 : step[0];
    return before + ((unit - base) / (step[next] + 1 - base)) * (done[next] - before);
  }

  get span() { return this.to - this.from; }

  // Where a time lies in a plot of `width` pixels.
  scale(width) {
    const low = this.unit(this.from), high = this.unit(this.to);
    const factor = (width - LEFT - RIGHT) / Math.max(1e-9, high - low);
    if (!this.byStep) return (time) => LEFT + (time - low) * factor;
    return (time) => LEFT + (this.unit(time) - low) * factor;
  }

  timeAt(x, width) {
    const low = this.unit(this.from), high = this.unit(this.to);
    return this.time(low + ((x - LEFT) / (width - LEFT - RIGHT)) * (high - low));
  }

  get leastSpan() { return Math.max(1e-4, RUN.median_step_s / 500); }

  show(from, to) {
    const widest = this.limits[1] - this.limits[0];
    const span = Math.min(widest, Math.max(this.leastSpan, to - from));
    const middle = (from + to) / 2;
    this.from = Math.min(Math.max(middle - span / 2, this.limits[0]), this.limits[1] - span);
    this.to = this.from + span;
    this.changed();
  }

  showUnits(low, high) { this.show(this.time(low), this.time(high)); }

  reset() {
    this.visited = null;
    this.show(...this.home);
  }

  // `factor` < 1 zooms in; what lies at `time` stays where it is. Returns whether anything moved.
  zoom(factor, time = (this.from + this.to) / 2) {
    const old = [this.from, this.to];
    const fixed = this.unit(time);
    const low = this.unit(this.from), high = this.unit(this.to);
    const ends = [fixed + (low - fixed) * factor, fixed + (high - fixed) * factor];
    if (factor > 1) {  // steps before the first do not exist, seconds do
      const outer = [this.time(ends[0]), this.time(ends[1])];
      this.show(Math.max(outer[0], this.limits[0]), Math.min(outer[1], this.limits[1]));
    } else this.showUnits(...ends);
    return Math.abs(this.from - old[0]) + Math.abs(this.to - old[1]) > 1e-9;
  }

  // Move by a share of the width.
  pan(share) {
    const low = this.unit(this.from), high = this.unit(this.to);
    const by = share * (high - low);
    this.showUnits(low + by, high + by);
  }

  // Bring a moment into the middle, near enough to tell micro-batches apart.
  visit(time) {
    if (time === undefined) return;
    const span = Math.min(this.span, 12 * RUN.median_step_s);
    this.cursor = this.visited = time;
    this.show(time - span / 2, time + span / 2);
  }

  point(time) {
    this.cursor = time;
    this.changed();
  }

  changed() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      for (const listener of this.listeners) listener();
    });
  }
}

const view = new View();

// The steps that are shown, first and last.
function shownSteps() {
  const first = Math.min(search(STEPS.time, view.from), STEPS.step.length - 1);
  const last = Math.min(search(STEPS.time, view.to), STEPS.step.length - 1);
  return [STEPS.step[first], STEPS.step[last]];
}

// A canvas as sharp as the screen, drawn again whenever its size or the view changes.
class Panel {
  constructor(canvas, label) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    if (label) canvas.setAttribute("aria-label", label);
    new ResizeObserver(() => this.redraw()).observe(canvas);
    view.listeners.push(() => this.redraw());
  }

  redraw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const ratio = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    this.pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.pen.clearRect(0, 0, width, height);
    this.pen.font = "11.5px system-ui, sans-serif";
    this.draw(this.pen, width, height);
  }

  // Draw only between the margins.
  inside(top, bottom, draw) {
    this.pen.save();
    this.pen.beginPath();
    this.pen.rect(LEFT, top, this.canvas.clientWidth - LEFT - RIGHT, bottom - top);
    this.pen.clip();
    draw();
    this.pen.restore();
  }

  drawCursor(top, bottom) {
    const x = view.scale(this.canvas.clientWidth);
    this.inside(top, bottom, () => {
      if (view.selection) {
        const [from, to] = view.selection.map(x);
        this.pen.fillStyle = palette.band;
        this.pen.fillRect(from, top, to - from, bottom - top);
      }
      if (view.cursor !== null) line(this.pen, x(view.cursor), top, x(view.cursor), bottom, palette.muted, 1, [3, 3]);
    });
  }
}

function line(pen, x0, y0, x1, y1, colour, width = 1, dash = []) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.setLineDash(dash);
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
  pen.setLineDash([]);
}

// The lower axis: seconds, or steps.
function drawAxis(pen, width, bottom) {
  const x = view.scale(width);
  const low = view.unit(view.from), high = view.unit(view.to);
  pen.fillStyle = palette.muted;
  pen.textAlign = "center";
  pen.textBaseline = "top";
  line(pen, LEFT, bottom + 0.5, width - RIGHT, bottom + 0.5, palette.edge);
  for (const tick of ticks(low, high, (width - LEFT) / 90, view.byStep ? 1 : 0)) {
    const place = x(view.time(tick));
    if (place < LEFT - 1 || place > width - RIGHT + 1) continue;
    line(pen, place, bottom, place, bottom + 4, palette.muted);
    const text = view.byStep ? count(Math.round(tick)) : `${seconds(tick, (high - low) / 10).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "")} s`;
    const half = pen.measureText(text).width / 2;
    pen.fillText(text, Math.min(place, width - half - 1), bottom + 6);
  }
}

function useGestures(canvas, { wheelNeedsCtrl }) {
  let drag = null;
  const place = (event) => event.clientX - canvas.getBoundingClientRect().left;
  canvas.addEventListener("wheel", (event) => {
    showTip(null, "");
    if (wheelNeedsCtrl && !event.ctrlKey && !event.metaKey && Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
    const pixels = event.deltaMode === 1 ? 16 : 1;
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey) {
      view.pan((pixels * (event.deltaX || event.deltaY)) / canvas.clientWidth);
      event.preventDefault();
      return;
    }
    const factor = Math.exp(Math.max(-1, Math.min(1, event.deltaY * pixels * 0.002)));
    const moved = view.zoom(factor, view.timeAt(place(event), canvas.clientWidth));
    if (moved || event.ctrlKey) event.preventDefault();  // fully out, the page scrolls on
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    const time = view.timeAt(place(event), canvas.clientWidth);
    drag = { x: place(event), selects: event.shiftKey, time, low: view.unit(view.from), high: view.unit(view.to) };
    canvas.classList.toggle("dragging", !event.shiftKey);
  });
  canvas.addEventListener("pointermove", (event) => {
    const time = view.timeAt(place(event), canvas.clientWidth);
    if (!drag) return view.point(time);
    if (drag.selects) {
      view.selection = [drag.time, time].sort((a, b) => a - b);
      return view.changed();
    }
    const by = ((place(event) - drag.x) / (canvas.clientWidth - LEFT - RIGHT)) * (drag.high - drag.low);
    view.showUnits(drag.low - by, drag.high - by);
  });
  const release = () => {
    const marked = view.selection;
    view.selection = drag = null;
    canvas.classList.remove("dragging");
    if (marked) view.show(...marked);
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => { if (!drag) view.point(null); });
  canvas.addEventListener("dblclick", () => view.reset());
}

function useKeys() {
  const faults = [...new Set(RUN.events.filter((event) => event.fault).map((event) => event.time_s))];
  const marks = [...new Set(RUN.events.filter((event) => !UNMARKED.has(event.category)).map((event) => event.time_s))];
  const stops = faults.length ? faults : marks;
  // From the one visited last, if it is still shown, else from the edge of what is shown.
  const since = (edge) => (view.visited !== null && view.visited >= view.from && view.visited <= view.to ? view.visited : edge);
  const next = () => view.visit(stops.find((one) => one > since(view.from) + 1e-6));
  const previous = () => view.visit(stops.findLast((one) => one < since(view.to) - 1e-6));
  const actions = {
    ArrowLeft: () => view.pan(-0.2), ArrowRight: () => view.pan(0.2),
    "+": () => view.zoom(0.6), "=": () => view.zoom(0.6), "-": () => view.zoom(1 / 0.6),
    0: () => view.reset(), Home: () => view.reset(), n: next, p: previous,
  };
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, .scroll, summary") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!(event.key in actions)) return;
    actions[event.key]();
    event.preventDefault();
  });
  const buttons = { "zoom-in": "+", "zoom-out": "-", whole: "0", next: "n", previous: "p" };
  for (const [id, key] of Object.entries(buttons)) document.getElementById(id).onclick = actions[key];
  document.getElementById("next").hidden = document.getElementById("previous").hidden = !stops.length;
}

// A few lines beside the pointer.
const tip = document.getElementById("tip");
function showTip(event, text) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const { offsetWidth: width, offsetHeight: height } = tip;
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - width - 12 : event.clientX + 16;
  const top = event.clientY + 14 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
