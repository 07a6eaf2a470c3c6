"""Asks Ray's autoscaler for hosts: a placement group that waits for them, one bundle on each.

See docs/decisions/0017. It reserves nothing for longer than it takes to see a host that has come.
Ray drops it with the coordinator's actor; one that is restarted finds it by its name. All calls are
made on a thread of their own, since without the GCS they wait.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Mapping

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group

log = logging.getLogger(__name__)

_AGAIN_S = 5.0
_NODE_ID = "ray.io/node-id"


class HostRequests:
    """What one job asks for; the newest wish counts.

    Args:
        name: of the placement group, unique in the cluster.
        bundle: what a host must have to offer, such as {"CPU": 1}.
    """

    def __init__(self, name: str, bundle: Mapping[str, float]) -> None:
        self._name, self._bundle = name, dict(bundle)
        self._changed = threading.Condition()
        self._wish: tuple[int, frozenset[str]] = (0, frozenset())
        self._done: tuple[int, frozenset[str]] | None = None
        """None: an earlier coordinator's may be there."""
        self._is_closed = False
        self._thread = threading.Thread(target=self._loop, name="host requests", daemon=True)
        self._thread.start()

    def ask(self, num: int, known: Collection[str]) -> None:
        """Want `num` hosts more than the Ray nodes that are known. Returns at once; 0: none."""
        with self._changed:
            wanted, excluded = self._wish
            if num == wanted and (num == 0 or excluded.issuperset(known)):
                return
            self._wish = num, frozenset(known)
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Ask for nothing any more; wait until Ray knows, but not for longer than that."""
        self.ask(0, ())
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while self._wish == self._done and not self._is_closed:
                    self._changed.wait()
                wish = self._wish
                if wish == self._done:
                    return
            try:
                self._carry_out(*wish)
                self._done = wish
            except (RayError, OSError, ValueError, RuntimeError) as error:
                log.warning("cannot ask Ray for hosts, tries again: %s", error)
                with self._changed:
                    if self._is_closed:
                        return  # Ray drops it with this process
                    self._changed.wait(_AGAIN_S)

    def _carry_out(self, num: int, known: frozenset[str]) -> None:
        with contextlib.suppress(ValueError):  # there is none
            remove_placement_group(ray.util.get_placement_group(self._name))
        if num:
            others = {_NODE_ID: f"!in({','.join(sorted(known))})"} if known else {}
            placement_group(
                [self._bundle] * num,
                strategy="STRICT_SPREAD",
                name=self._name,
                bundle_label_selector=[others] * num,
            )
