"""Puts our data source, folder and dashboards into a Grafana, with `grafana-api`.

Doing it again changes nothing, an upgrade replaces what an earlier version wrote, and what a person
has changed since stays unless they say otherwise. A Grafana that is busy is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from grafana_api.grafana_api import GrafanaClientError, GrafanaServerError
from grafana_api.grafana_face import GrafanaFace

from elastic.core.errors import ConfigError

FOLDER = {"uid": "elastic", "title": "Elastic"}
SOURCE = {"uid": "elastic-prometheus", "name": "Elastic Prometheus"}
OLDEST = 10
"""The first version of Grafana that draws our dashboards; its provisioning files are the same."""

_OURS = "elastic "
_TRIES = 4
_WAIT_S = 0.5
_TIMEOUT_S = 10.0
_KEPT = ("id", "version")
"""What Grafana adds to a dashboard."""

_Json = dict[str, Any]
_State = Literal["created", "replaced", "unchanged", "kept: it was changed by hand"]


@dataclass(frozen=True, slots=True)
class Installed:
    """What was done about one thing."""

    what: str
    state: _State


class Grafana:
    """One Grafana.

    Args:
        url: such as http://localhost:3000 or https://host/grafana.
        key: a service account's token, or USER:PASSWORD.
        sleep: waits between tries.
    """

    def __init__(self, url: str, key: str, sleep: Callable[[float], None] = time.sleep) -> None:
        """Raises ConfigError: it is no URL, or the key is missing."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"--grafana: got {url!r}; needs http://HOST:PORT or https://HOST/PATH"
            )
        if not key:
            raise ConfigError(
                "GRAFANA_TOKEN: is not set; needs the token of a service account that is Admin"
                " (Grafana: Administration, Service accounts), or USER:PASSWORD"
            )
        user, colon, password = key.partition(":")
        path = parts.path.strip("/")
        self._url, self._sleep = url, sleep
        self._api = GrafanaFace(
            auth=(user, password) if colon else key,
            host=parts.hostname,
            port=parts.port,
            url_path_prefix=f"{path}/" if path else "",
            protocol=parts.scheme,
            timeout=_TIMEOUT_S,
        )

    def close(self) -> None:
        self._api.api.s.close()

    def install(
        self, dashboards: Sequence[Mapping[str, Any]], prometheus: str, *, overwrite: bool = False
    ) -> list[Installed]:
        """Make it all be there.

        Args:
            prometheus: the URL at which Grafana reaches Prometheus.
            overwrite: also dashboards that were changed by hand.

        Raises:
            ConfigError: it is no Grafana, too old a one, or the key does not do.
        """
        self._check()
        done = [self._put_source(prometheus), self._put_folder()]
        return done + [self._put_dashboard(one, overwrite=overwrite) for one in dashboards]

    def _check(self) -> None:
        health = self._call("ask for its health", self._api.api.GET, "/health")
        number = str(health.get("version", "")) if isinstance(health, dict) else ""
        major = number.partition(".")[0]
        if not major.isdigit():
            raise ConfigError(f"--grafana: {self._url} is no Grafana: /api/health gives {health!r}")
        if int(major) < OLDEST:
            raise ConfigError(
                f"--grafana: {self._url} is version {number}; needs {OLDEST} or later"
            )

    def _put_source(self, prometheus: str) -> Installed:
        wanted = {
            **SOURCE,
            "type": "prometheus",
            "url": prometheus,
            "access": "proxy",
            "jsonData": {"httpMethod": "POST", "timeInterval": "5s"},
        }
        what = f"data source {SOURCE['name']}"
        there = self._find(what, self._api.datasource.get_datasource_by_name, SOURCE["name"])
        if there is None:
            self._call(f"create {what}", self._api.datasource.create_datasource, wanted)
            return Installed(what, "created")
        if wanted.items() <= there.items():
            return Installed(what, "unchanged")
        wanted["uid"] = there["uid"]
        self._call(f"replace {what}", self._api.datasource.update_datasource, there["id"], wanted)
        return Installed(what, "replaced")

    def _put_folder(self) -> Installed:
        what = f"folder {FOLDER['title']}"
        if self._find(what, self._api.folder.get_folder, FOLDER["uid"]) is not None:
            return Installed(what, "unchanged")
        self._call(f"create {what}", self._api.folder.create_folder, **FOLDER)
        return Installed(what, "created")

    def _put_dashboard(self, wanted: Mapping[str, Any], *, overwrite: bool) -> Installed:
        what = f"dashboard {wanted['title']}"
        there = self._find(what, self._api.dashboard.get_dashboard, wanted["uid"])
        if there is not None:
            now = {key: one for key, one in there["dashboard"].items() if key not in _KEPT}
            if now == wanted:
                return Installed(what, "unchanged")
            if not overwrite and not self._is_ours(what, wanted["uid"]):
                return Installed(what, "kept: it was changed by hand")
        body = {
            "dashboard": {**wanted, "id": None},
            "folderUid": FOLDER["uid"],
            "overwrite": True,
            "message": f"{_OURS}{version('elastic')}",
        }
        self._call(f"write {what}", self._api.dashboard.update_dashboard, body)
        return Installed(what, "created" if there is None else "replaced")

    def _is_ours(self, what: str, uid: str) -> bool:
        """Whether the newest version of a dashboard was written by an `elastic` of any version."""
        path = f"/dashboards/uid/{uid}/versions?limit=1"  # grafana-api has no name for it
        answer = self._call(f"read the versions of {what}", self._api.api.GET, path)
        versions = answer["versions"] if isinstance(answer, dict) else answer  # from 11.? on a dict
        return bool(versions) and str(versions[0].get("message", "")).startswith(_OURS)

    def _find(self, what: str, get: Callable[..., Any], *arguments: Any) -> _Json | None:
        try:
            found: _Json = self._call(f"look for {what}", get, *arguments)
        except _Missing:
            return None
        return found

    def _call(self, what: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """One request, again with growing pauses where Grafana does not answer or fails."""
        problem: Exception | None = None
        for number in range(_TRIES):
            if number:
                self._sleep(_WAIT_S * 2 ** (number - 1))
            try:
                return call(*arguments, **named)
            except requests.exceptions.JSONDecodeError:
                raise ConfigError(
                    f"--grafana: {self._url} is no Grafana, or one below another path: what it"
                    " answers is not JSON"
                ) from None
            except (requests.ConnectionError, requests.Timeout, GrafanaServerError) as error:
                problem = error
            except GrafanaClientError as error:
                raise self._refusal(what, error) from error
        said = getattr(problem, "message", "") or f"{type(problem).__name__}: {problem}"
        raise ConfigError(
            f"--grafana: could not {what} at {self._url}, tried {_TRIES} times: {said}"
        ) from problem

    def _refusal(self, what: str, error: GrafanaClientError) -> Exception:
        if error.status_code == 404:
            return _Missing(f"--grafana: {self._url} has no such thing, when asked to {what}")
        if error.status_code in (401, 403):
            return ConfigError(
                f"GRAFANA_TOKEN: {self._url} does not let this key {what} ({error.message});"
                " needs the token of a service account that is Admin"
            )
        return ConfigError(f"--grafana: {self._url} refused to {what}: {error.message}")


class _Missing(ConfigError):
    """There is no such thing."""
