"""An evaluation as a table in Markdown. Only words and numbers that the evaluation holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

JSON = dict[str, Any]


def render(found: JSON) -> str:
    """The table, what is behind it, and the router's accuracy."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: JSON) -> Iterator[str]:
    names = list(next(iter(found["arms"].values()))["measures"])
    yield f"# {found['name']}\n"
    yield (
        f"{len(found['seeds'])} seed(s) of training; mean and, from two seeds on, 90 % interval."
        f" Test data: {found['test']}. Lower is better: {found['headline']}."
    )
    if not found["is_test_apart"]:
        yield "The policy was chosen on these same rows: `evaluation.test` names others."
    yield ""
    yield "| arm | " + " | ".join(names) + " | experts a call | MFLOP a call | |"
    yield "|---" * (len(names) + 4) + "|"
    for name, arm in found["arms"].items():
        cells = [_cell(arm["measures"][one]) for one in names]
        shown = f"{name} (null)" if arm["is_null"] else name
        yield (
            f"| {shown} | {' | '.join(cells)} | {arm['experts_per_call']:.2f} |"
            f" {arm['inference_flops'] / 1e6:.2f} | {arm['about']} |"
        )
    for name, bar in found.get("bars", {}).items():
        cells = [f"{bar[one]:.3f}" if one in bar else "" for one in names]
        yield f"| *{name}* | {' | '.join(cells)} | | | needs no network |"
    yield "\nOn validation data: " + ", ".join(
        f"{name} {value:.3f}" for name, value in found["validation"].items()
    )
    yield f"\nChosen there: `{found['selection']}`\n"
    yield "Training, in GFLOP: " + ", ".join(
        f"{name} {value / 1e9:,.0f}" for name, value in found["training_flops"].items()
    )
    if "router" in found:
        yield f"\nThe judge is right on {found['judge_accuracy']:.1%} of the test images.\n"
        yield "| t | router right | posterior of the training images right | its top 1 |"
        yield "|---|---|---|---|"
        for row in found["router"]["rows"]:
            yield (
                f"| {row['t']} | {row['accuracy']:.3f} | {row['ceiling']:.3f} |"
                f" {row['top_1']:.3f} |"
            )


def _cell(measure: JSON) -> str:
    if measure["low"] == measure["high"]:
        return f"{measure['mean']:.3f}"
    return f"{measure['mean']:.3f} [{measure['low']:.3f}, {measure['high']:.3f}]"
