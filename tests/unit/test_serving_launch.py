"""Applications follow the folder; one that does not start ends nobody else. Prometheus is told."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from elastic.core.experts.repository import Repository
from serve.settings import load_serving
from tests.served import FakeClock, make_repository, trained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve 2.60 declares settings as pydantic 1 did
    from ray.serve import RunTarget
    from ray.serve.schema import ServeDeploySchema

    from serve.launch import Deployed, config, told_prometheus


class FakeApplications:
    def __init__(self) -> None:
        self.there: set[str] = set()
        self.broken = ""

    def run_many(self, targets: Sequence[RunTarget]) -> None:
        self.there |= {str(one.name) for one in targets}
        if self.broken in self.there:
            raise RuntimeError(f"{self.broken} failed")

    def delete(self, name: str) -> None:
        self.there.discard(name)


def test_an_expert_that_does_not_start_is_tried_again_and_ends_nobody_else(tmp_path: Path) -> None:
    repository, clock = make_repository(tmp_path / "repo"), FakeClock()
    applications = FakeApplications()
    settings = load_serving({"repository": str(tmp_path / "repo")})
    deployed = Deployed(settings, "distributed", clock, applications)
    first = {"tiny", "tiny-expert-0", "tiny-expert-1", "tiny-expert-2"}
    assert applications.there == first
    repository.add_expert("expert-3", trained("flow", 3))
    applications.broken = "tiny-expert-3"
    deployed.step()
    assert applications.there == first
    applications.broken = ""
    deployed.step()
    assert applications.there == {*first, "tiny-expert-3"}
    Repository.open(tmp_path / "repo").remove_expert("expert-3")
    deployed.step()
    assert "tiny-expert-3" in applications.there  # a request may still need it
    clock.now_s += 2 * settings.limits.timeout_s
    deployed.step()
    assert applications.there == first
    deployed.stop()
    assert applications.there == set()


def test_prometheus_is_told_where_metrics_are_as_long_as_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_repository(tmp_path / "repo")
    monkeypatch.chdir(tmp_path)
    found = tmp_path / "runs" / "serving-tiny.prometheus.json"
    given = {"repository": str(tmp_path / "repo"), "port": 8123}
    with told_prometheus("tiny", load_serving(given)):
        (told,) = json.loads(found.read_text())
        assert told["targets"] == ["127.0.0.1:8123"]
        assert told["labels"] == {"job": "tiny", "run": "serving-tiny"}
    assert not found.exists()
    key = {"name": "alice", "sha256": "0" * 64}
    with told_prometheus("tiny", load_serving({**given, "keys": [key]})):
        assert not found.exists(), "a scrape would need a key"


@pytest.mark.parametrize("mode", ["colocated", "distributed"])
def test_what_is_printed_is_what_serve_deploys(mode: str, tmp_path: Path) -> None:
    make_repository(tmp_path / "repo")
    given = {"repository": str(tmp_path / "repo"), "port": 8123, "limits": {"timeout_s": 7.5}}
    settings = load_serving(given)
    schema = ServeDeploySchema.model_validate(config(settings, mode))
    assert [one.route_prefix for one in schema.applications if one.route_prefix] == ["/"]
    assert len(schema.applications) == (1 if mode == "colocated" else 4)
    assert schema.controller_options is not None
    environment = (schema.controller_options.runtime_env or {})["env_vars"]
    assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "serve.proxy:middlewares"
    assert float(environment["ELASTIC_SERVE_TIMEOUT_S"]) == settings.limits.timeout_s == 7.5
