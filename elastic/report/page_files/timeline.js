// A row for each worker: every micro-batch it computed, and what befell it.

const GRANTED = 1, DUPLICATE = 2, EVALUATION = 4;  // flags of a micro-batch
const BARS = {
  row: unpack(RUN.bars.row), step: unpack(RUN.bars.step), microBatch: unpack(RUN.bars.micro_batch),
  start: unpack(RUN.bars.start_s), took: unpack(RUN.bars.took_s), flags: unpack(RUN.bars.flags), spans: RUN.bars.spans_s,
};
const SHARES = { ...RUN.shares, cells: unpack(RUN.shares.cells) };
const ROWS = new Map(RUN.workers.map((worker, row) => [worker, row]));
const MARKED = RUN.events.filter((event) => !UNMARKED.has(event.category))
  .sort((a, b) => a.fault - b.fault || (a.category !== "checkpoint") - (b.category !== "checkpoint"));

const SPREAD = 1.6;  // least mean width of a micro-batch in pixels; thinner, shares of time are drawn
const MOST_BARS = 40000;

class Timeline extends Panel {
  constructor(canvas) {
    super(canvas, `Timeline of ${plural(RUN.workers.length, "worker")} with ${plural(FAULTS.length, "fault")};`
      + " the table of events below says the same in words.");
    const num = RUN.workers.length;
    this.rowHeight = num <= 8 ? 30 : num <= 16 ? 23 : num <= 40 ? 15 : num <= 150 ? 9 : 4;
    this.top = 48;
    canvas.style.height = `${this.top + num * this.rowHeight + 26}px`;
    this.byRow = Array.from({ length: num }, () => []);
    BARS.row.forEach((row, bar) => this.byRow[row].push(bar));
    this.starts = this.byRow.map((bars) => Float64Array.from(bars, (bar) => BARS.start[bar]));
    useGestures(canvas, { wheelNeedsCtrl: false });
    canvas.addEventListener("pointermove", (event) => showTip(event, this.describeAt(event)));
    canvas.addEventListener("pointerleave", () => showTip(null, ""));
  }

  draw(pen, width, height) {
    const bottom = height - 24;
    const x = view.scale(width);
    this.drawNames(pen);
    this.inside(this.top - 1, bottom, () => {
      this.drawLives(pen, x);
      this.drawShares(pen, x, width);
      this.drawBars(pen, x, width);
    });
    this.drawSteps(pen, x, width, bottom);
    drawAxis(pen, width, bottom);
    this.drawMarks(pen, x, width, bottom);
    this.drawCursor(16, bottom);
  }

  // The upper edge of the bars of a row, and their height.
  place(row) {
    const gap = Math.max(0.5, this.rowHeight * 0.13);
    return [this.top + row * this.rowHeight + gap, this.rowHeight - 2 * gap];
  }

  drawNames(pen) {
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillStyle = palette.muted;
    const every = Math.ceil(13 / this.rowHeight);
    RUN.workers.forEach((worker, row) => {
      const [top, high] = this.place(row);
      if (row % every === 0) pen.fillText(`worker-${worker}`, LEFT - 7, top + high / 2);
    });
    pen.fillText("job", LEFT - 7, 33);
  }

  drawLives(pen, x) {
    pen.fillStyle = palette.alive;
    for (const [worker, from, to] of RUN.lives) {
      if (to < view.from || from > view.to) continue;
      const [top, high] = this.place(ROWS.get(worker));
      pen.fillRect(x(from), top, Math.max(1, x(to) - x(from)), high);
    }
  }

  // Where micro-batches are too thin, or not in this file: the darker, the more of the time.
  drawShares(pen, x, width) {
    const { from_s: from, to_s: to, columns, cells } = SHARES;
    if (!columns) return;
    const apart = (to - from) / columns;
    RUN.workers.forEach((worker, row) => {
      const [top, high] = this.place(row);
      for (let px = LEFT; px < width - RIGHT; px++) {
        const start = view.timeAt(px, width), end = view.timeAt(px + 1, width);
        if (end <= from || start >= to) continue;
        const first = Math.max(0, Math.floor((start - from) / apart));
        const last = Math.min(columns, Math.max(first + 1, Math.ceil((end - from) / apart)));
        let sum = 0;
        for (let i = first; i < last; i++) sum += cells[row * columns + i];
        const share = sum / (last - first) / 255;
        if (share < 0.004) continue;
        pen.globalAlpha = 0.12 + 0.88 * share;
        pen.fillStyle = palette.blue;
        pen.fillRect(px, top, 1, high);
      }
    });
    pen.globalAlpha = 1;
  }

  // Micro-batches of each row in a span of time: the indices of its bars, first and after the last.
  barsIn(row, from, to) {
    const starts = this.starts[row];
    let first = search(starts, from);
    while (first > 0 && this.endOf(row, first - 1) > from) first--;
    return [first, search(starts, to, true)];
  }

  endOf(row, place) {
    const bar = this.byRow[row][place];
    return BARS.start[bar] + BARS.took[bar];
  }

  drawBars(pen, x, width) {
    for (const [from, to] of BARS.spans) {
      if (to < view.from || from > view.to) continue;
      const start = Math.max(from, view.from), end = Math.min(to, view.to);
      const shown = this.byRow.map((_, row) => this.barsIn(row, start, end));
      const most = Math.max(0, ...shown.map(([first, last]) => last - first));
      const total = shown.reduce((sum, [first, last]) => sum + last - first, 0);
      if (most && (x(end) - x(start)) / most < SPREAD || total > MOST_BARS) continue;
      shown.forEach(([first, last], row) => this.drawRow(pen, x, row, first, last, x(start), x(end)));
    }
  }

  drawRow(pen, x, row, first, last, left, right) {
    const [top, high] = this.place(row);
    pen.fillStyle = palette.paper;
    pen.fillRect(left, top, right - left, high);
    pen.fillStyle = palette.alive;
    for (const [worker, from, to] of RUN.lives) {
      if (ROWS.get(worker) !== row) continue;
      const edge = Math.max(left, x(from));
      pen.fillRect(edge, top, Math.max(0, Math.min(right, x(to)) - edge), high);
    }
    for (let place = first; place < last; place++) {
      const bar = this.byRow[row][place];
      const from = x(BARS.start[bar]), to = x(BARS.start[bar] + BARS.took[bar]);
      const gap = to - from > 4 ? 1 : 0;
      this.drawBar(pen, bar, from, top, Math.max(0.7, to - from - gap), high);
    }
  }

  drawBar(pen, bar, left, top, width, high) {
    const flags = BARS.flags[bar], even = BARS.step[bar] % 2 === 0;
    const isGranted = flags & GRANTED;
    const colour = flags & EVALUATION ? palette.evaluation : even ? palette.blue : palette.pale;
    pen.fillStyle = isGranted ? colour : palette.refused;
    pen.fillRect(left, top, width, high);
    if (!isGranted) hatch(pen, left, top, width, high);
    if (flags & DUPLICATE) {
      pen.fillStyle = palette.duplicate;
      pen.fillRect(left, top + high * 0.68, width, high * 0.32);
    }
    if (width > 22 && high > 12) {
      pen.fillStyle = !isGranted ? palette.ink : even && !(flags & EVALUATION) ? palette["on-blue"] : palette["on-pale"];
      pen.textAlign = "center";
      pen.textBaseline = "middle";
      const clear = flags & DUPLICATE ? high * 0.36 : high / 2;
      pen.fillText(BARS.microBatch[bar], left + width / 2, top + clear + 0.5);
    }
  }

  // The steps above the rows, and lines between them where there is room.
  drawSteps(pen, x, width, bottom) {
    const first = search(STEPS.time, view.from), last = search(STEPS.time, view.to);
    pen.textBaseline = "middle";
    pen.textAlign = "center";
    const room = (width - LEFT) / Math.max(1, last - first);
    const every = roundUp(Math.max(1, 46 / room));
    pen.textAlign = "right";
    pen.fillStyle = palette.muted;
    pen.fillText("step", LEFT - 7, 9);
    pen.textAlign = "center";
    let free = LEFT;
    for (let i = first; i <= Math.min(last, STEPS.time.length - 1); i++) {
      const left = x(STEPS.begin[i]), right = x(STEPS.time[i]);
      if (room > 16) this.inside(this.top - 4, bottom, () => line(pen, left, this.top - 4, left, bottom, palette.edge));
      if (STEPS.step[i] % every) continue;
      const text = count(STEPS.step[i]);
      const half = pen.measureText(text).width / 2;
      const shown = Math.min(right, width - RIGHT), from = Math.max(left, LEFT);
      const centre = room > 46 ? (from + shown) / 2 : from;
      if (centre - half < free || centre + half > width - RIGHT + 4) continue;
      pen.fillText(text, centre, 9);
      if (room <= 46 && left >= LEFT) line(pen, left, 16, left, 20, palette.edge);
      free = centre + half + 10;
    }
  }

  drawMarks(pen, x, width, bottom) {
    const taken = new Map();
    this.marks = [];
    const size = Math.min(1, Math.max(0.55, this.rowHeight / 18));
    const inside = (event) => event.time_s >= view.from && event.time_s <= view.to;
    const manyCheckpoints = MARKED.filter((event) => event.category === "checkpoint" && inside(event)).length > 40;
    this.inside(0, bottom + 4, () => {
      for (const event of MARKED) {
        if (!inside(event)) continue;
        const place = x(event.time_s);
        const row = event.worker === null ? undefined : ROWS.get(event.worker);
        if (row === undefined) {
          const isCheckpoint = event.category === "checkpoint";
          pen.globalAlpha = isCheckpoint ? 0.35 : 0.75;
          if (!isCheckpoint || !manyCheckpoints) {
            line(pen, place, 42, place, bottom, palette[MARKS[event.category][0]], isCheckpoint ? 1 : 1.5);
          }
          pen.globalAlpha = 1;
          this.put(pen, event, place, 32, 1, taken, 7);
        } else {
          const [top, high] = this.place(row);
          this.put(pen, event, place, top + high / 2, size, taken, 6);
        }
      }
    });
  }

  // Draw a mark, unless it would hide behind one of its kind in its row.
  put(pen, event, x, y, size, taken, apart) {
    const key = `${event.category} ${event.worker} ${event.fault}`;
    if (Math.abs(x - (taken.get(key) ?? -Infinity)) < apart * size) return;
    taken.set(key, x);
    stamp(pen, event.category, x, y, size * (event.fault ? 0.92 : 0.85), event.fault);
    this.marks.push({ x, y, reach: 9 * size + 1, event });
  }

  describeAt(pointer) {
    const box = this.canvas.getBoundingClientRect();
    const x = pointer.clientX - box.left, y = pointer.clientY - box.top;
    const close = (this.marks ?? []).filter((mark) => Math.hypot(mark.x - x, mark.y - y) < mark.reach);
    if (close.length) return close.slice(-5).map((mark) => inWords(mark.event)).join("\n\n");
    const time = view.timeAt(x, this.canvas.clientWidth);
    const row = Math.floor((y - this.top) / this.rowHeight);
    if (row < 0 || row >= RUN.workers.length || x < LEFT) return "";
    const step = STEPS.step[Math.min(search(STEPS.time, time), STEPS.step.length - 1)];
    return this.describeBar(row, time) ?? this.describeShare(row, time, step);
  }

  describeBar(row, time) {
    const slack = (2 / this.canvas.clientWidth) * view.span;
    const [first, last] = this.barsIn(row, time - slack, time + slack);
    if (first >= last) return null;
    const bar = this.byRow[row][last - 1], flags = BARS.flags[bar];
    const began = flags & DUPLICATE ? "under a duplicate lease: another worker had begun it\n" : "";
    const outcome = began + (flags & GRANTED ? "granted" : "refused: stale, or granted to another worker first");
    const what = flags & EVALUATION ? "the evaluation before step" : "step";
    return `worker-${RUN.workers[row]}: micro-batch ${BARS.microBatch[bar]} of ${what} ${count(BARS.step[bar])}\n`
      + `${seconds(BARS.start[bar], 0.1)} s, took ${milliseconds(BARS.took[bar])}\n${outcome}`;
  }

  describeShare(row, time, step) {
    const worker = RUN.workers[row];
    if (!RUN.lives.some(([one, from, to]) => one === worker && from <= time && time <= to)) return `worker-${worker}: not in the job`;
    const column = Math.floor(((time - SHARES.from_s) / (SHARES.to_s - SHARES.from_s)) * SHARES.columns);
    const share = SHARES.cells[row * SHARES.columns + column];
    const isKept = BARS.spans.some(([from, to]) => from <= time && time <= to);
    if (isKept || share === undefined) return `worker-${worker}: waiting, step ${count(step)}`;
    return `worker-${worker}: computes ${Math.round(share / 2.55)} % of the time, about step ${count(step)}\n`
      + "(the micro-batches of this stretch are not in this file)";
  }
}

function hatch(pen, left, top, width, high) {
  pen.save();
  pen.beginPath();
  pen.rect(left, top, width, high);
  pen.clip();
  pen.strokeStyle = palette.hatch;
  pen.lineWidth = 1;
  pen.beginPath();
  const begin = Math.floor((left - high) / 5) * 5;
  for (let at = begin; at < left + width; at += 5) {
    pen.moveTo(at, top + high);
    pen.lineTo(at + high, top);
  }
  pen.stroke();
  pen.restore();
}

function inWords(event) {
  const head = `${event.fault ? "injected fault: " : ""}${event.text}`;
  const where = `${seconds(event.time_s, 0.1)} s, step ${count(event.step)}`
    + (event.generation ? `, generation ${event.generation}` : "");
  return [head, event.reason, where].filter(Boolean).join("\n");
}

function fillLegend(parent) {
  const bar = (...paths) => {
    const svg = drawing("", "", 16);
    for (const [path, style] of paths) svg.append(...drawing(path, style).childNodes);
    return svg;
  };
  const box = "M-7-5H7V5H-7Z", lower = "M-7 1.5H7V5H-7Z";
  const add = (picture, text) => parent.append(element("span", { class: "key" }, picture, text));
  add(bar([box, "fill: var(--blue)"]), "micro-batch, even step");
  add(bar([box, "fill: var(--pale)"]), "odd step");
  const has = (flag) => BARS.flags.some((flags) => flags & flag);
  if (has(EVALUATION)) add(bar([box, "fill: var(--evaluation)"]), "evaluation");
  if (has(DUPLICATE)) add(bar([box, "fill: var(--blue)"], [lower, "fill: var(--duplicate)"]), "duplicate: another had begun it");
  if (BARS.flags.some((flags) => !(flags & GRANTED))) {
    add(bar([box, "fill: var(--refused)"], ["M-6 5 4-5M-1 5 7-3M-7 1-1-5", "stroke: var(--hatch); fill: none"]), "refused");
  }
  add(bar([box, "fill: var(--alive)"]), "waiting");
  for (const category of Object.keys(MARKS)) {
    if (!["other", "evaluation"].includes(category) && RUN.categories.includes(category)) add(glyph(category), category);
  }
  if (FAULTS.length) {
    const ring = "M-6 0A6 6 0 1 0 6 0 6 6 0 1 0-6 0Z";
    add(drawing(ring, "fill: none; stroke: var(--ink); stroke-width: 1.3"), "ringed: injected");
  }
}
