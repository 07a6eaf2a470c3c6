"""The Ray cluster that jobs run on: the one at hand, or one on this machine for a while."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from actors.setup import NAMESPACE, compute_environment

_OBJECT_STORE_BYTES = 100 * 2**20  # tensors never go through Ray


class _Users:
    """The blocks of this process, on any thread, that use a cluster which the first one joined."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num = 0


_users = _Users()


@contextlib.contextmanager
def local_cluster() -> Iterator[str]:
    """The Ray cluster at hand, or one on this machine until the end of the block. Its address.

    Several jobs run in one block, or on several threads, share the cluster, which takes seconds to
    start.
    """
    with _users.lock:
        counts = _users.num > 0 or not ray.is_initialized()
        if counts:
            if not ray.is_initialized():
                join_cluster(os.environ.get("RAY_ADDRESS"))
            _users.num += 1
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        if counts:
            with _users.lock:
                _users.num -= 1
                if _users.num == 0:
                    ray.shutdown()


def join_cluster(address: str | None) -> None:
    """Connect to the cluster at `address`, or start one on this machine."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # left unset, two processes may disagree
    settings: dict[str, Any] = {"address": address}
    variables: dict[str, str] = {}
    if address is None:
        settings = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        variables = compute_environment(threads=1)  # its processes then fit most jobs as they are
    with _environment(variables):
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **settings)
    _silence_raylet()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes that the block starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _silence_raylet() -> None:
    """Stop Ray from printing a paragraph on each worker's death: our events say it in a line."""
    driver: Any = ray._private.worker.global_worker
    driver.threads_stopped.set()
    driver.gcs_error_subscriber.close()
