"""Hosts on one machine: namespaces joined by a switch, to be cut off, slowed, frozen and killed.

A host has its own network, processes, name, /dev/shm and /tmp/ray; other files are the machine's.
Several networks of hosts do not see each other, nor the machine's own network. Needs root. Nothing
is remembered here: what there is and how it is doing is read from the kernel. Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

NAMESPACES = Path("/run/netns")
PROC = Path("/proc")
PREFIX = "elastic"
NEEDS_ROOT = "hosts are made of namespaces, which needs root: run it with sudo"
_BURST, _LATENCY = "256kb", "50ms"
_DEADLINE_S = 20.0
_STOPPED, _WAITING, _GONE = "T", "D", "ZX"

_PROBE = (
    "ip link add bridge type bridge && ip link add h1 type veth peer name eth0"
    f" && tc qdisc add dev h1 root tbf rate 1mbit burst {_BURST} latency {_LATENCY}"
)
_NOBODY = "02:00:00:00:00:99"
"""The address of a card that there is not."""

Direction = Literal["both", "out", "in"]
"""Of a host's link: what it sends, what it receives."""

_KEEPER = "sleep"
"""The first process of a host; while it lives, the host is up. Others that are orphaned become its
children, and vanish when they end, since it ignores SIGCHLD."""

_BOOT = (
    'mount -t tmpfs tmpfs /dev/shm && mkdir -p /tmp/ray && mount --bind "$1" /tmp/ray'
    ' && hostname "$2" && exec env --ignore-signal=CHLD ' + _KEEPER + " infinity"
)


class HostError(Exception):
    """A host cannot be made, or not be what it is asked to be."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process on a host, by its pid on the machine."""

    pid: int
    name: str
    state: str
    """A letter, as in /proc/PID/stat."""
    own_pid: int | None
    """On the host. None: it stands at the door (`nsenter`), waiting for one inside."""


@dataclass(frozen=True, slots=True)
class Host:
    """One host of a network. That it can be named does not mean that it exists."""

    network: str
    number: int
    """From 1."""

    @property
    def name(self) -> str:
        return f"h{self.number}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def namespace(self) -> str:
        return f"{PREFIX}-{self.network}-{self.name}"

    @property
    def switch(self) -> str:
        return _switch(self.network)

    def plug_in(self) -> None:
        """Make its network card and the cable to the switch."""
        _call("ip", "netns", "add", self.namespace)
        peer = ("peer", "name", "eth0", "netns", self.namespace)
        _call("ip", "-n", self.switch, "link", "add", self.name, "type", "veth", *peer)
        _call("ip", "-n", self.switch, "link", "set", self.name, "master", "bridge", "up")
        _call("ip", "-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for card in ("lo", "eth0"):
            _call("ip", "-n", self.namespace, "link", "set", card, "up")

    def boot(self, disk: Path) -> None:
        """Switch it on, with empty shared memory. `disk`, a folder, is its /tmp/ray.

        Raises:
            HostError: it is up already, or does not come up.
        """
        if self.is_up:
            raise HostError(f"{self.name} is up already")
        disk.mkdir(parents=True, exist_ok=True)
        log = disk.parent / f"{self.name}.log"
        door = ("nsenter", f"--net={NAMESPACES / self.namespace}")
        apart = ("unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc")
        with log.open("w") as file:
            subprocess.run(
                ["setsid", "--fork", *door, *apart, "sh", "-c", _BOOT, "sh", disk, self.name],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                check=True,
            )
        _wait(lambda: self.is_up, lambda: f"{self.name} does not come up: {log.read_text()}")

    def processes(self) -> list[Process]:
        """Those on the host, and those that stand at its door."""
        try:
            inode = (NAMESPACES / self.namespace).stat().st_ino
        except FileNotFoundError:
            raise HostError(f"there is no host {self.name}") from None
        return list(_processes(inode))

    def _keeper(self) -> Process | None:
        found = (one for one in self.processes() if one.own_pid == 1 and one.name == _KEEPER)
        return next(found, None)

    @property
    def is_up(self) -> bool:
        return self._keeper() is not None

    @property
    def is_frozen(self) -> bool:
        keeper = self._keeper()
        return keeper is not None and keeper.state == _STOPPED

    @property
    def is_cut(self) -> bool:
        return (
            "UP" not in json.loads(self._on_switch("ip", "-j", "link", "show", "dev"))[0]["flags"]
        )

    @property
    def rate_bytes_per_s(self) -> int | None:
        """What `slow` set for its link, in the slower direction; None: as fast as the machine."""
        shown = [
            json.loads(_call("tc", "-n", where, "-j", "qdisc", "show", "dev", card))[0]
            for where, card in self._cards("both")
        ]
        rates = [int(one["options"]["rate"]) for one in shown if one["kind"] == "tbf"]
        return min(rates, default=None)

    @property
    def root(self) -> Path:
        """Its files, seen from the machine: `host.root / "dev/shm"` is its own.

        Raises:
            HostError: it is down.
        """
        return PROC / str(self._up().pid) / "root"

    def _up(self) -> Process:
        keeper = self._keeper()
        if keeper is None:
            raise HostError(f"{self.name} is down")
        return keeper

    def command(self, *words: str) -> list[str]:
        """A command line for the machine that runs `words` on the host, in the folder at hand.

        Killed, it kills what it runs. Ctrl-C, which reaches both, is left to what it runs.

        Raises:
            HostError: it is down.
        """
        spaces = (f"--target={self._up().pid}", "--net", "--pid", "--mount", "--uts")
        door = ("env", "--ignore-signal=INT", "nsenter", *spaces)
        inside = ("env", "--default-signal=INT", f"--chdir={Path.cwd()}")
        return [*door, "setpriv", "--pdeathsig=KILL", *inside, *words]

    def cut(self) -> None:
        """Pull its cable out of the switch: what is sent gets lost, and nobody is told."""
        self._on_switch("ip", "link", "set", "down", "dev")

    def join(self) -> None:
        """Plug the cable in again."""
        self._on_switch("ip", "link", "set", "up", "dev")

    def slow(self, rate: str, direction: Direction = "both") -> None:
        """Limit its link. `rate` is in the words of `tc`: 200mbit, 1gbit.

        Raises:
            HostError: `tc` does not take the rate.
        """
        for namespace, card in self._cards(direction):
            _limit(namespace, card, rate)

    def fast(self) -> None:
        """Take the limit away."""
        for namespace, card in self._cards("both"):
            _call("tc", "-n", namespace, "qdisc", "replace", "dev", card, "root", "noqueue")

    def _cards(self, direction: Direction) -> list[tuple[str, str]]:
        """Where what it sends, and what it receives, goes through: namespace and card."""
        cards = {"out": (self.namespace, "eth0"), "in": (self.switch, self.name)}
        return [cards[direction]] if direction in cards else list(cards.values())

    def slow_to(self, other: Host, rate: str) -> None:
        """Limit what goes between it and another host, in both directions, and nothing else: it
        goes over a cable of their own from now on.

        Raises:
            HostError: `tc` does not take the rate, or they have such a cable.
        """
        ends = ((self, other), (other, self))
        peer = ("peer", "name", f"to-{self.name}", "netns", other.namespace)
        card = f"to-{other.name}"
        _call("ip", "-n", self.namespace, "link", "add", card, "type", "veth", *peer)
        try:
            for one, to in ends:
                _limit(one.namespace, f"to-{to.name}", rate)
                _call("ip", "-n", one.namespace, "link", "set", f"to-{to.name}", "up")
        except HostError:
            self.fast_to(other)
            raise
        for one, to in ends:
            way = (to.address, "dev", f"to-{to.name}", "src", one.address)
            _call("ip", "-n", one.namespace, "route", "add", *way)

    def fast_to(self, other: Host) -> None:
        """Take that cable away: what goes between them takes the switch again."""
        _call("ip", "-n", self.namespace, "link", "delete", f"to-{other.name}")

    def part(self, other: Host) -> None:
        """Neither of the two reaches the other any more, and both reach all others: what they send
        each other goes to nobody, and nobody is told."""
        for one, to in ((self, other), (other, self)):
            where = (to.address, "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")
            _call("ip", "-n", one.namespace, "neighbour", "replace", *where)

    def meet(self, other: Host) -> None:
        """They reach each other again."""
        for one, to in ((self, other), (other, self)):
            _call("ip", "-n", one.namespace, "neighbour", "delete", to.address, "dev", "eth0")

    def show(self, name: str, file: Path) -> None:
        """Have its processes read `file` where they look for /proc/NAME, until `unshow`."""
        _call(*self.command("mount", "--bind", str(file.resolve()), f"/proc/{name}"))

    def unshow(self, name: str) -> None:
        """They read there what the kernel says."""
        _call(*self.command("umount", f"/proc/{name}"))

    def _on_switch(self, tool: str, *words: str) -> str:
        return _call(tool, "-n", self.switch, *words, self.name)

    def freeze(self) -> None:
        """SIGSTOP all its processes; the kernel goes on answering for them.

        Raises:
            HostError: it is down.
        """
        self._up()
        self._signal(signal.SIGSTOP, lambda one: one.state != _STOPPED)

    def thaw(self) -> None:
        """SIGCONT all its processes.

        Raises:
            HostError: it is down.
        """
        self._up()
        self._signal(signal.SIGCONT, lambda one: one.state == _STOPPED)

    def kill(self) -> None:
        """SIGKILL all its processes at one stroke; its shared memory is gone. Its card stays."""
        if (keeper := self._keeper()) is not None:
            _send(keeper.pid, signal.SIGKILL)  # the kernel ends the rest before it ends
        self._signal(signal.SIGKILL, lambda _: True)

    def _signal(self, number: signal.Signals, needs_it: Callable[[Process], bool]) -> None:
        """Send a signal until nobody needs it; also to those who come meanwhile.

        Who waits in the kernel, such as for a child that is stopped, is stopped as it is.
        """
        told: set[int] = set()

        def nobody_needs_it() -> bool:
            found = [one for one in self.processes() if needs_it(one)]
            stops = number == signal.SIGSTOP
            waiting = {one.pid for one in found if stops and one.state == _WAITING} & told
            for one in found:
                _send(one.pid, number)
            told.update(one.pid for one in found)
            return waiting == {one.pid for one in found}

        _wait(nobody_needs_it, lambda: f"{self.name} resists {number.name}: {self.processes()}")

    def remove(self) -> None:
        """Kill it, and take away its card and cable."""
        self.kill()
        _call("ip", "netns", "delete", self.namespace)


def why_impossible() -> str:
    """Why there can be no hosts on this machine; empty if there can."""
    if os.geteuid() != 0:
        return NEEDS_ROOT
    apart = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc")
    try:
        done = subprocess.run([*apart, "sh", "-c", _PROBE], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"{error.filename} is missing: install util-linux and iproute2"
    if done.returncode == 0:
        return ""
    return f"this machine forbids namespaces, bridges or traffic shaping: {done.stderr.strip()}"


def make_switch(network: str) -> None:
    """The switch of a network, in a namespace of its own."""
    _call("ip", "netns", "add", _switch(network))
    _call("ip", "-n", _switch(network), "link", "add", "bridge", "type", "bridge")
    _call("ip", "-n", _switch(network), "link", "set", "bridge", "up")


def hosts_of(network: str) -> list[Host]:
    """All hosts of a network, in the order of their numbers."""
    pattern = re.compile(rf"{PREFIX}-{re.escape(network)}-h(\d+)")
    names = (path.name for path in NAMESPACES.glob(f"{PREFIX}-*"))
    numbers = sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))
    return [Host(network, number) for number in numbers]


def remove_all(network: str) -> None:
    """Remove the hosts and the switch of a network, also one that was made in part."""
    for host in hosts_of(network):
        host.remove()
    if (NAMESPACES / _switch(network)).exists():
        _call("ip", "netns", "delete", _switch(network))


def _limit(namespace: str, card: str, rate: str) -> None:
    queue = ("tbf", "rate", rate, "burst", _BURST, "latency", _LATENCY)
    _call("tc", "-n", namespace, "qdisc", "replace", "dev", card, "root", *queue)


def _switch(network: str) -> str:
    return f"{PREFIX}-{network}-switch"


def _processes(network_inode: int) -> Iterator[Process]:
    """The living processes of a network namespace."""
    for path in PROC.glob("[0-9]*"):
        # it has just ended, or may do more than we may, so that it is none of ours
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if (path / "ns" / "net").stat().st_ino != network_inode:
                continue
            name, _, rest = (path / "stat").read_text().partition(" (")[2].rpartition(") ")
            pids = re.findall(r"^NSpid:(.*)$", (path / "status").read_text(), re.M)[0].split()
            if rest[0] not in _GONE:
                own_pid = int(pids[-1]) if len(pids) > 1 else None
                yield Process(int(path.name), name, rest[0], own_pid)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    """Wait for a condition that comes soon, else raise HostError."""
    deadline_s = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise HostError(otherwise())
        time.sleep(0.005)


def _call(*words: str) -> str:
    """Run a tool, return what it prints."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise HostError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
