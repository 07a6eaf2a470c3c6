"""Hosts in namespaces, without Ray: what each has for itself, and what can be done to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.hosts import (
    NAMESPACES,
    Direction,
    Host,
    HostError,
    hosts_of,
    make_switch,
    remove_all,
    why_impossible,
)
from tests.integration.support import wait_until

REASON = why_impossible()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(60)]

NETWORK = f"hosts{os.getpid()}"
NUM_BYTES = 2 * 2**20
LINE_RATE, RATE_BYTES_PER_S = "32mbit", 4_000_000
BURST_BYTES = 256 * 1024
SLOW_S = (NUM_BYTES - 2 * BURST_BYTES) / RATE_BYTES_PER_S

SERVE = f"""
import socket
with socket.create_server((ADDRESS, 5000)) as server:
    print("ready", flush=True)
    while True:
        client, _ = server.accept()
        with client:
            if client.recv(1) == b"d":
                client.sendall(bytes({NUM_BYTES}))
            else:
                while client.recv(1 << 16):
                    pass
"""
DOWNLOAD = f"""
import socket, time
with socket.create_connection((ADDRESS, 5000), timeout=WAIT_S) as link:
    begin_s = time.monotonic()
    link.sendall(b"d")
    missing = {NUM_BYTES}
    while missing:
        missing -= len(link.recv(1 << 20))
print(time.monotonic() - begin_s)
"""
UPLOAD = f"""
import socket, time
with socket.create_connection((ADDRESS, 5000), timeout=WAIT_S) as link:
    begin_s = time.monotonic()
    link.sendall(b"u" + bytes({NUM_BYTES}))
    link.shutdown(socket.SHUT_WR)
    assert link.recv(1) == b""
print(time.monotonic() - begin_s)
"""
HANG = """
import socket
with socket.create_connection((ADDRESS, 5000), timeout=WAIT_S) as link:
    print("ready", flush=True)
    try:
        print("read", link.recv(1))
    except ConnectionResetError:
        print("read", b"")
"""
LEFT_BEHIND = "setsid sleep 1000 >/dev/null 2>&1"
COUNT = "while :; do echo; sleep 0.01; done"


@pytest.fixture
def disk(tmp_path: Path) -> Callable[[Host], Path]:
    return lambda host: tmp_path / host.network / host.name / "ray"


@pytest.fixture
def hosts(disk: Callable[[Host], Path]) -> Iterator[tuple[Host, Host]]:
    """Two hosts that are up."""
    with network(NETWORK, disk) as made:
        yield made


@contextmanager
def network(name: str, disk: Callable[[Host], Path]) -> Iterator[tuple[Host, Host]]:
    try:
        make_switch(name)
        first, second = Host(name, 1), Host(name, 2)
        for host in (first, second):
            host.plug_in()
            host.boot(disk(host))
        yield first, second
    finally:
        remove_all(name)


def run(host: Host, *words: str) -> str:
    return subprocess.run(
        host.command(*words), check=True, capture_output=True, text=True, timeout=30
    ).stdout


def python(host: Host, code: str, peer: Host, wait_s: float = 20) -> list[str]:
    """A command line that runs `code` on `host`, which talks to `peer`."""
    given = f"ADDRESS, WAIT_S = {peer.address!r}, {wait_s}\n"
    return host.command(sys.executable, "-c", given + code)


@contextmanager
def running(
    command: list[str], *, start_new_session: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it is ready."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=start_new_session
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def server(hosts: tuple[Host, Host]) -> Iterator[Host]:
    """The second host, where something answers; it ends with the host."""
    _, second = hosts
    with running(python(second, SERVE, second)):
        yield second
        second.kill()


def reaches(host: Host, peer: Host) -> bool:
    command = python(host, DOWNLOAD, peer, wait_s=0.3)
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_host_has_its_own(hosts: tuple[Host, Host], disk: Callable[[Host], Path]) -> None:
    first, second = hosts
    file = f"{NETWORK}-file"
    run(first, "touch", f"/dev/shm/{file}", "/tmp/ray/logged")
    assert run(first, "ls", "/dev/shm").split() == [file]
    assert run(second, "ls", "/dev/shm", "/tmp/ray").split() == ["/dev/shm:", "/tmp/ray:"]
    assert not Path("/dev/shm", file).exists()
    assert (first.root / "dev/shm" / file).exists()
    assert (disk(first) / "logged").exists()
    assert run(first, "hostname") == "h1\n"
    assert len(re.findall(r"^\d+$", run(first, "ls", "/proc"), re.M)) == 2  # `sleep` and `ls`
    assert run(first, "pwd").strip() == os.getcwd()
    assert {one.name for one in first.processes() if one.own_pid} == {"sleep"}


def test_who_ends_on_a_host_leaves_no_zombie(hosts: tuple[Host, Host]) -> None:
    first, _ = hosts
    run(first, "sh", "-c", "setsid true & setsid true &")
    states = f"cat /proc/[0-9]*/stat > /dev/shm/{NETWORK}"
    run(first, "sh", "-c", states)
    assert ") Z " not in run(first, "cat", f"/dev/shm/{NETWORK}")


def test_a_command_ends_as_if_it_ran_here(hosts: tuple[Host, Host]) -> None:
    """Its exit status, and what a signal does to it: Ctrl-C reaches the whole group."""
    first, _ = hosts
    assert subprocess.run(first.command("sh", "-c", "exit 3")).returncode == 3
    asked = "trap 'echo asked; kill $!; exit 4' INT; echo ready; sleep 1000 >/dev/null & wait"
    with running(first.command("sh", "-c", asked), start_new_session=True) as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=10)[0] == "asked\n"
        assert process.returncode == 4
    with running(first.command("sh", "-c", "echo ready; exec sleep 1000")) as process:
        process.kill()
        wait_until(lambda: len(first.processes()) == 2, "what it ran ends, too", timeout_s=10)


def test_a_cut_host_is_not_reached(hosts: tuple[Host, Host], server: Host) -> None:
    first, second = hosts
    assert reaches(first, server)
    second.cut()
    assert second.is_cut
    assert not first.is_cut
    assert not reaches(first, server)
    assert reaches(second, server), "a host reaches itself without a cable"
    second.join()
    assert not second.is_cut
    wait_until(lambda: reaches(first, server), "the host is back", timeout_s=10)


@pytest.mark.parametrize("slowed", [0, 1], ids=["client", "server"])
@pytest.mark.parametrize("code", [DOWNLOAD, UPLOAD], ids=["download", "upload"])
def test_a_slow_link_is_slow_both_ways(
    hosts: tuple[Host, Host], server: Host, slowed: int, code: str
) -> None:
    first, _ = hosts
    hosts[slowed].slow(LINE_RATE)
    assert hosts[slowed].rate_bytes_per_s == RATE_BYTES_PER_S
    assert takes_s(first, server, code) > SLOW_S
    hosts[slowed].fast()
    assert hosts[slowed].rate_bytes_per_s is None
    assert takes_s(first, server, code) < SLOW_S


def takes_s(host: Host, server: Host, code: str) -> float:
    command = python(host, code, server)
    return float(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_link_may_be_slow_in_one_direction(
    hosts: tuple[Host, Host], server: Host, direction: Direction
) -> None:
    first, _ = hosts
    slow, fast = (DOWNLOAD, UPLOAD) if direction == "out" else (UPLOAD, DOWNLOAD)
    server.slow(LINE_RATE, direction)
    assert server.rate_bytes_per_s == RATE_BYTES_PER_S
    assert takes_s(first, server, slow) > SLOW_S
    assert takes_s(first, server, fast) < SLOW_S
    server.fast()
    assert takes_s(first, server, slow) < SLOW_S


@pytest.fixture
def third(hosts: tuple[Host, Host], disk: Callable[[Host], Path]) -> Host:
    """One more host, which goes with the others."""
    host = Host(NETWORK, 3)
    host.plug_in()
    host.boot(disk(host))
    return host


@pytest.mark.parametrize("code", [DOWNLOAD, UPLOAD], ids=["download", "upload"])
def test_two_hosts_may_be_slow_to_each_other_alone(
    hosts: tuple[Host, Host], server: Host, third: Host, code: str
) -> None:
    first, _ = hosts
    with pytest.raises(HostError, match="2 horses"):
        first.slow_to(server, "2 horses")
    assert takes_s(first, server, code) < SLOW_S
    first.slow_to(server, LINE_RATE)
    assert takes_s(first, server, code) > SLOW_S
    assert takes_s(third, server, code) < SLOW_S
    server.fast_to(first)
    assert takes_s(first, server, code) < SLOW_S


def test_two_hosts_may_be_parted_alone(hosts: tuple[Host, Host], server: Host, third: Host) -> None:
    first, _ = hosts
    server.part(first)
    assert not reaches(first, server)
    assert reaches(third, server)
    server.meet(first)
    wait_until(lambda: reaches(first, server), "they meet again", timeout_s=10)


def test_a_host_may_be_shown_another_counter_than_the_kernels(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    first, second = hosts
    file = tmp_path / "vmstat"
    file.write_text("oom_kill 7\n")
    first.show("vmstat", file)
    assert run(first, "cat", "/proc/vmstat") == "oom_kill 7\n"
    file.write_text("oom_kill 8\n")
    assert run(first, "cat", "/proc/vmstat") == "oom_kill 8\n"
    assert "nr_free" in run(second, "cat", "/proc/vmstat")
    first.unshow("vmstat")
    assert "nr_free" in run(first, "cat", "/proc/vmstat")


def test_a_rate_is_checked_before_it_counts(hosts: tuple[Host, Host]) -> None:
    first, _ = hosts
    with pytest.raises(HostError, match="2 horses"):
        first.slow("2 horses")
    assert first.rate_bytes_per_s is None


def test_a_frozen_host_stands_still(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Also what was begun from outside goes on afterwards, as if nothing had been."""
    first, second = hosts
    out = tmp_path / "lines"
    count = first.command("sh", "-c", f"echo ready; {COUNT} > {out}")
    with running(count) as process:
        wait_until(lambda: out.exists() and out.stat().st_size, "it counts")
        first.freeze()
        assert first.is_frozen
        assert not second.is_frozen
        assert {one.state for one in first.processes()} == {"T"}
        counted = out.stat().st_size
        time.sleep(0.1)
        assert out.stat().st_size == counted
        first.thaw()
        assert not first.is_frozen
        wait_until(lambda: out.stat().st_size > counted, "it counts on")
        counter = min(one.pid for one in first.processes() if one.name == "sh")
        os.kill(counter, signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize("is_frozen", [False, True], ids=["running", "frozen"])
def test_a_killed_host_takes_all_with_it(
    hosts: tuple[Host, Host], server: Host, disk: Callable[[Host], Path], is_frozen: bool
) -> None:
    """Its peers read the end of their connections; it comes back with nothing in its memory."""
    first, second = hosts
    run(second, "sh", "-c", f"{LEFT_BEHIND} & touch /dev/shm/old /tmp/ray/old")
    second.slow(LINE_RATE)
    with running(python(first, HANG, server)) as peer:
        if is_frozen:
            second.freeze()
        pids = [one.pid for one in second.processes()]
        assert len(pids) >= 4
        second.kill()
        assert peer.stdout is not None
        assert peer.stdout.readline() == "read b''\n"
    assert not any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids)
    assert not second.is_up
    assert first.is_up
    for act in (second.freeze, second.thaw, lambda: second.command("true"), lambda: second.root):
        with pytest.raises(HostError, match="h2 is down"):
            act()
    second.kill()
    second.boot(disk(second))
    assert run(second, "ls", "/dev/shm", "/tmp/ray").split() == ["/dev/shm:", "/tmp/ray:", "old"]
    assert second.rate_bytes_per_s == RATE_BYTES_PER_S
    with pytest.raises(HostError, match="h2 is up already"):
        second.boot(disk(second))


def test_two_networks_do_not_meet(
    hosts: tuple[Host, Host], server: Host, disk: Callable[[Host], Path]
) -> None:
    first, _ = hosts
    with network(f"{NETWORK}x", disk) as (stranger, namesake):
        assert namesake.address == server.address
        assert not reaches(stranger, namesake)
        assert len(hosts_of(NETWORK)) == len(hosts_of(f"{NETWORK}x")) == 2
    assert hosts_of(f"{NETWORK}x") == []
    assert reaches(first, server)


def test_nothing_is_left(disk: Callable[[Host], Path]) -> None:
    """Also of a network that was made in part, and of processes that hide from the first one."""
    links = subprocess.check_output(["ip", "-o", "link"])
    with network(NETWORK, disk) as (first, second):
        run(first, "sh", "-c", f"{LEFT_BEHIND} &")
        second.kill()
        Host(NETWORK, 3).plug_in()
        pids = [one.pid for one in first.processes()]
        assert len(pids) >= 3
        assert subprocess.check_output(["ip", "-o", "link"]) == links
    assert not any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids)
    assert [path.name for path in NAMESPACES.iterdir() if NETWORK in path.name] == []
    assert NETWORK not in Path("/proc/self/mountinfo").read_text()
    remove_all(NETWORK)
    with pytest.raises(HostError, match="there is no host h1"):
        Host(NETWORK, 1).processes()
