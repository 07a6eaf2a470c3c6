"""What a coordinator needs of the processes of its job, and of the hosts that they run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.mesh import Address
from policies.preemption import Notice
from policies.preflight import Probe


@dataclass(frozen=True, slots=True)
class Ended:
    """A process is over. `error` is what its own code raised; `text` says it in words."""

    text: str
    error: BaseException | None = None
    traceback: str = ""


class Processes(Protocol):
    """Where workers and aggregators live. Roles are 'worker' and 'aggregator'.

    What asks Ray's GCS raises ClusterError where that does not answer.
    """

    def look(self, num_nodes: int, former: Sequence[int]) -> None:
        """Find out which processes have ended since, and which nodes there are.

        Not free: once per turn is enough. At most `num_nodes` are used. A host may come back after
        one of its numbers is `former`, as another node.
        """
        ...

    def known(self, role: str) -> Mapping[int, Ended | None]:
        """Every process started so far, by number, and how it had ended at the last look."""
        ...

    def homes(self, role: str) -> Mapping[int, int]:
        """The node of each of them."""
        ...

    def nodes(self) -> Sequence[int]:
        """The nodes that the job may use now."""
        ...

    def machines(self) -> Mapping[int, str]:
        """The address of the host of each node that there is or was, as far as it is known:
        it stays the same when Ray is started anew there."""
        ...

    def addresses(self) -> Mapping[int, Address]:
        """Where the aggregators of nodes listen, as far as they have said so."""
        ...

    def exporters(self) -> Mapping[int, Address]:
        """Where the exporters of nodes are scraped, as far as there are any."""
        ...

    def ending(self) -> Mapping[int, Notice]:
        """The nodes on other hosts that will be taken away."""
        ...

    def probes(self) -> Mapping[int, Probe]:
        """What workers have measured before they connected, as far as they have said so."""
        ...

    def probe_again(self, worker: int) -> None:
        """Have a worker measure once more, which is idle now; the better of both counts. Returns at
        once."""
        ...

    def claim(self, generation: int, membership: bytes) -> bytes | None:
        """Make a generation exist; or return the one of that number that exists already."""
        ...

    def start(self, role: str, number: int, node: int) -> None: ...

    def kill(self, role: str, number: int) -> None: ...

    def avoid(self, node: int, reason: str) -> None:
        """Use the host of a node no more; nothing where none has that number."""
        ...

    def allow(self, node: int) -> None:
        """Use it again, as another node."""
        ...

    def lost(self, node: int) -> None:
        """A node went without being asked to: its host may have to wait before it is used again."""
        ...

    def held(self) -> Mapping[str, str]:
        """Hosts that are not used for now, by address, and why."""
        ...

    def forgive(self) -> None:
        """Forget how often hosts were lost."""
        ...

    def ask(self, num_hosts: int) -> None:
        """Have the cluster start so many hosts more than there are, if it can; 0: none.

        Returns at once. To be said again and again: the newest wish counts.
        """
        ...

    def clear(self) -> None:
        """Free the memory of the job on all nodes, as far as they can be reached."""
        ...

    def forget(self) -> None:
        """The job has ended: nothing of it is to be found any more."""
        ...
