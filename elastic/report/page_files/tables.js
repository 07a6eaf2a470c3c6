// What is read rather than looked at: figures, events, result, settings.

const PAGE_OF_EVENTS = 300;

function fillHeader() {
  const state = document.getElementById("state"), exact = document.getElementById("exact");
  const looks = { finished: "good", running: "warn", stopped: "plain", interrupted: "warn", failed: "bad" };
  state.textContent = RUN.state;
  state.classList.add(looks[RUN.state] ?? "plain");
  exact.hidden = RUN.exact === null || RUN.exact === undefined;
  exact.textContent = RUN.exact ? "exact" : "not exact";
  exact.classList.add(RUN.exact ? "good" : "bad");
  const started = new Date(RUN.start_unix_s * 1000);
  document.getElementById("when").textContent = `started ${started.toISOString().slice(0, 19).replace("T", " ")} UTC`;
  const hashes = document.getElementById("hashes");
  for (const name of ["params_sha256", "samples_sha256"]) {
    if (RUN.result?.[name]) hashes.append(element("b", {}, name), ` ${RUN.result[name]} `, element("br"));
  }
  const summary = document.getElementById("summary");
  for (const [what, figure, detail] of RUN.summary) {
    summary.append(element("div", {}, element("dt", {}, what), element("dd", {}, figure), element("dd", {}, detail)));
  }
  const notes = document.getElementById("notes");
  notes.hidden = !RUN.notes.length;
  for (const note of RUN.notes) notes.append(element("li", {}, note));
}

function fillEvents() {
  const kinds = document.getElementById("kinds"), input = document.getElementById("search");
  const hidden = new Set(UNMARKED);
  let shown = PAGE_OF_EVENTS;
  const counts = new Map();
  for (const event of RUN.events) counts.set(event.category, (counts.get(event.category) ?? 0) + 1);
  const texts = RUN.events.map((event) =>
    `${event.text} ${event.kind} ${event.reason} ${event.category} step ${event.step} generation ${event.generation}${event.fault ? " injected fault" : ""}`.toLowerCase());
  for (const category of Object.keys(MARKS)) {
    if (!counts.has(category)) continue;
    const button = element("button", { "aria-pressed": String(!hidden.has(category)) },
      glyph(category), `${category} (${count(counts.get(category))})`);
    button.onclick = () => {
      if (!hidden.delete(category)) hidden.add(category);
      button.setAttribute("aria-pressed", String(!hidden.has(category)));
      fill();
    };
    kinds.append(button);
  }
  const more = document.getElementById("more-events");
  function fill() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = RUN.events.filter((event, i) => !hidden.has(event.category) && words.every((word) => texts[i].includes(word)));
    document.getElementById("events").replaceChildren(...found.slice(0, shown).map(eventRow));
    document.getElementById("num-events").textContent = `${count(found.length)} of ${count(RUN.events.length)}`;
    more.hidden = found.length <= shown;
    more.textContent = `show ${count(Math.min(PAGE_OF_EVENTS, found.length - shown))} more`;
  }
  more.onclick = () => { shown += PAGE_OF_EVENTS; fill(); };
  input.oninput = () => { shown = PAGE_OF_EVENTS; fill(); };
  fill();
}

function eventRow(event) {
  const show = element("button", { title: "Show it in the timeline" }, event.text);
  show.onclick = () => {
    view.visit(event.time_s);
    document.getElementById("timeline").scrollIntoView({ block: "center" });
  };
  const what = element("td", {}, glyph(event.category), " ", show);
  const why = event.fault ? "injected" : event.reason;
  return element("tr", { class: event.fault ? "fault" : "" },
    element("td", {}, `${seconds(event.time_s, 1)} s`), element("td", {}, count(event.step)),
    element("td", {}, event.generation ? count(event.generation) : ""), what, element("td", {}, why));
}

function fillPairs(id, values, absent) {
  const list = document.getElementById(id);
  const flat = (value, path) => {
    if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
      for (const [name, inner] of Object.entries(value)) flat(inner, path ? `${path}.${name}` : name);
    } else {
      const text = typeof value === "string" ? value || "(empty)" : JSON.stringify(value);
      list.append(element("dt", {}, path), element("dd", {}, text));
    }
  };
  if (values) flat(values, "");
  else list.append(element("dt", {}, absent));
}
