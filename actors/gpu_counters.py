"""What the driver of this host's graphics cards says, through NVML: load, heat, power, faults.

Read on a thread of its own, since a card that has fallen off its bus can keep a caller waiting.
What a card or its driver does not tell is None; without NVML, or without cards, there is nothing.
Judges nothing: `policies.pressure`. Makes no CUDA context.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.links import Clock
from elastic.core.protocol.messages import GpuCount

log = logging.getLogger(__name__)

T = TypeVar("T")
READ_S = 1.0
HARDWARE_XIDS = frozenset({48, 64, 74, 79, 92, 95, 119, 120})
"""Errors of the card, its memory, its links or its bus, not of the program: "Xid Catalog" of
https://docs.nvidia.com/deploy/xid-errors/"""


@dataclass(slots=True)
class _Card:
    number: int
    handle: Any
    events: Any
    at_s: float
    throttled_s: float = 0.0
    xid: int = 0
    faults: int = 0


class GpuCounters:
    """Of all cards that `nvml` (the module `pynvml`, begun by `nvmlInit`) has."""

    def __init__(self, nvml: Any, clock: Clock = time.monotonic) -> None:
        self._nvml, self._clock = nvml, clock
        self._cards: list[_Card] = []
        # by heat, power supply or a broken brake; not by the usual limit of power, nor when idle
        self._slowed = (
            nvml.nvmlClocksThrottleReasonHwSlowdown
            | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        )
        for number in range(nvml.nvmlDeviceGetCount()):
            handle = self._ask(nvml.nvmlDeviceGetHandleByIndex, number)
            if handle is not None:  # else it is lost
                events = self._ask(self._listen, handle)
                self._cards.append(_Card(number, handle, events, clock()))

    def look(self) -> tuple[GpuCount, ...]:
        """As of now. To be called again and again, by one thread: time is added up."""
        return tuple(self._look_at(card) for card in self._cards)

    def _look_at(self, card: _Card) -> GpuCount:
        nvml, now_s = self._nvml, self._clock()
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, card.handle)
        if reasons is not None and reasons & self._slowed:
            card.throttled_s += now_s - card.at_s
        card.at_s = now_s
        self._hear(card)
        load = self._ask(nvml.nvmlDeviceGetUtilizationRates, card.handle)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, card.handle)
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage, card.handle)
        sensor = nvml.NVML_TEMPERATURE_GPU
        uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        return GpuCount(
            card.number,
            now_s,
            utilisation=None if load is None else load.gpu / 100,
            memory_used=None if memory is None else int(memory.used),
            memory=None if memory is None else int(memory.total),
            celsius=self._ask(nvml.nvmlDeviceGetTemperature, card.handle, sensor),
            watts=None if power_mw is None else power_mw / 1000,
            throttled_s=None if reasons is None else card.throttled_s,
            ecc_errors=self._ask(nvml.nvmlDeviceGetTotalEccErrors, card.handle, *uncorrected),
            xid=None if card.events is None else card.xid,
            faults=card.faults,
        )

    def _listen(self, handle: Any) -> Any:
        """A set of events of its own for each card, so that it is known whose they are."""
        events = self._nvml.nvmlEventSetCreate()
        kind = self._nvml.nvmlEventTypeXidCriticalError
        self._nvml.nvmlDeviceRegisterEvents(handle, kind, events)
        return events

    def _hear(self, card: _Card) -> None:
        """Take in the errors (XID) that the driver told of since."""
        while card.events is not None:
            event = self._ask(self._nvml.nvmlEventSetWait_v2, card.events, 0)
            if event is None:  # none waits
                return
            card.xid = int(event.eventData)
            card.faults += card.xid in HARDWARE_XIDS

    def _ask(self, function: Callable[..., T], *given: Any) -> T | None:
        """None: this card or driver does not tell."""
        try:
            return function(*given)
        except self._nvml.NVMLError:
            return None


class GpuWatch:
    """Looks every `READ_S`, until it is closed. `newest` is replaced, never changed."""

    def __init__(self, counters: GpuCounters) -> None:
        self._counters = counters
        self._ended = threading.Event()
        self.newest: tuple[GpuCount, ...] = ()
        self._thread = threading.Thread(target=self._loop, name="gpus", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while True:
            self.newest = self._counters.look()
            if self._ended.wait(READ_S):
                return

    def close(self) -> None:
        """Nobody waits for a card that does not answer."""
        self._ended.set()


def watch_gpus() -> GpuWatch | None:
    """Of this host; None: it has no cards, or nothing to ask them with (`pip install
    elastic[gpu]`)."""
    with contextlib.suppress(ImportError):
        import pynvml

        try:
            pynvml.nvmlInit()
            return GpuWatch(GpuCounters(pynvml))
        except pynvml.NVMLError as error:
            log.warning("nothing is told of graphics cards: NVML: %s", error)
    return None
