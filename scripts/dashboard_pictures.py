"""Draws our dashboards with data of a Prometheus, much as Grafana would: for the documents.

    python -m scripts.dashboard_pictures http://localhost:9090 JOB FOLDER

Where no Grafana can be installed, this is how to look at every panel with its real data.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from monitoring.dashboards.catalogue import all_dashboards
from monitoring.dashboards.panels import WIDTH, Json

PAPER, PANEL, INK, MUTED, GRID = "#111217", "#181b1f", "#d8d9da", "#8e8e8e", "#2c3235"
PALETTE = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#b877d9", "#37872d", "#fade2a")
CELL_IN = (0.62, 0.36)
"""Inches of one column and one row of a dashboard."""
NUM_POINTS = 240
RATE_INTERVAL = "15s"

_MARGINS_IN = {
    **dict.fromkeys(("stat", "table", "piechart"), (0.1, 0.1)),
    **dict.fromkeys(("status-history", "state-timeline"), (1.9, 0.55)),
}
"""Left of and below what is drawn; for names and legends."""
_MOST_S = 5.0
"""Where nothing was told for longer, nothing is drawn."""


class Source:
    """One job's data between two times."""

    def __init__(self, url: str, job: str, begin_s: float, end_s: float) -> None:
        self._url, self._job = url.rstrip("/"), job
        self.begin_s, self.end_s = begin_s, end_s

    def series(self, target: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Name, times and values of each series."""
        expression = str(target["expr"])
        for name, value in (
            ("$__rate_interval", RATE_INTERVAL), ("$job", self._job), ("$run", ".*"),
        ):  # fmt: skip
            expression = expression.replace(name, value)
        step = max(1.0, (self.end_s - self.begin_s) / NUM_POINTS)
        query = {"query": expression, "start": self.begin_s, "end": self.end_s, "step": step}
        address = f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            found = json.load(answer)["data"]["result"]
        return [
            (
                _legend(str(target["legendFormat"]), one["metric"]),
                np.array([float(at) for at, _ in one["values"]]) - self.begin_s,
                np.array([float(value) for _, value in one["values"]]),
            )
            for one in found
        ]


def _legend(text: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def written(value: float, unit: str) -> str:
    """A number as Grafana shows it."""
    if not math.isfinite(value):
        return "no data"
    if unit == "percentunit":
        return f"{100 * value:.1f} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if abs(value) < 1 else f"{value:.1f} s"
    if unit == "Bps":
        return f"{value / 1e6:.2f} MB/s"
    if unit == "ops":
        return f"{value:.2f}/s" if value < 100 else f"{value:.0f}/s"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def draw(dashboard: Json, source: Source, path: Path) -> None:
    """One picture of all panels."""
    rows = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in dashboard["panels"])
    wide_in, high_in = WIDTH * CELL_IN[0], rows * CELL_IN[1] + 0.6
    figure = Figure(figsize=(wide_in, high_in), facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.text(0.008, 1 - 0.38 / high_in, dashboard["title"], color=INK, fontsize=15)
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        left, top = at["x"] * CELL_IN[0] + 0.06, at["y"] * CELL_IN[1] + 0.66
        wide, high = at["w"] * CELL_IN[0] - 0.12, at["h"] * CELL_IN[1] - 0.12
        box = (left / wide_in, 1 - (top + high) / high_in, wide / wide_in, high / high_in)
        frame = figure.add_axes(box, facecolor=PANEL, xticks=[], yticks=[])
        for spine in frame.spines.values():
            spine.set_color(GRID)
        frame.text(0.1 / wide, 1 - 0.2 / high, panel["title"], color=INK, fontsize=10,
                   va="center", transform=frame.transAxes)  # fmt: skip
        side, below = (
            (0.62, 0.55) if panel["type"] not in ("stat", "table", "piechart") else (0.1, 0.1)
        )
        if panel["type"] in ("status-history", "state-timeline"):
            side = 1.9
        inner = figure.add_axes(
            ((left + side) / wide_in, 1 - (top + high - below) / high_in,
             (wide - side - 0.15) / wide_in, (high - below - 0.42) / high_in),
            facecolor=PANEL,
        )  # fmt: skip
        inner.tick_params(colors=MUTED, labelsize=8, length=0)
        for spine in inner.spines.values():
            spine.set_visible(False)
        _DRAWN[panel["type"]](inner, panel, source)
    figure.savefig(path, dpi=110, facecolor=PAPER)


def _all(panel: Json, source: Source) -> list[tuple[str, Any, Any]]:
    return [one for target in panel["targets"] for one in source.series(target)]


def _colour(panel: Json, name: str, number: int) -> str:
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == name:
            return str(override["properties"][0]["value"]["fixedColor"])
    return PALETTE[number % len(PALETTE)]


def _by_threshold(panel: Json, value: float) -> str:
    colour = MUTED
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    return colour


def _curves(axes: Axes, panel: Json, source: Source) -> None:
    defaults, found = panel["fieldConfig"]["defaults"], _all(panel, source)
    custom, base = defaults["custom"], 0.0 * np.zeros(1)
    if "stacking" in custom and found:
        base = np.zeros(max(len(values) for _, _, values in found))
    for number, (name, time_s, values) in enumerate(found):
        colour = _colour(panel, name, number)
        if "stacking" in custom:
            values = np.nan_to_num(np.r_[np.zeros(len(base) - len(values)), values])
            time_s = np.linspace(0, source.end_s - source.begin_s, len(base))
            axes.fill_between(time_s, base, base + values, color=colour, linewidth=0, label=name)
            base = base + values
        elif custom["drawStyle"] == "bars":
            axes.bar(time_s, values, width=1.2, color=colour, label=name)
        else:
            stairs = "steps-post" if custom["lineInterpolation"] == "stepAfter" else "default"
            axes.plot(time_s, values, color=colour, linewidth=1.4, label=name, drawstyle=stairs)
    axes.set_xlim(0, source.end_s - source.begin_s)
    axes.set_ylim(defaults.get("min"), defaults.get("max"))
    axes.grid(color=GRID, linewidth=0.6)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.yaxis.set_major_formatter(lambda value, _: written(round(value, 9), unit))
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    if found:
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.08), ncols=5, fontsize=7.5, frameon=False,
            labelcolor=INK, handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip


def _figure(axes: Axes, panel: Json, source: Source) -> None:
    axes.set_axis_off()
    found = _all(panel, source)
    value = float(found[0][2][-1]) if found else math.nan
    unit, colour = panel["fieldConfig"]["defaults"]["unit"], _by_threshold(panel, value)
    if found and len(found[0][2]) > 1:
        behind = axes.inset_axes((0, 0, 1, 0.45))
        behind.fill_between(
            found[0][1], found[0][2], np.nanmin(found[0][2]), color=colour, alpha=0.3
        )
        behind.set_axis_off()
    axes.text(0.5, 0.62, written(value, unit), color=colour, fontsize=20, ha="center", va="center")


def _table(axes: Axes, panel: Json, source: Source) -> None:
    axes.set_axis_off()
    names = panel["transformations"][1]["options"]["renameByName"]
    rows = [source.series(target) for target in panel["targets"]]
    shown = [f"{one[0][2][-1]:.3g}" if one else "" for one in rows]
    heads = ["job", *names.values()]
    for column, (head, value) in enumerate(zip(heads, [source._job, *shown], strict=True)):
        axes.text(0.01 + column / len(heads), 0.9, head, color=MUTED, fontsize=9)
        axes.text(0.01 + column / len(heads), 0.72, value, color=INK, fontsize=10)


def _pie(axes: Axes, panel: Json, source: Source) -> None:
    found = [(name, values[-1]) for name, _, values in _all(panel, source) if values[-1] > 0]
    total = sum(value for _, value in found)
    colours = [_colour(panel, name, number) for number, (name, _) in enumerate(found)]
    labels = [f"{name} {value / total:.1%}" for name, value in found]
    wedges = axes.pie([value for _, value in found], colors=colours, startangle=90,
                      wedgeprops={"width": 0.42}, center=(0, 0.3), radius=0.85)[0]  # fmt: skip
    axes.legend(wedges, labels, loc="lower center", ncols=2, fontsize=8, frameon=False,
                labelcolor=INK, bbox_to_anchor=(0.5, -0.08))  # fmt: skip


def _states(axes: Axes, panel: Json, source: Source) -> None:
    found = sorted(_all(panel, source), key=lambda one: [len(one[0]), one[0]])
    for row, (_, time_s, values) in enumerate(found):
        for at_s, until_s, value in zip(time_s, [*time_s[1:], time_s[-1] + 1], values, strict=True):
            colour = _by_threshold(panel, float(value))
            axes.barh(
                row, min(until_s - at_s, 3.0), left=at_s, height=0.82, color=colour, linewidth=0
            )
    axes.set_yticks(range(len(found)), [name for name, _, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, source.end_s - source.begin_s)


def _heat(axes: Axes, panel: Json, source: Source) -> None:
    found = {float(name): values for name, _, values in _all(panel, source) if name != "+Inf"}
    bounds = sorted(found)
    num = min(map(len, found.values()))
    cells = np.diff(np.array([found[one][-num:] for one in bounds]), axis=0, prepend=0.0)
    shown = [k for k in range(len(bounds)) if np.nanmax(cells[max(0, k - 1) : k + 2]) > 0]
    cells, bounds = cells[shown], [bounds[k] for k in shown]
    colours = LinearSegmentedColormap.from_list("o", [PANEL, "#7a3b12", "#ef843c", "#ffe0b2"])
    edges_s = np.linspace(0, source.end_s - source.begin_s, num + 1)
    axes.pcolormesh(edges_s, np.arange(len(bounds) + 1), cells, cmap=colours)
    axes.set_yticks(np.arange(len(bounds)) + 1, [written(one, "s") for one in bounds])


_DRAWN = {
    "timeseries": _curves,
    "stat": _figure,
    "table": _table,
    "piechart": _pie,
    "status-history": _states,
    "state-timeline": _states,
    "heatmap": _heat,
}


def main(words: Sequence[str]) -> int:
    """Draw the dashboards that have data of a job in the last hour, as long as it was scraped."""
    url, job, folder = words
    source = Source(url, job, time.time() - 3600, time.time())
    for dashboard in all_dashboards():
        metric = re.findall(r"label_values\((\w+), job\)", json.dumps(dashboard["templating"]))[0]
        seen = source.series({"expr": f'max({metric}{{job=~"$job"}})', "legendFormat": ""})
        if not seen:
            continue  # of serving, where it is a job that trains
        _, time_s, _ = seen[0]
        whole = Source(url, job, source.begin_s + time_s[0], source.begin_s + time_s[-1])
        draw(dashboard, whole, Path(folder) / f"dashboard-{dashboard['uid']}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
