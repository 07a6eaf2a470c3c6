"""The Ray cluster that jobs run on: the one at hand, or one on this machine for a while.

How processes authenticate is always said explicitly: left unset, two of them may disagree, which
looks like a cluster that does not answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from actors.setup import NAMESPACE, compute_environment
from elastic.core.errors import ConfigError

_AUTH_MODE = "RAY_AUTH_MODE"
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


def join_cluster(address: str | None, auth: str | None = None) -> None:
    """Connect to the cluster at `address`, or to one that `ray start` began on this machine.

    Without an address and such a cluster one is started here.

    Args:
        auth: how the cluster authenticates, `token` or `disabled`, if that is known.

    Raises:
        ConfigError: the address is none of a cluster, or nobody answers there.
    """
    found = _find(address)
    _agree(auth, starts=found is None)
    settings: dict[str, Any] = {"address": found}
    variables: dict[str, str] = {}
    if found is None:
        settings = {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        variables = compute_environment(threads=1)  # its processes then fit most jobs as they are
    try:
        with _environment(variables):
            ray.init(
                namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **settings
            )
    except ConnectionError as error:
        raise ConfigError(
            f"RAY_ADDRESS: no cluster answers at {found}, with RAY_AUTH_MODE={auth_mode()};"
            f" RAY_ADDRESS=local starts one on this machine: {error}"
        ) from error
    _silence_raylet()
    if found is None:
        _end_autoscaler()


def _find(address: str | None) -> str | None:
    """The host and port of the cluster to join, or None."""
    problem = ""
    try:
        if address is None or "://" not in address:
            found: str | None = canonicalize_bootstrap_address(address)  # type: ignore[arg-type]
            return found
    except (ValueError, OSError) as error:
        problem = f" ({error})"
    raise ConfigError(
        f"RAY_ADDRESS: got {address}{problem}; needs host:port of a cluster that this machine is"
        " part of. From elsewhere: ray job submit --working-dir . -- elastic train job.yaml"
    )


def auth_mode() -> str:
    """How this process authenticates with Ray: `token` or `disabled`."""
    return os.environ.get(_AUTH_MODE, "disabled")


def _agree(auth: str | None, *, starts: bool) -> None:
    """Set how to authenticate, unless the user did.

    A cluster that `ray start` began without being told uses a token where there is one.
    """
    if auth is None and _AUTH_MODE in os.environ:
        return
    if auth is None:
        loader = AuthenticationTokenLoader.instance()
        with_token = not starts and loader.has_token(ignore_auth_mode=True)
        auth = "token" if with_token else "disabled"
    os.environ[_AUTH_MODE] = auth
    Config.initialize("")  # Ray has read its environment when it was imported


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


def _end_autoscaler() -> None:
    """One machine cannot grow; and Ray, at the end, would wait a second for this process."""
    node: Any = ray._private.worker._global_node
    node.kill_monitor(check_alive=False)
