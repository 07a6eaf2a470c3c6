"""Experts live together unless they do not fit, or calls at once save more than hops cost."""

from __future__ import annotations

from dataclasses import replace

from policies.placing import PlacingView, decide

VIEW = PlacingView(
    call_s=0.001, num_asked=2, hop_s=0.006, experts_bytes=10, memory_bytes=100, num_cpus=4
)


def test_small_experts_live_together() -> None:
    assert decide(VIEW).mode == "colocated"
    assert "2.0 ms together, 7.0 ms apart" in decide(VIEW).reason


def test_long_calls_are_made_at_once_where_there_are_cores() -> None:
    long = replace(VIEW, call_s=0.1)
    assert decide(long).mode == "distributed"
    assert decide(replace(long, num_asked=1)).mode == "colocated"
    assert decide(replace(long, num_cpus=1)).mode == "colocated"


def test_experts_that_do_not_fit_live_apart() -> None:
    assert decide(replace(VIEW, experts_bytes=101)).mode == "distributed"
