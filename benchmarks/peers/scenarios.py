"""What happens in a run, and when: phases one after the other, each with at most one fault.

Only describes; seconds are the same for every system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.peers.faults import Fault, Kill, KillEvery, Notice, Slow, SlowAtRandom, Stop

VICTIM, SECOND = 1, 2
FINE, EXAMPLE, CHECKPOINTS = "ours-fine", "torchft", "torchrun"
STOP_S = 30.0
STORM_PAUSE_S, STORM_S = 30.0, 90.0
SLOWED, RANDOM_SHARE = 0.5, 0.2
GRACE_S = 5.0
SLOT_S: Mapping[str, float] = {"small": 0.15, "10m": 1.0, "100m": 5.0}
"""How long a random worker is frozen at once: about a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a run."""

    name: str
    title: str
    lasts_s: float
    fault: Fault | Literal["join", "controller", "aggregator"] | None = None
    """What happens at its beginning."""
    limit_s: float | None = None
    """It lasts on, until the system trains with all its workers again, up to this; None: no
    longer than `lasts_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Phases of one run; it begins when the system has settled."""

    name: str
    phases: tuple[Phase, ...]
    repeats: int
    """How often the whole table runs it on each system."""
    without: tuple[str, ...] = ()
    """Systems that the whole table leaves out: another variant of them stands for both."""


CALM = Phase(name="calm", title="no fault", lasts_s=8)


def make(
    size: str, *, num_workers: int, cores: int, storm_s: float = STORM_S
) -> dict[str, Scenario]:
    """All scenarios, for a size of the model.

    Who shares a core with others runs only part of the time anyway, and loses nothing if it is
    frozen for the rest: half as fast is half of its share of the cores.
    """
    slow = Slow(worker=VICTIM, share=SLOWED * min(1.0, cores / num_workers))
    dice = SlowAtRandom(probability=RANDOM_SHARE, slot_s=SLOT_S[size])
    found = (
        Scenario(
            name="steady",
            repeats=2,
            without=(EXAMPLE, CHECKPOINTS),
            phases=(
                replace(CALM, lasts_s=12),
                Phase(
                    name="slow",
                    title="one worker half as fast",
                    lasts_s=15,
                    fault=slow,
                ),
                Phase(
                    name="random",
                    title="a random worker frozen for a step's time in 20 % of the time",
                    lasts_s=15,
                    fault=dice,
                ),
            ),
        ),
        Scenario(
            name="faults",
            repeats=2,
            phases=(
                CALM,
                Phase(
                    name="kill",
                    title="SIGKILL to one of 4",
                    lasts_s=8,
                    limit_s=90,
                    fault=Kill(workers=(VICTIM,)),
                ),
                Phase(
                    name="kill-2",
                    title="SIGKILL to 2 of 4",
                    lasts_s=8,
                    limit_s=90,
                    fault=Kill(workers=(VICTIM, SECOND)),
                ),
                Phase(
                    name="stop",
                    title=f"SIGSTOP to one for {STOP_S:.0f} s",
                    lasts_s=STOP_S + 5,
                    limit_s=90,
                    fault=Stop(worker=VICTIM, for_s=STOP_S),
                ),
            ),
        ),
        Scenario(
            name="storm",
            repeats=1,
            without=(FINE, EXAMPLE),
            phases=(
                CALM,
                Phase(
                    name="storm",
                    title=f"SIGKILL to one every {STORM_PAUSE_S:.0f} s, {storm_s:.0f} s long",
                    lasts_s=storm_s,
                    fault=KillEvery(pause_s=STORM_PAUSE_S),
                ),
            ),
        ),
        Scenario(
            name="changes",
            repeats=1,
            without=(FINE, EXAMPLE),
            phases=(
                CALM,
                Phase(
                    name="notice",
                    title=f"SIGTERM to one, SIGKILL {GRACE_S:.0f} s later",
                    lasts_s=15,
                    limit_s=90,
                    fault=Notice(worker=VICTIM, grace_s=GRACE_S),
                ),
                Phase(name="join", title="a worker joins", lasts_s=10, limit_s=60, fault="join"),
                Phase(
                    name="aggregator",
                    title="SIGKILL to who updates the parameters",
                    lasts_s=10,
                    fault="aggregator",
                ),
                Phase(
                    name="controller",
                    title="SIGKILL to the controller",
                    lasts_s=12,
                    fault="controller",
                ),
            ),
        ),
    )
    return {one.name: one for one in found}
