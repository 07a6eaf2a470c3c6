"""Pictures of the dashboards: each panel is drawn from what a query returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from monitoring.dashboards.catalogue import all_dashboards
from scripts.dashboard_pictures import Source, draw, written

LABELS = ("0.1", "0.5", "1.0", "productive", "worker 3")


class MadeUp(Source):
    """Some series for every query."""

    def __init__(self) -> None:
        super().__init__("http://nowhere", "job", 0.0, 60.0)

    def series(self, target: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        time_s = np.arange(0.0, 60.0)
        names = LABELS[:3] if target["legendFormat"] == "{{le}}" else LABELS
        return [(name, time_s, 1.5 + k + np.sin(time_s / 9)) for k, name in enumerate(names)]


@pytest.mark.parametrize("dashboard", all_dashboards(), ids=lambda one: one["uid"])
def test_every_panel_is_drawn(dashboard: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    draw(dashboard, MadeUp(), path)
    colours = np.unique(imread(path).reshape(-1, 4).round(1), axis=0)
    assert len(colours) > 20


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.934, "percentunit", "93.4 %"), (0.12, "s", "120 ms"), (3.0, "s", "3.0 s"),
        (4.25, "ops", "4.25/s"), (1.5e6, "Bps", "1.50 MB/s"), (1234.0, "short", "1,234"),
        (float("nan"), "s", "no data"),
    ],
)  # fmt: skip
def test_numbers_are_written_with_their_units(value: float, unit: str, text: str) -> None:
    assert written(value, unit) == text
