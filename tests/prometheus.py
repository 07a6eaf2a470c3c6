"""A real Prometheus on loopback, in a folder of its own. Debian: apt install prometheus."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import monitoring

MONITORING = Path(monitoring.__file__).parent
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="apt install prometheus")
_STARTS_S = 20.0


class Prometheus:
    """One that runs."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer of its API.

        Raises:
            AssertionError: it refuses, with its reason.
        """
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{path}?{query}: {error.read().decode()}") from None

    def query(self, expression: str, time_s: float | None = None) -> list[dict[str, Any]]:
        """The samples of an instant query, now or at a time."""
        at = {} if time_s is None else {"time": time_s}
        result: list[dict[str, Any]] = self.ask("query", query=expression, **at)["result"]
        return result

    def value(self, expression: str, time_s: float | None = None) -> float:
        """Of the only sample of an instant query."""
        (sample,) = self.query(expression, time_s)
        return float(sample["value"][1])

    def series(self, expression: str, begin_s: float, end_s: float) -> list[dict[str, Any]]:
        """The series of a range query, a point a second."""
        result: list[dict[str, Any]] = self.ask(
            "query_range", query=expression, start=begin_s, end=end_s, step=1
        )["result"]
        return result

    def empty_queries(
        self, dashboard: Mapping[str, Any], job: str, begin_s: float, end_s: float
    ) -> list[str]:
        """The queries of panels and annotations that have no number in that time."""
        chosen = {"$job": job, "$run": ".*", "$__rate_interval": "1m"}
        asked = [
            (panel["title"], target) for panel in dashboard["panels"] for target in panel["targets"]
        ]
        asked += [(note["name"], note) for note in dashboard["annotations"]["list"]]
        empty = []
        for title, target in asked:
            expression = target["expr"]
            for name, value in chosen.items():
                expression = expression.replace(name, value)
            past_s = 0 if target.get("instant") else int(end_s - begin_s)
            series = self.series(expression, end_s - past_s, end_s)
            values = [float(value) for one in series for _, value in one["values"]]
            if not any(map(math.isfinite, values)):
                empty.append(f"{title}: {expression}")
        return empty


def hurried(rules: str) -> str:
    """The rules, with seconds where they have minutes, and minutes where they have hours."""
    return re.sub(
        r"(?<=[\[ ])(\d+)([mh])(?=[\]\n )])",
        lambda found: f"{found[1]}s" if found[2] == "m" else f"{60 * int(found[1])}s",
        rules,
    )


@contextlib.contextmanager
def prometheus(folder: Path, *, is_hurried: bool = False) -> Iterator[Prometheus]:
    """Run Prometheus as `monitoring/prometheus.yml` says, only more often, until the end of the
    block: it finds what runs in `folder`, where its data lie, too.

    Args:
        is_hurried: a minute of its rules is a second, so that an alert need not be waited for.
    """
    assert PROMETHEUS is not None
    shutil.copytree(MONITORING / "rules", folder / "rules")
    if is_hurried:
        (rules,) = (folder / "rules").iterdir()
        rules.write_text(hurried(rules.read_text()))
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "250ms", "evaluation_interval": "500ms"}
    (discovery,) = config["scrape_configs"][0]["file_sd_configs"]
    discovery |= {"files": [str(folder / "runs" / "*.prometheus.json")], "refresh_interval": "1s"}
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(config))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [PROMETHEUS, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    words += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, cwd=folder)
        try:
            _await_ready(process, port, folder / "log")
            yield Prometheus(port)
        finally:
            process.terminate()
            process.wait(20)


def _await_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < _STARTS_S:
        assert process.poll() is None, log.read_text()
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=1),
        ):
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text())
