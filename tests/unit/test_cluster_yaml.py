"""What Ray's cluster launcher is given: valid by its own rules, and as the documents say it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.documents import ROOT

FILES = [ROOT / "cluster.yaml", ROOT / "docs" / "cluster-aws.yaml"]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


@each_file
def test_the_launcher_accepts_it(path: Path) -> None:
    validate_config(prepare_config(read(path)))


@each_file
def test_the_launcher_would_have_said_so(path: Path) -> None:
    with pytest.raises(ValidationError, match="spot_only"):
        validate_config(prepare_config({**read(path), "spot_only": True}))


@each_file
def test_every_ray_says_how_it_authenticates_and_waits_for_a_checkpoint(path: Path) -> None:
    config = read(path)
    for kind in ("head", "worker"):
        stop, start = config[f"{kind}_start_ray_commands"]
        assert stop.endswith("/ray stop")
        assert " ray start " in start
        assert "RAY_AUTH_MODE=token" in start
        assert int(re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", start)[1]) >= 60  # type: ignore[index]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


@each_file
def test_every_node_gets_the_package_and_the_token(path: Path) -> None:
    config = read(path)
    assert config["file_mounts"] == {"~/elastic": ".", "~/.ray/auth_token": "~/.ray/auth_token"}
    assert {".venv", "runs"} <= set(config["rsync_exclude"])
    installs = [one for one in config["setup_commands"] if "~/elastic/scripts/install" in one]
    assert installs
    assert (ROOT / "scripts" / "install").exists()


def test_spot_machines_are_what_the_head_is_and_may_be_none() -> None:
    types = read(FILES[1])["available_node_types"]
    head, spot = types["head"]["node_config"], dict(types["spot"]["node_config"])
    assert spot.pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot == head, "another kind of processor may round differently"
    assert types["spot"]["resources"] == {"spot": 1}, "what a submitted job asks for"
