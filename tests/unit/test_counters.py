"""Counters of links and hosts: what came about in between, from both ends, whatever is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.host_counters import READ_S, HostCounters
from elastic.core.protocol.messages import GpuCount, HostCount, LinkCount, Pulse
from monitoring.counters import Counters


def pulse(node: int, *links: LinkCount, host: HostCount | None = None) -> Pulse:
    return Pulse(node, 0, links=links, host=host)


def test_a_link_is_what_both_its_ends_say_since_the_last_look() -> None:
    counters = Counters()
    assert counters.transfers() is None
    counters.take(pulse(0, LinkCount(1, 100, 1.0, 0.5, 0.25)))
    counters.take(pulse(1, LinkCount(0, 900, 2.0, 0.0, 0.125)))
    counters.transfers()
    counters.take(pulse(0, LinkCount(1, 300, 1.5, 0.75, 0.25)))
    counters.take(pulse(1, LinkCount(0, 1000, 4.0, 0.0, 0.625)))
    found = counters.transfers()
    assert found is not None
    pairs = list(zip(found.sender_L.tolist(), found.receiver_L.tolist(), strict=True))
    assert pairs == [(0, 1), (1, 0)]
    assert found.bytes_L.tolist() == [200, 100]
    assert found.took_s_L.tolist() == [0.5, 2.0]
    assert found.send_wait_s_L.tolist() == [0.25, 0.0]
    assert found.receive_wait_s_L.tolist() == [0.5, 0.0]
    again = counters.transfers()
    assert again is not None
    assert again.bytes_L.tolist() == [0, 0]


def test_a_new_connection_counts_from_nothing() -> None:
    counters = Counters()
    counters.take(pulse(0, LinkCount(1, 100, 1.0, 0.5, 0.5)))
    counters.transfers()
    counters.take(pulse(0, LinkCount(1, 40, 0.25)))
    found = counters.transfers()
    assert found is not None
    assert (found.bytes_L.tolist(), found.took_s_L.tolist()) == ([40], [0.25])


def test_without_links_nothing_is_said_of_any() -> None:
    counters = Counters()
    counters.take(pulse(0))
    assert counters.transfers() is None


def test_a_host_is_told_in_shares_of_its_own_time() -> None:
    counters = Counters()
    counters.take(pulse(2, host=HostCount(10.0, 1.0, 0.0, 5.0, 3)))
    assert counters.hosts() is None
    counters.take(pulse(2, host=HostCount(12.0, 2.0, 0.5, 5.0, 4)))
    found = counters.hosts()
    assert found is not None
    assert found.node_N.tolist() == [2]
    assert (found.steal_N[0], found.memory_N[0], found.disk_N[0]) == (0.5, 0.25, 0.0)
    assert found.out_of_memory_kills_N.tolist() == [1]
    assert counters.hosts() is None


def with_cards(at_s: float, *gpus: GpuCount) -> Pulse:
    return Pulse(2, 0, host=HostCount(at_s, 0.0, 0.0, 0.0, 0), gpus=gpus)


def test_of_the_cards_of_a_host_the_one_that_is_held_back_most_counts_and_every_fault() -> None:
    counters = Counters()
    counters.take(with_cards(10.0, GpuCount(0, 10.0, throttled_s=1.0), GpuCount(1, 10.0)))
    counters.take(with_cards(11.0, GpuCount(0, 11.0, throttled_s=1.0), GpuCount(1, 11.0)))
    found = counters.hosts()
    assert found is not None
    assert (found.throttled_N.tolist(), found.card_faults_N.tolist()) == ([0.0], [0])
    hot = GpuCount(0, 13.0, throttled_s=1.5, ecc_errors=2, faults=1)
    counters.take(with_cards(12.5, hot, GpuCount(1, 13.0, throttled_s=0.1)))
    found = counters.hosts()
    assert found is not None
    assert (found.throttled_N.tolist(), found.card_faults_N.tolist()) == ([0.25], [3])
    counters.take(with_cards(13.0, hot))
    found = counters.hosts()
    assert found is not None
    assert found.throttled_N.tolist() == [0.25], "it was not read since: it is as it was"
    assert found.card_faults_N.tolist() == [0]
    counters.take(with_cards(14.0, hot._replace(at_s=14.0, ecc_errors=0)))
    found = counters.hosts()
    assert found is not None
    assert (found.throttled_N.tolist(), found.card_faults_N.tolist()) == ([0.0], [0])


def test_the_kernel_is_asked_now_and_then(tmp_path: Path) -> None:
    now_s = [5.0]
    (tmp_path / "pressure").mkdir()
    (tmp_path / "stat").write_text("cpu  1 2 3 4 5 6 7 800 0 0\ncpu0 1\n")
    (tmp_path / "pressure" / "memory").write_text("some avg10=0.0 total=2500000\nfull total=9\n")
    (tmp_path / "vmstat").write_text("nr_dirty 7\noom_kill 2\n")
    host = HostCounters(tmp_path, clock=lambda: now_s[0])
    first = host.read()
    assert first.steal_s > 0
    assert (first.memory_s, first.disk_s, first.kills) == (2.5, 0.0, 2), "there is no pressure/io"
    (tmp_path / "vmstat").write_text("oom_kill 3\n")
    assert host.read().kills == 2
    now_s[0] += READ_S
    assert host.read().kills == 3


def test_this_kernel_tells() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("no Linux")
    assert HostCounters().read().at_s > 0
