"""Installing dashboards: once, again, after an upgrade, over a person's changes, and in vain."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic.cli import main
from elastic.core.errors import ConfigError
from monitoring.dashboards.catalogue import all_dashboards
from monitoring.grafana import OLDEST, Grafana, Installed
from tests.grafana import TOKEN, GrafanaStub, grafana_stub

PROMETHEUS = "http://prometheus:9090"
NUM_THINGS = 2 + len(all_dashboards())


@pytest.fixture
def stub() -> Iterator[GrafanaStub]:
    with grafana_stub() as stub:
        yield stub


def install(
    stub: GrafanaStub, *, key: str = TOKEN, waits: list[float] | None = None, **more: Any
) -> list[Installed]:
    dashboards = more.pop("dashboards", all_dashboards())
    grafana = Grafana(stub.url, key, sleep=(waits if waits is not None else []).append)
    try:
        return grafana.install(dashboards, more.pop("prometheus", PROMETHEUS), **more)
    finally:
        grafana.close()


def states(done: list[Installed]) -> set[str]:
    return {one.state for one in done}


def test_all_of_it_is_there_afterwards_and_again_changes_nothing(stub: GrafanaStub) -> None:
    first = install(stub)
    assert (states(first), len(first)) == ({"created"}, NUM_THINGS)
    (source,) = stub.sources.values()
    assert (source["type"], source["url"]) == ("prometheus", PROMETHEUS)
    assert set(stub.dashboards) == {one["uid"] for one in all_dashboards()}
    num_writes = len(stub.writes)
    assert states(install(stub)) == {"unchanged"}
    assert len(stub.writes) == num_writes


def test_an_upgrade_replaces_what_an_earlier_version_wrote(stub: GrafanaStub) -> None:
    older = [{**one, "panels": one["panels"][:1]} for one in all_dashboards()]
    install(stub, dashboards=older)
    done = install(stub, prometheus="http://elsewhere:9090")
    assert [one.state for one in done] == [
        "replaced", "unchanged", *["replaced"] * len(all_dashboards()),
    ]  # fmt: skip
    assert stub.sources["Elastic Prometheus"]["url"] == "http://elsewhere:9090"
    for one in all_dashboards():
        assert len(stub.dashboards[one["uid"]][-1]["panels"]) == len(one["panels"])


def test_what_was_changed_by_hand_stays_unless_one_says_otherwise(stub: GrafanaStub) -> None:
    install(stub)
    mine = {**all_dashboards()[0], "refresh": "1m"}
    stub.save(mine, "")
    done = {one.what: one.state for one in install(stub)}
    assert done[f"dashboard {mine['title']}"] == "kept: it was changed by hand"
    assert stub.dashboards[mine["uid"]][-1]["refresh"] == "1m"
    assert "replaced" in states(install(stub, overwrite=True))
    assert stub.dashboards[mine["uid"]][-1]["refresh"] == "10s"


def test_a_grafana_below_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    with grafana_stub("/grafana") as stub:
        assert states(install(stub)) == {"created"}


def test_one_that_is_starting_is_asked_again(stub: GrafanaStub) -> None:
    waits: list[float] = []
    stub.fail_next = 2
    assert states(install(stub, waits=waits)) == {"created"}
    assert waits == [0.5, 1.0]


def test_one_that_stays_broken_is_told_of(stub: GrafanaStub) -> None:
    stub.fail_next = 100
    with pytest.raises(
        ConfigError, match=r"could not ask for its health at http.*, tried 4 times: .*starting"
    ):
        install(stub)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    grafana = Grafana(f"http://127.0.0.1:{port}", TOKEN, sleep=lambda _: None)
    with pytest.raises(ConfigError, match=r"tried 4 times: ConnectionError"):
        grafana.install([], PROMETHEUS)
    grafana.close()


@pytest.mark.parametrize("url", ["localhost:3000", "ftp://host", "http://", ""])
def test_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"--grafana: got .*needs http://HOST:PORT"):
        Grafana(url, TOKEN)


def test_no_key() -> None:
    with pytest.raises(ConfigError, match="GRAFANA_TOKEN: is not set"):
        Grafana("http://localhost:3000", "")


@pytest.mark.parametrize("key", ["glsa_wrong", "admin:admin"])
def test_a_wrong_key(stub: GrafanaStub, key: str) -> None:
    with pytest.raises(ConfigError, match=r"does not let this key look for data source .*Admin"):
        install(stub, key=key)
    assert stub.writes == []


def test_too_old_a_grafana(stub: GrafanaStub) -> None:
    stub.version = "8.5.1"
    with pytest.raises(ConfigError, match=rf"is version 8\.5\.1; needs {OLDEST} or later"):
        install(stub)


def test_something_else_answers(stub: GrafanaStub) -> None:
    stub.url += "/elsewhere"
    with pytest.raises(ConfigError, match="is no Grafana, or one below another path"):
        install(stub)


def test_from_the_command_line(
    stub: GrafanaStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)
    with pytest.raises(SystemExit) as end:
        main(["dashboards", "install", "--grafana", stub.url, "--prometheus", PROMETHEUS])
    assert end.value.code == 0
    assert capsys.readouterr().out.count(": created\n") == NUM_THINGS
    monkeypatch.delenv("GRAFANA_TOKEN")
    with pytest.raises(SystemExit) as end:
        main(["dashboards", "install", "--grafana", stub.url])
    assert end.value.code == 1
    assert "GRAFANA_TOKEN: is not set" in capsys.readouterr().err


def test_files_for_provisioning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["dashboards", "write", str(tmp_path), "--prometheus", PROMETHEUS])
    assert end.value.code == 0
    told = [Path(line) for line in capsys.readouterr().out.split()]
    assert len(told) == NUM_THINGS
    sources = yaml.safe_load((tmp_path / "provisioning/datasources/elastic.yaml").read_text())
    assert sources["datasources"][0]["url"] == PROMETHEUS
    providers = yaml.safe_load((tmp_path / "provisioning/dashboards/elastic.yaml").read_text())
    folder = Path(providers["providers"][0]["options"]["path"])
    read = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert sorted(read, key=str) == sorted(all_dashboards(), key=str)
