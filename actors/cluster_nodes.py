"""The hosts of a job: which of Ray's nodes has which number, and which generations exist.

Both are written down in Ray's GCS, where a coordinator that is restarted elsewhere finds them; a
name there is taken once and for all (put if absent). Without the GCS nothing changes: whatever
asks it here raises ClusterError while it does not answer, or waits until it does.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.exceptions import GetTimeoutError, RaySystemError, RpcError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_put,
)

from elastic.core.errors import ClusterError
from policies.growing import HostView, Readmission, Refuse, Take, Wait

_SPACE = b"elastic"
_LOOK_S = 0.5


@contextmanager
def asking() -> Iterator[None]:
    """One error for all that Ray raises where its GCS does not answer.

    Raises:
        ClusterError: it does not.
    """
    try:
        yield
    except (RpcError, RaySystemError, GetTimeoutError, ConnectionError) as error:
        text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise ClusterError(f"Ray's GCS does not answer: {text}") from error


class Losses:
    """When hosts were lost, by address: a raylet that is started anew is another of Ray's nodes."""

    def __init__(self) -> None:
        self._at_s: dict[str, list[float]] = {}
        self._policy = Readmission()

    def add(self, address: str, now_s: float) -> None:
        self._at_s.setdefault(address, []).append(now_s)

    def decide(self, address: str, now_s: float) -> Take | Wait | Refuse:
        """Whether the host is taken, if it is there."""
        return self._policy.decide(HostView(now_s, self._at_s.get(address, ())))


class ClusterNodes:
    """The nodes of one job, by number. Numbers are never used again.

    `held`: addresses of hosts that get no number for now, and why. `living`: the Ray nodes of all.

    Args:
        job: names the run among all of the cluster.
        first: the Ray node that is preferred as node 0.
    """

    def __init__(self, job: str, first: str) -> None:
        self._job, self._first = job, first
        self._ray_ids: dict[int, str] = {}
        self._present: tuple[int, ...] = ()
        self._addresses: dict[str, str] = {}
        self._losses = Losses()
        self.held: dict[str, str] = {}
        self.living: frozenset[str] = frozenset()
        self._looked_s = float("-inf")
        while (known := self._get(f"node/{len(self._ray_ids)}")) is not None:
            self._ray_ids[len(self._ray_ids)] = known.decode()

    @property
    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._looked_s >= _LOOK_S

    def look(self, num_wanted: int, former: Sequence[int], ending: Collection[str]) -> None:
        """See which hosts there are; give a number to those that have none, up to so many.

        Args:
            former: nodes that are no members any more; their hosts may come back as others.
            ending: Ray nodes that will be taken away: they get no number.
        """
        if not self.is_due:
            return
        hosts, now_s = _hosts(), time.monotonic()
        self._addresses |= hosts
        self.living = frozenset(hosts)
        numbers = {
            ray_id: node
            for node, ray_id in self._ray_ids.items()
            if node not in former and ray_id in hosts
        }
        held = {}
        for ray_id in sorted(hosts, key=lambda one: (one != self._first, one)):
            if ray_id in numbers or ray_id in ending or len(numbers) >= num_wanted:
                continue
            match self._losses.decide(hosts[ray_id], now_s):
                case Take():
                    numbers[ray_id] = self._give_number(ray_id)
                case Wait(reason=reason) | Refuse(reason):
                    held[hosts[ray_id]] = reason
        self._present, self.held = tuple(sorted(numbers.values())), held
        self._looked_s = now_s

    def lost(self, node: int) -> None:
        """A node went without being asked to."""
        address = self._addresses.get(self._ray_ids[node])
        if address is not None:
            self._losses.add(address, time.monotonic())

    def forgive(self) -> None:
        """Forget how often hosts were lost."""
        self._losses = Losses()

    @property
    def present(self) -> tuple[int, ...]:
        """Those that are there, as far as Ray knows."""
        return self._present

    def __contains__(self, node: int) -> bool:
        """Whether a host has that number, or had it."""
        return node in self._ray_ids

    @property
    def addresses(self) -> dict[int, str]:
        """Of the host of each number, as far as it was seen alive. Other than the Ray node it stays
        the same when a raylet is started anew."""
        known = self._addresses
        return {node: known[one] for node, one in self._ray_ids.items() if one in known}

    def ray_id(self, node: int) -> str:
        """The Ray node of a number."""
        return self._ray_ids[node]

    def claim(self, name: str, value: bytes) -> bytes | None:
        """Write `value` under a name that nothing was written under; else return what was.

        Also if that is equal: of two that write the same, only one may act on it.
        """
        with asking():
            is_taken = _internal_kv_put(self._key(name), value, overwrite=False, namespace=_SPACE)
        return self._get(name) if is_taken else None

    def forget(self) -> None:
        """The job has ended: remove what is written down of it."""
        with asking():
            _internal_kv_del(self._key(""), del_by_prefix=True, namespace=_SPACE)

    def _give_number(self, ray_id: str) -> int:
        node = len(self._ray_ids)
        while (other := self.claim(f"node/{node}", ray_id.encode())) is not None:
            self._ray_ids[node] = other.decode()
            if self._ray_ids[node] == ray_id:
                return node
            node += 1
        self._ray_ids[node] = ray_id
        return node

    def _get(self, name: str) -> bytes | None:
        with asking():
            found: bytes | None = _internal_kv_get(self._key(name), namespace=_SPACE)
        return found

    def _key(self, name: str) -> bytes:
        return f"{self._job}/{name}".encode()


def _hosts() -> dict[str, str]:
    """Addresses of Ray's living nodes that have processors to give; a head often has none."""
    with asking():
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    }
