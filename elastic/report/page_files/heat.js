// A row for each worker, a column for each step: the redder, the longer it computed than its peers.

const HEAT = { edges: unpack(RUN.diagnosis.heat.edges_s), rows: RUN.diagnosis.heat.rows, cells: unpack(RUN.diagnosis.heat.cells) };
const NO_WORK = 0, AS_PEERS = 128, MOST = 255;  // values of a cell, as page_diagnosis.py writes them
const SLOWER = "vermilion", FASTER = "sky";
const UNSEEN = 0.12;  // differences below that share are no colour at all: they are noise

class Heat extends Panel {
  constructor(canvas, legend) {
    super(canvas, "Heatmap of workers by time; the table of verdicts and faults below says the same in words.");
    const num = RUN.workers.length;
    this.rowHeight = num <= 8 ? 22 : num <= 16 ? 17 : num <= 40 ? 12 : num <= 150 ? 7 : 4;
    canvas.style.height = `${4 + num * this.rowHeight + 26}px`;
    useGestures(canvas, { wheelNeedsCtrl: false });
    canvas.addEventListener("pointermove", (event) => showTip(event, this.describeAt(event)));
    canvas.addEventListener("pointerleave", () => showTip(null, ""));
    const colours = `linear-gradient(90deg, var(--${FASTER}), var(--alive), var(--${SLOWER}))`;
    legend.append(element("span", {}, "half the time ", element("span", { class: "scale", style: `background: ${colours}` }), " twice the time, or more"));
  }

  draw(pen, width, height) {
    const bottom = height - 24, x = view.scale(width);
    const columns = HEAT.edges.length - 1;
    const first = Math.max(0, search(HEAT.edges, view.from) - 1), last = Math.min(columns, search(HEAT.edges, view.to) + 1);
    const high = (bottom - 4) / HEAT.rows;
    this.inside(3, bottom, () => {
      for (let row = 0; row < HEAT.rows; row++) {
        for (let column = first; column < last; column++) {
          const level = HEAT.cells[row * columns + column];
          if (level === NO_WORK) continue;
          const left = x(HEAT.edges[column]), right = x(HEAT.edges[column + 1]);
          const excess = (level - AS_PEERS) / (MOST - AS_PEERS);
          pen.globalAlpha = 1;
          pen.fillStyle = palette.alive;
          pen.fillRect(left, 4 + row * high, Math.max(0.5, right - left), Math.max(1, high - 1));
          pen.globalAlpha = Math.max(0, (Math.abs(excess) - UNSEEN) / (1 - UNSEEN));
          pen.fillStyle = palette[excess > 0 ? SLOWER : FASTER];
          pen.fillRect(left, 4 + row * high, Math.max(0.5, right - left), Math.max(1, high - 1));
        }
      }
      pen.globalAlpha = 1;
    });
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillStyle = palette.muted;
    const every = Math.ceil(13 / this.rowHeight);
    RUN.workers.forEach((worker, row) => {
      if (row % every === 0) pen.fillText(`worker-${worker}`, LEFT - 7, 4 + (row + 0.5) * (bottom - 4) / RUN.workers.length);
    });
    drawAxis(pen, width, bottom);
    this.drawCursor(3, bottom);
  }

  describeAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const time = view.timeAt(event.clientX - box.left, box.width);
    const columns = HEAT.edges.length - 1, column = search(HEAT.edges, time, true) - 1;
    const row = Math.floor((event.clientY - box.top - 4) / ((box.height - 28) / HEAT.rows));
    if (column < 0 || column >= columns || row < 0 || row >= HEAT.rows) return "";
    const level = HEAT.cells[row * columns + column];
    if (level === NO_WORK) return "";
    const percent = Math.round((100 * (level - AS_PEERS)) / (MOST - AS_PEERS));
    const worker = RUN.workers[Math.floor((row * RUN.workers.length) / HEAT.rows)];
    const than = percent === 0 ? "as long as its peers" : `${Math.abs(percent)}${level === MOST ? " % or more" : " %"} ${percent > 0 ? "longer" : "shorter"} than its peers`;
    return `worker-${worker} computed ${than}\n${seconds(time, view.span)} s`;
  }
}
