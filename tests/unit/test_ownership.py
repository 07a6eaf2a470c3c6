"""One job at a time writes into a storage."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from elastic.core.errors import ConfigError, StorageError
from elastic.core.ownership import OWNER_FILE, Owner, check_owner, owned
from elastic.core.storage import LocalStorage


def put(folder: Path, owner: Owner) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNER_FILE).write_text(json.dumps(asdict(owner)))


@pytest.fixture
def here() -> Owner:
    return Owner.here("aaaa", "/runs/a")


@pytest.fixture
def dead() -> Owner:
    """A process of this machine that is gone."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = replace(Owner.here("dead", "/runs/dead"), pid=process.pid)
    process.communicate(b"\n")
    return owner


def test_a_storage_is_owned_for_the_length_of_a_block(tmp_path: Path, here: Owner) -> None:
    storage = LocalStorage(tmp_path / "c")
    with owned(storage, here):
        assert json.loads((tmp_path / "c" / OWNER_FILE).read_text())["run_id"] == "aaaa"
        check_owner(storage, "aaaa")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_second_job_is_refused_and_told_by_whom(tmp_path: Path, here: Owner) -> None:
    storage = LocalStorage(tmp_path)
    with owned(storage, here):
        with (
            pytest.raises(ConfigError, match=f"belongs to the run /runs/a .process {os.getpid()}"),
            owned(storage, replace(here, run_id="bbbb")),
        ):
            pass
        check_owner(storage, "aaaa")


def test_a_job_of_another_machine_is_not_judged(tmp_path: Path, here: Owner, dead: Owner) -> None:
    put(tmp_path, replace(dead, host="elsewhere"))
    with (
        pytest.raises(ConfigError, match=r"on elsewhere.*delete owner\.json"),
        owned(LocalStorage(tmp_path), here),
    ):
        pass


def test_the_record_of_a_dead_job_is_taken_over(tmp_path: Path, here: Owner, dead: Owner) -> None:
    put(tmp_path, dead)
    with owned(LocalStorage(tmp_path), here):
        with pytest.raises(StorageError, match="belongs to the run /runs/a"):
            check_owner(LocalStorage(tmp_path), "dead")
        check_owner(LocalStorage(tmp_path), "aaaa")


def test_a_process_id_that_was_used_again_is_another_process(tmp_path: Path, here: Owner) -> None:
    put(tmp_path, replace(here, run_id="old", started=here.started - 1))
    with owned(LocalStorage(tmp_path), here):
        check_owner(LocalStorage(tmp_path), "aaaa")


def test_an_unreadable_record_is_taken_over(tmp_path: Path, here: Owner) -> None:
    (tmp_path / OWNER_FILE).write_text("{")
    with owned(LocalStorage(tmp_path), here):
        check_owner(LocalStorage(tmp_path), "aaaa")


def test_who_was_replaced_does_not_remove_the_record(tmp_path: Path, here: Owner) -> None:
    other = replace(here, run_id="bbbb")
    with owned(LocalStorage(tmp_path), here):
        put(tmp_path, other)
        with pytest.raises(StorageError):
            check_owner(LocalStorage(tmp_path), "aaaa")
    check_owner(LocalStorage(tmp_path), "bbbb")


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path, here: Owner) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"checkpoint\.storage: .*file/c cannot be written"),
        owned(LocalStorage(tmp_path / "file" / "c"), here),
    ):
        pass


def test_a_run_of_this_process_lives_until_its_block_ends(tmp_path: Path, here: Owner) -> None:
    assert here.host == socket.gethostname()
    with owned(LocalStorage(tmp_path), here):
        assert not here.is_dead()
        (tmp_path / OWNER_FILE).rename(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / OWNER_FILE)  # as if it could not be deleted
    assert here.is_dead()
    with owned(LocalStorage(tmp_path), replace(here, run_id="bbbb")):
        check_owner(LocalStorage(tmp_path), "bbbb")
