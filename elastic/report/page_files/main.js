// Puts the panels onto the page.

readPalette();
fillHeader();
RUN.charts.forEach((chart, index) => {
  new Chart(document.getElementById(index < 2 ? "first-charts" : "more-charts"), chart, index >= 2);
});
const last = document.querySelector("#more-charts > :last-child:nth-child(odd)");
if (last) last.classList.add("wide");
fillLegend(document.getElementById("legend"));
new Timeline(document.getElementById("timeline"));
new Heat(document.getElementById("heat"), document.getElementById("heat-legend"));
fillAccount();
fillCauses();
new Overview(document.getElementById("overview"));
fillEvents();
fillPairs("result", RUN.result, "not there before the run has ended");
fillPairs("settings", RUN.job);
useKeys();

const range = document.getElementById("range");
view.listeners.push(() => {
  const [first, final] = shownSteps();
  range.textContent = `${seconds(view.from, view.span)} to ${seconds(view.to, view.span)} s, `
    + (first === final ? `step ${count(first)}` : `steps ${count(first)} to ${count(final)}`);
  range.dataset.from = view.from;
  range.dataset.to = view.to;
});

const byTime = document.getElementById("by-time"), byStep = document.getElementById("by-step");
for (const button of [byTime, byStep]) {
  button.onclick = () => {
    view.byStep = button === byStep;
    byTime.setAttribute("aria-pressed", String(!view.byStep));
    byStep.setAttribute("aria-pressed", String(view.byStep));
    view.changed();
  };
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readPalette();
  view.changed();
});
view.reset();
