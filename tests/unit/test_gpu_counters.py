"""What graphics cards are asked, of a small driver made up here: no card is needed."""

# ruff: noqa: N802 - names are those of the driver

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from actors.gpu_counters import HARDWARE_XIDS, READ_S, GpuCounters, GpuWatch
from elastic.core.protocol.messages import GpuCount

POWER_CAP, HOT = 4, 32
"""Reasons of a lower clock: the usual limit of power under load, and heat."""


class NotTold(Exception):
    """As the driver refuses."""


@dataclass
class Card:
    """What one says; None: it refuses."""

    gpu: int | None = 97
    used: int = 30
    celsius: int | None = 64
    milliwatts: int | None = 412_500
    reasons: int | None = POWER_CAP
    ecc: int | None = 0
    xids: deque[int] | None = field(default_factory=deque)
    is_lost: bool = False


@dataclass
class _Fields:
    """A struct of the driver."""

    gpu: int = 0
    used: int = 0
    total: int = 80
    eventData: int = 0


class FakeNvml:
    """The part of `pynvml` that is used."""

    NVMLError = NotTold
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSwThermalSlowdown = HOT
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128
    nvmlEventTypeXidCriticalError = 8
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0

    def __init__(self, cards: Sequence[Card]) -> None:
        self._cards = cards
        self._listening: dict[int, Card] = {}

    def nvmlDeviceGetCount(self) -> int:
        return len(self._cards)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> Card:
        return _told(None if self._cards[number].is_lost else self._cards[number])

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> _Fields:
        return _Fields(gpu=_told(card.gpu))

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> _Fields:
        return _Fields(used=card.used)

    def nvmlDeviceGetTemperature(self, card: Card, sensor: int) -> int:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return _told(card.celsius)

    def nvmlDeviceGetPowerUsage(self, card: Card) -> int:
        return _told(card.milliwatts)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: Card) -> int:
        return _told(card.reasons)

    def nvmlDeviceGetTotalEccErrors(self, card: Card, kind: int, since: int) -> int:
        assert (kind, since) == (1, 0)
        return _told(card.ecc)

    def nvmlEventSetCreate(self) -> int:
        return 100 + len(self._listening)

    def nvmlDeviceRegisterEvents(self, card: Card, kinds: int, events: int) -> None:
        assert kinds == self.nvmlEventTypeXidCriticalError
        _told(card.xids)
        self._listening[events] = card

    def nvmlEventSetWait_v2(self, events: int, timeout_ms: int) -> _Fields:
        assert timeout_ms == 0, "nobody waits"
        waiting = self._listening[events].xids
        if not waiting:
            raise NotTold("timeout")
        return _Fields(eventData=waiting.popleft())


def _told(value: Any) -> Any:
    if value is None:
        raise NotTold
    return value


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def test_what_a_card_says_is_told_in_base_units() -> None:
    counters = GpuCounters(FakeNvml([Card(), Card(used=7)]), Clock())
    first, second = counters.look()
    assert first == GpuCount(
        0,
        50.0,
        utilisation=0.97,
        memory_used=30,
        memory=80,
        celsius=64,
        watts=412.5,
        throttled_s=0.0,
        ecc_errors=0,
        xid=0,
        faults=0,
    )
    assert (second.number, second.memory_used) == (1, 7)


def test_time_in_which_a_card_is_held_back_adds_up() -> None:
    """By heat, not by the usual limit of power under load."""
    card, clock = Card(reasons=POWER_CAP), Clock()
    counters = GpuCounters(FakeNvml([card]), clock)
    seen = []
    for reasons in (POWER_CAP, HOT | POWER_CAP, 8, POWER_CAP, 0, 128):
        clock.now_s += 0.5
        card.reasons = reasons
        (now,) = counters.look()
        seen.append(now.throttled_s)
    assert seen == [0.0, 0.5, 1.0, 1.0, 1.0, 1.5]


def test_errors_are_told_of_the_card_that_has_them_and_a_program_s_are_no_fault() -> None:
    cards = [Card(), Card()]
    counters = GpuCounters(FakeNvml(cards), Clock())
    assert cards[1].xids is not None
    cards[1].xids.extend([31, 79, 13])
    assert {79, 48} <= HARDWARE_XIDS
    assert {13, 31, 43, 45}.isdisjoint(HARDWARE_XIDS)
    well, ill = counters.look()
    assert (well.xid, well.faults) == (0, 0)
    assert (ill.xid, ill.faults) == (13, 1)
    assert [(one.xid, one.faults) for one in counters.look()] == [(0, 0), (13, 1)]


def test_what_a_card_does_not_tell_is_none_and_a_lost_one_keeps_the_others_numbers() -> None:
    mute = Card(gpu=None, celsius=None, milliwatts=None, reasons=None, ecc=None, xids=None)
    counters = GpuCounters(FakeNvml([Card(is_lost=True), mute]), Clock())
    assert counters.look() == (GpuCount(1, 50.0, memory_used=30, memory=80),)
    assert GpuCounters(FakeNvml([]), Clock()).look() == ()


def test_a_watch_looks_until_it_is_closed() -> None:
    card = Card()
    watch = GpuWatch(GpuCounters(FakeNvml([card])))
    deadline_s = time.monotonic() + 10 * READ_S
    while not watch.newest:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    watch.close()
    watch._thread.join(10 * READ_S)
    assert not watch._thread.is_alive()


def test_the_driver_of_nvidia_has_what_is_asked_of_the_one_made_up_here() -> None:
    """Names, and their values."""
    real: ModuleType = importlib.import_module("pynvml")
    for name in dir(FakeNvml):
        if name.startswith(("nvml", "NVML_")):
            mine, theirs = getattr(FakeNvml, name), getattr(real, name)
            assert callable(theirs) == callable(mine), name
            assert callable(mine) or mine == theirs, name
    assert issubclass(real.NVMLError_Timeout, real.NVMLError)
