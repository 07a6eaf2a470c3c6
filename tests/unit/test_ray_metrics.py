"""Metrics for Ray's own scrape: counters by what is new, gauges as they are, each with its job."""

from __future__ import annotations

from typing import Any

from actors.ray_metrics import RayMetrics
from elastic.core.status import Status
from monitoring.exporter import values_of
from monitoring.tally import Now, Tally

STEP = {
    "step": 0, "time_s": 9.0, "step_s": 0.5, "samples": 32, "num_duplicates": 1, "attempt": 0,
    "loss": 2.5, "grad_norm": 1.0,
}  # fmt: skip


class Instruments:
    """In place of `ray.util.metrics`: remembers what it is told."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[str, ...]], float] = {}
        instruments = self

        class Instrument:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
                self.name, self.tag_keys = name, tag_keys
                assert description

            def key(self, tags: dict[str, str]) -> tuple[str, tuple[str, ...]]:
                assert set(tags) == set(self.tag_keys)
                return self.name, tuple(tags.values())

        class Counter(Instrument):
            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert value > 0
                key = self.key(tags)
                instruments.values[key] = instruments.values.get(key, 0.0) + value

        class Gauge(Instrument):
            def set(self, value: float, tags: dict[str, str]) -> None:
                instruments.values[self.key(tags)] = value

        self.Counter: Any = Counter
        self.Gauge: Any = Gauge


def test_counters_go_up_by_what_is_new_and_gauges_are_set() -> None:
    tally, instruments = Tally({}), Instruments()
    bridge = RayMetrics("j", instruments)
    status = Status(phase="training", num_steps=9, run_dir="r", num_workers=3)
    now = Now(status=status, node_of={}, replicas=1, replicas_wanted=1)
    for step in range(3):
        line = {**STEP, "step": step, "time_s": 9.0 + step}
        tally.take(steps=[line], events=[], evaluations=[])
        bridge.tell(values_of(tally, now))
    told = instruments.values
    assert told["elastic_steps", ("j",)] == 3
    assert told["elastic_samples", ("j",)] == 96
    assert told["elastic_step_seconds_sum", ("j",)] == 1.5
    assert told["elastic_step_seconds_count", ("j",)] == 3
    assert told["elastic_loss", ("j",)] == 2.5
    assert told["elastic_workers", ("j", "computing")] == 3
    assert not any(name.startswith(("elastic_pace", "elastic_info")) for name, _ in told)
