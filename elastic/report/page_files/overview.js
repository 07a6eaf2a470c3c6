// The strip at the top: the whole run, its step times and faults, and a frame around what is shown.

class Overview extends Panel {
  constructor(canvas) {
    super(canvas);
    const chart = RUN.charts.find((one) => one.title === "Step time");
    this.stepTimes = unpack(chart.curves[0].y);
    this.drag = null;
    canvas.addEventListener("pointerdown", (event) => this.take(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", () => { this.drag = null; });
    canvas.addEventListener("pointercancel", () => { this.drag = null; });
    canvas.addEventListener("dblclick", () => view.reset());
    canvas.addEventListener("wheel", (event) => {
      if (view.zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY * 0.002))))) event.preventDefault();
    }, { passive: false });
  }

  // The whole run in the same unit as the view.
  get ends() { return [view.unit(view.home[0]), view.unit(view.home[1])]; }

  x(time, width) {
    const [low, high] = this.ends;
    return LEFT + ((view.unit(time) - low) / (high - low)) * (width - LEFT - RIGHT);
  }

  unitAt(event) {
    const [low, high] = this.ends;
    const x = event.clientX - this.canvas.getBoundingClientRect().left;
    return low + ((x - LEFT) / (this.canvas.clientWidth - LEFT - RIGHT)) * (high - low);
  }

  // An edge of the frame widens it, its inside moves it, elsewhere begins a new one.
  take(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    const width = this.canvas.clientWidth;
    const left = this.x(view.from, width), right = this.x(view.to, width);
    const x = event.clientX - this.canvas.getBoundingClientRect().left;
    const at = this.unitAt(event), low = view.unit(view.from), high = view.unit(view.to);
    if (Math.abs(x - left) < 6) this.drag = { fixed: high };
    else if (Math.abs(x - right) < 6) this.drag = { fixed: low };
    else if (x > left && x < right && right - left < width - LEFT - RIGHT - 8) this.drag = { at, low, high };
    else this.drag = { fixed: at };
  }

  move(event) {
    if (!this.drag) return;
    const at = this.unitAt(event);
    const { fixed, low, high } = this.drag;
    if (fixed === undefined) view.showUnits(low + at - this.drag.at, high + at - this.drag.at);
    else view.showUnits(Math.min(fixed, at), Math.max(fixed, at));
  }

  draw(pen, width, height) {
    pen.fillStyle = palette.wash;
    pen.fillRect(LEFT, 0, width - LEFT - RIGHT, height);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillStyle = palette.muted;
    pen.fillText("whole run", LEFT - 7, height / 2);
    this.drawStepTimes(pen, width, height);
    for (const fault of FAULTS) {
      const x = this.x(fault.time_s, width);
      line(pen, x, 0, x, height, palette[MARKS[fault.category][0]], 1.5);
    }
    const left = Math.max(LEFT, this.x(view.from, width)), right = Math.min(width - RIGHT, this.x(view.to, width));
    pen.fillStyle = palette.band;
    pen.fillRect(left, 0, right - left, height);
    pen.strokeStyle = palette.blue;
    pen.lineWidth = 1.5;
    pen.strokeRect(left + 0.5, 0.75, Math.max(2, right - left - 1), height - 1.5);
    if (view.cursor !== null) line(pen, this.x(view.cursor, width), 0, this.x(view.cursor, width), height, palette.muted, 1, [3, 3]);
  }

  drawStepTimes(pen, width, height) {
    const top = new Float32Array(Math.ceil(width)).fill(-1);
    const low = Math.log10(Math.max(1e-6, 500 * RUN.median_step_s));
    let high = low + 1;
    this.stepTimes.forEach((time, i) => {
      const x = Math.floor(this.x(STEPS.time[i], width));
      const size = Math.log10(Math.max(1e-6, time));
      if (x >= 0 && x < top.length && Number.isFinite(size)) top[x] = Math.max(top[x], size);
      if (size > high) high = size;
    });
    pen.strokeStyle = palette.pale;
    pen.lineWidth = 1.2;
    pen.beginPath();
    let isDown = false;
    top.forEach((size, x) => {
      if (size === -1) return;
      const y = height - 5 - Math.max(0, (size - low) / (high - low)) * (height - 12);
      if (isDown) pen.lineTo(x, y);
      else pen.moveTo(x, y);
      isDown = true;
    });
    pen.stroke();
  }
}
