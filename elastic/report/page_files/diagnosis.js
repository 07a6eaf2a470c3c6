// Where the time went, and what cost it: the account as a bar, verdicts and faults as a table.

const PART_COLOURS = {
  productive: "blue", recomputed: "pale", waiting: "refused", coordination: "hatch", recovery: "vermilion",
  checkpoint: "violet", evaluation: "evaluation", "start-up": "orange", other: "ink",
};
const LEAST_SHARE = 0.0005;  // what is less is not told

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function fillAccount() {
  const { wall_s: wall, parts } = RUN.diagnosis.account;
  const bar = document.getElementById("account-bar"), list = document.getElementById("account-parts");
  const shown = parts.map(([name, took, meaning]) => [name, took, meaning, wall ? took / wall : 0])
    .filter(([, , , share]) => share >= LEAST_SHARE);
  for (const [name, took, meaning, share] of shown) {
    const colour = `var(--${PART_COLOURS[name]})`;
    const said = `${name}: ${percent(share)}, ${seconds(took, 10)} s: ${meaning}`;
    bar.append(element("span", { style: `flex: ${share} 1 0; background: ${colour}`, title: said }));
    const square = drawing("M-5-5H5V5H-5Z", `fill: ${colour}`, 11);
    list.append(element("span", { class: "key", title: meaning }, square, `${name} ${percent(share)}`));
  }
  bar.setAttribute("aria-label", shown.map(([name, , , share]) => `${name} ${percent(share)}`).join(", "));
  const [, productive] = parts.find(([name]) => name === "productive");
  document.getElementById("goodput").textContent = `goodput ${percent(wall ? productive / wall : 0)} of ${seconds(wall, 10)} s`;
}

function fillCauses() {
  const { causes, num_causes: num } = RUN.diagnosis;
  document.getElementById("num-causes").textContent = num > causes.length
    ? `the ${causes.length} most expensive of ${count(num)}` : num ? count(num) : "none";
  document.getElementById("causes-section").hidden = num === 0;
  document.getElementById("causes").append(...causes.map((cause) => {
    const what = element("button", { onclick: () => view.visit(cause.begin_s) }, `${cause.what} ${cause.who}`.trim());
    return element("tr", {}, element("td", {}, `${seconds(cause.cost_s, 1)} s`), element("td", {}, `${seconds(cause.begin_s, 1)} s`),
      element("td", {}, count(cause.step)), element("td", {}, what), element("td", {}, cause.reason));
  }));
}
