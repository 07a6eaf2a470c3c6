"""Hears that a node will be taken away: from Ray, which drains it, or from the cloud's metadata.

Only listens; what a notice means is decided by `policies.preemption`. Asks a metadata service only
where the job file says so, never through a proxy, and reads at most `_MAX_BYTES` of an answer.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Protocol

from elastic.core.errors import ClusterError
from policies.preemption import Notice

log = logging.getLogger(__name__)

_AWS = "http://169.254.169.254"
_GCP = "metadata.google.internal"
_TIMEOUT_S = 2.0
_RETRY_S = 5.0
_MAX_BYTES = 4096
_TOKEN_LIFE_S = 21_600
_GCP_LEFT_S = 30.0  # Compute Engine, "Preemption process": it ends 30 s after the notice
_FIRMWARE = Path("/sys/class/dmi/id/sys_vendor")
_VENDORS = {"Amazon EC2": "aws", "Google": "gcp"}


class Source(Protocol):
    """Who knows of notices for this node. Asked again `every_s` after each answer."""

    every_s: float

    def ask(self) -> Notice | None:
        """What is announced now; may wait for news. Raises OSError or ClusterError where nobody
        answers."""
        ...


class Drains:
    """Ray's own notice: of `ray drain-node`, the autoscaler, or SIGTERM to `ray start --block`.

    Args:
        draining: node ids, and deadlines in milliseconds since the epoch, 0 where there is none.
    """

    every_s = 1.0

    def __init__(self, node: str, draining: Callable[[], Mapping[str, int]]) -> None:
        self._node, self._draining = node, draining

    def ask(self) -> Notice | None:
        deadline_ms = self._draining().get(self._node)
        return None if deadline_ms is None else drain_notice(deadline_ms)


def drain_notice(deadline_ms: int) -> Notice:
    """That Ray drains a node until then, in milliseconds since the epoch; 0: without a limit."""
    return Notice("Ray drains this node", deadline_ms / 1000 if deadline_ms else None)


class AwsSpot:
    """EC2's instance metadata, version 2: the end of a spot instance, and that one is likely.

    AWS_EC2_METADATA_SERVICE_ENDPOINT moves it, as for Amazon's own tools.
    """

    every_s = 5.0  # as EC2's user guide advises, "Spot Instance interruption notices"

    def __init__(self) -> None:
        given = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _AWS
        self._base = given.rstrip("/") + "/latest"
        self._token = ""

    def ask(self) -> Notice | None:
        action = self._get("meta-data/spot/instance-action")
        if action is not None:
            return _interruption(action)
        if self._get("meta-data/events/recommendations/rebalance") is not None:
            return Notice("AWS recommends to leave this node", certain=False)
        return None

    def _get(self, path: str) -> bytes | None:
        """The answer; None where nothing has that name. A token that has expired is renewed."""
        for _ in range(2):
            if not self._token:
                life = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LIFE_S)}
                self._token = _fetch(f"{self._base}/api/token", life, method="PUT")[0].decode()
            try:
                return _fetch(f"{self._base}/{path}", {"X-aws-ec2-metadata-token": self._token})[0]
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 404:
                    return None
                if error.code != 401:
                    raise
                self._token = ""
        raise OSError(f"{self._base}: refuses the token that it gave")


class GcpPreemption:
    """Compute Engine's metadata: whether this machine is preempted. The server waits for news.

    GCE_METADATA_HOST moves it, as for Google's own tools.
    """

    every_s = 1.0

    def __init__(self, wait_s: int = 60) -> None:
        host = os.environ.get("GCE_METADATA_HOST") or _GCP
        self._url = f"http://{host}/computeMetadata/v1/instance/preempted"
        self._wait_s = wait_s
        self._etag = ""
        self._seen_s: float | None = None

    def ask(self) -> Notice | None:
        url, wait_s = self._url, 0
        if self._etag:  # the first question is answered at once
            url, wait_s = f"{url}?wait_for_change=true&last_etag={self._etag}", self._wait_s
            url += f"&timeout_sec={wait_s}"
        body, headers = _fetch(url, {"Metadata-Flavor": "Google"}, wait_s=wait_s)
        if headers.get("Metadata-Flavor") != "Google":
            raise OSError(f"{url}: answers without Metadata-Flavor: Google")
        self._etag = headers.get("ETag", "")
        if body.strip() != b"TRUE":
            return None
        self._seen_s = self._seen_s or time.time()
        return Notice("Google preempts this node", self._seen_s + _GCP_LEFT_S)


class NodeWatch:
    """Asks the sources of one node, each on a thread of its own, and keeps their last answers."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._notices: dict[str, Notice] = {}
        self._problems: dict[str, str] = {}
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._listen, args=one, name=f"notices of {one[0]}", daemon=True
            )
            for one in sources.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; does not wait for those that wait for an answer."""
        self._ended.set()

    def notice(self) -> Notice | None:
        """The one that counts: a certain one before others, of these the earliest."""
        return min(self._notices.copy().values(), key=_urgency, default=None)

    def problems(self) -> dict[str, str]:
        """Sources that do not answer now, and why."""
        return self._problems.copy()

    def _listen(self, name: str, source: Source) -> None:
        wait_s = 0.0
        while not self._ended.wait(wait_s):
            try:
                notice = source.ask()
            except (OSError, ClusterError) as error:
                log.warning("no notices from %s: %s", name, error)
                self._problems[name] = str(error)
                wait_s = max(_RETRY_S, source.every_s)
                continue
            self._problems.pop(name, None)
            wait_s = source.every_s
            if notice is None:
                self._notices.pop(name, None)
            else:
                self._notices[name] = notice


def cloud_sources(cloud: str, firmware: Path = _FIRMWARE) -> dict[str, Source]:
    """The sources of `preemption.source`; "auto" reads the machine's firmware, and asks nobody."""
    if cloud == "auto":
        vendor = firmware.read_text().strip() if firmware.exists() else ""
        cloud = _VENDORS.get(vendor, "none")
    if cloud == "none":
        return {}
    return {cloud: AwsSpot() if cloud == "aws" else GcpPreemption()}


def _urgency(notice: Notice) -> tuple[bool, float]:
    return not notice.certain, notice.deadline_s if notice.deadline_s is not None else float("inf")


def _interruption(answer: bytes) -> Notice:
    """That there is an answer is certain, whatever it says."""
    try:
        action = json.loads(answer)
        deadline_s = datetime.fromisoformat(action["time"]).timestamp()
        return Notice(f"AWS will {action['action']} this node", deadline_s)
    except (ValueError, KeyError, TypeError):
        return Notice(f"AWS interrupts this node: {answer[:80]!r}")


def _fetch(
    url: str, headers: Mapping[str, str], *, method: str = "GET", wait_s: float = 0.0
) -> tuple[bytes, http.client.HTTPMessage]:
    """Body and headers. Raises OSError."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S + wait_s) as answer:
            return answer.read(_MAX_BYTES), answer.headers
    except http.client.HTTPException as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error
