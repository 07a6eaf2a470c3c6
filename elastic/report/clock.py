"""One time axis for a run that was stopped and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

RESUME_GAP_S = 1.0
"""A pause between a run's end and its resuming is drawn this long."""


class Clock:
    """From unix time to seconds since the start, with the pauses before resumes cut out."""

    def __init__(
        self, metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
    ) -> None:
        times = np.sort(
            [float(line["time_s"]) for line in metrics]
            + [float(event["time_s"]) for event in events]
        )
        first_s = float(metrics[0]["time_s"]) - float(metrics[0]["step_s"])
        since, offsets = [min(float(times[0]), first_s)], [min(float(times[0]), first_s)]
        for event in events:
            if event["kind"] != "job_resumed":
                continue
            resumed_s = float(event["time_s"])
            num_earlier = int(np.searchsorted(times, resumed_s))
            pause_s = resumed_s - times[num_earlier - 1] - RESUME_GAP_S if num_earlier else 0.0
            since.append(resumed_s)
            offsets.append(offsets[-1] + max(0.0, float(pause_s)))
        self._since, self._offsets = np.array(since), np.array(offsets)

    @property
    def start_s(self) -> float:
        """The unix time at which the axis begins."""
        return float(self._since[0])

    def __call__(self, time_s: float) -> float:
        return float(self.seconds([time_s])[0])

    def seconds(self, times_s: Sequence[float]) -> npt.NDArray[np.float64]:
        """Many unix times at once, in any order."""
        times = np.asarray(times_s, dtype=np.float64)
        part = np.searchsorted(self._since, times, side="right") - 1
        moved: npt.NDArray[np.float64] = times - self._offsets[np.maximum(part, 0)]
        return moved
