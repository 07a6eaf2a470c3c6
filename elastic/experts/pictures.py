"""Pictures of an evaluation: samples of each expert, the router over time, quality against cost.

Draws what it is given; computes nothing but the samples that it shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from elastic.experts.arms import Arm, of_policy, standard_arms
from elastic.experts.config import ExpertsConfig
from elastic.experts.partition import subset_folders
from elastic.experts.team import Team, load_team
from elastic.experts.testing import inputs_of, read_table
from elastic.report.picture_style import BLUE, FAINT, FONTS_AND_LINES, INK, MUTED, PALE_BLUE
from policies.routing import policy_from

matplotlib.use("Agg")
import matplotlib.pyplot as plt

JSON = dict[str, Any]

_COLUMNS = 14
_DPI = 150
_NULL = "#d62839"


def draw(config: ExpertsConfig, found: JSON) -> list[Path]:
    """Draw what an evaluation has; the files."""
    folder = config.root / "evaluation"
    with plt.rc_context(FONTS_AND_LINES):
        paths = [_quality(found, folder / "quality.png")]
        if config.kind == "flow":
            paths.append(_samples(config, found, folder / "samples.png"))
            paths.append(_router(config, found, folder / "router.png"))
    return paths


def _quality(found: JSON, path: Path) -> Path:
    """Headline measure against operations of inference, with intervals."""
    head = found["headline"]
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    axes.set_yscale("log")
    for number, (name, arm) in enumerate(found["arms"].items()):
        measure, flops = arm["measures"][head], arm["inference_flops"] / 1e6
        colour = _NULL if arm["is_null"] else INK if name == "monolith" else BLUE
        below, above = measure["mean"] - measure["low"], measure["high"] - measure["mean"]
        axes.errorbar(
            flops, measure["mean"], yerr=[[below], [above]], fmt="o", color=colour, capsize=3
        )
        axes.annotate(
            name,
            (flops, measure["mean"]),
            (6, 4 + 11 * (number % 3 - 1)),
            textcoords="offset points",
            color=colour,
        )
    for name, bar in found.get("bars", {}).items():
        if bar[head] > 0:
            axes.axhline(bar[head], color=FAINT, zorder=0)
            axes.annotate(
                name,
                (0.995, bar[head]),
                (0, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                color=MUTED,
                fontsize=8,
            )
    axes.set_xlabel("MFLOP for one call (router and experts)")
    axes.set_ylabel(f"{head}, lower is better")
    axes.set_title("Quality against the cost of inference; red: nulls")
    return _save(figure, path)


def _samples(config: ExpertsConfig, found: JSON, path: Path) -> Path:
    """A row for each expert alone, its subset beside it; the mixture; the monolith."""
    team = load_team(config, config.seeds[0])
    arms = standard_arms(
        policy_from(found["selection"]),
        with_monolith=config.monolith,
        with_random=config.random_partition,
    )
    by_name = {one.name: one for one in arms}
    rows = []
    for k, folder in enumerate(subset_folders(config)):
        real = inputs_of(config, read_table(folder))[:_COLUMNS]
        alone = _generate(config, team, by_name["oracle"], k)
        rows += [(f"subset {k}", real), (f"expert {k}", alone)]
    mixed = of_policy("chosen", policy_from(found["selection"]))
    rows.append(("chosen mix", _generate(config, team, mixed, 0)))
    if config.monolith:
        rows.append(("monolith", _generate(config, team, by_name["monolith"], 0)))
    figure, grid = plt.subplots(
        len(rows), _COLUMNS, figsize=(0.62 * _COLUMNS + 1.2, 0.66 * len(rows)), squeeze=False
    )
    for axes_row, (name, images) in zip(grid, rows, strict=True):
        for axes in axes_row:
            axes.set_axis_off()
        for axes, image in zip(axes_row, images, strict=False):
            axes.imshow(_as_picture(image), cmap="gray", vmin=-1, vmax=1)
        axes_row[0].text(
            -0.3,
            0.5,
            name,
            transform=axes_row[0].transAxes,
            ha="right",
            va="center",
            color=MUTED if name.startswith("subset") else INK,
        )
    figure.subplots_adjust(
        left=0.13, right=0.995, top=0.995, bottom=0.005, wspace=0.06, hspace=0.08
    )
    return _save(figure, path)


def _router(config: ExpertsConfig, found: JSON, path: Path) -> Path:
    """Accuracy over t; and what the router makes of each subset at each t."""
    rows = found["router"]["rows"]
    times = [row["t"] for row in rows]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1, 1.25)
    )
    left.plot(times, [row["accuracy"] for row in rows], "o-", color=BLUE, label="router")
    left.plot(
        times,
        [row["ceiling"] for row in rows],
        "s--",
        color=INK,
        label="posterior of the training images",
    )
    left.plot(times, [row["top_1"] for row in rows], ":", color=PALE_BLUE, label="router's top 1")
    num = len(rows[0]["mean_p"])
    left.axhline(1 / num, color=FAINT, zorder=0)
    left.set(ylim=(0, 1.02), xlabel="t (0 data, 1 noise)", title="How often the router is right")
    left.legend(frameon=False)
    shares = np.array([row["mean_p"] for row in rows])  # (T, K own, K answer)
    strip = shares.transpose(1, 2, 0).reshape(num * num, len(times))
    shown = right.imshow(strip, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    right.set_yticks(
        [k * num + j for k in range(num) for j in range(num)],
        [f"{k} → {j}" for k in range(num) for j in range(num)],
        fontsize=max(4, 9 - num / 2),
    )
    right.set_xticks(range(len(times)), [str(one) for one in times])
    for k in range(1, num):
        right.axhline(k * num - 0.5, color="white", linewidth=3)
    right.set(xlabel="t", ylabel="subset → expert", title="Where the router sends each subset")
    figure.colorbar(shown, ax=right, label="mean probability")
    return _save(figure, path)


def _generate(config: ExpertsConfig, team: Team, arm: Arm, k: int) -> torch.Tensor:
    noise = torch.randn(_COLUMNS, *config.data.shape, generator=torch.Generator().manual_seed(7))
    own_B = np.full(_COLUMNS, k)
    return team.generate(arm, noise, own_B, num_steps=config.evaluation.num_steps, seed=0)


def _as_picture(image: torch.Tensor) -> Any:
    """(channels, height, width) in [-1, 1] as matplotlib wants it."""
    clipped = image.clamp(-1, 1)
    return clipped[0].numpy() if len(image) == 1 else ((clipped + 1) / 2).permute(1, 2, 0).numpy()


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
