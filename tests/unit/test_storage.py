"""A storage shows whole checkpoints or none, on a disk as in a bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from elastic.core.checkpoint import (
    MODEL_FILE,
    checkpoint_steps,
    find_checkpoint,
    latest_checkpoint,
    read_checkpoint,
    read_meta,
    remove_checkpoint,
    write_checkpoint,
)
from elastic.core.errors import CheckpointError, ConfigError, StorageError
from elastic.core.storage import (
    SEAL_FILE,
    LocalStorage,
    RemoteStorage,
    below,
    check_location,
    is_uri,
    open_storage,
    split,
)
from tests.s3 import Bucket, new_bucket, s3_server

QUERY = "?endpoint_override=127.0.0.1:9&scheme=http"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def bucket(port: int) -> Bucket:
    return new_bucket(port)


@pytest.fixture(params=["folder", "file URI", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for checkpoints that does not exist yet."""
    if request.param == "bucket":
        bucket: Bucket = request.getfixturevalue("bucket")
        return bucket.uri("runs/a/checkpoints")
    path = tmp_path / "a" / "b"
    return str(path) if request.param == "folder" else f"file://{path}"


def write(location: str, step: int, **meta: object) -> str:
    return write_checkpoint(
        open_storage(location),
        step=step,
        weights={"weight": torch.full((20, 30), float(step))},
        state={"number": torch.tensor(step)},
        meta=meta,
    )


def test_what_is_written_is_found_and_removed(location: str) -> None:
    storage = open_storage(location)
    assert latest_checkpoint(location) is None
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        find_checkpoint(location)
    path = write(location, 5, loss=0.5)
    newest = write(location, 100_000_000)
    assert checkpoint_steps(storage) == {5: "step-00000005", 100_000_000: "step-100000000"}
    assert latest_checkpoint(location) == newest
    assert find_checkpoint(location).path == newest
    read = read_checkpoint(path)
    assert (read.step, read.meta, read.path) == (5, {"loss": 0.5}, path)
    assert torch.equal(read.weights["weight"], torch.full((20, 30), 5.0))
    assert read_meta(storage, 5) == {"loss": 0.5}
    assert read_meta(storage, 6) is None
    remove_checkpoint(storage, 5)
    assert checkpoint_steps(storage).keys() == {100_000_000}
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_a_checkpoint_of_the_same_step_is_replaced(location: str) -> None:
    path = write(location, 5, which="first")
    assert write(location, 5, which="second") == path
    assert read_checkpoint(path).meta == {"which": "second"}
    assert checkpoint_steps(open_storage(location)).keys() == {5}


def test_small_files(location: str) -> None:
    storage = open_storage(location)
    assert storage.read("owner.json") is None
    storage.delete("owner.json")
    assert storage.write("owner.json", b"a", replace=False)
    assert not storage.write("owner.json", b"b", replace=False)
    assert storage.read("owner.json") == b"a"
    assert storage.write("owner.json", b"c", replace=True)
    assert storage.read("owner.json") == b"c"
    storage.delete("owner.json")
    assert storage.read("owner.json") is None
    assert storage.names() == storage.leftovers() == []


class FailingUpload(RemoteStorage):
    """Refuses the file of one name."""

    def __init__(self, location: str, refused: str) -> None:
        there = open_storage(location)
        assert isinstance(there, RemoteStorage)
        super().__init__(location, _Refusing(there._fs, refused), there._path)


class _Refusing:
    def __init__(self, filesystem: object, refused: str) -> None:
        self._filesystem, self._refused = filesystem, refused

    def __getattr__(self, name: str) -> object:
        return getattr(self._filesystem, name)

    def open_output_stream(self, path: str) -> object:
        if path.endswith(self._refused):
            raise OSError(f"{path}: access denied")
        return self._filesystem.open_output_stream(path)  # type: ignore[attr-defined]


@pytest.mark.parametrize("refused", [MODEL_FILE, "meta.json", SEAL_FILE])
def test_a_half_uploaded_checkpoint_is_none(bucket: Bucket, refused: str) -> None:
    location = bucket.uri("c")
    good = write(location, 1)
    weights = {"weight": torch.ones(3)}
    with pytest.raises(StorageError, match="access denied"):
        write_checkpoint(
            FailingUpload(location, refused), step=2, weights=weights, state={}, meta={}
        )
    storage = open_storage(location)
    assert checkpoint_steps(storage).keys() == {1}
    assert latest_checkpoint(location) == good
    found = find_checkpoint(location)
    assert found.path == good
    assert storage.leftovers() == ([] if refused == MODEL_FILE else ["step-00000002"])
    assert len(found.damaged) == len(storage.leftovers())
    assert all("step-00000002" in problem for problem in found.damaged)
    write(location, 3)
    assert storage.leftovers() == []
    assert checkpoint_steps(storage).keys() == {1, 3}


def truncate(storage: RemoteStorage, name: str) -> None:
    data = storage.read(name)
    assert data is not None
    storage.write(name, data[:-1], replace=True)


DAMAGE: dict[str, tuple[Callable[[RemoteStorage, str], object], str]] = {
    "truncated": (lambda s, n: truncate(s, f"{n}/{MODEL_FILE}"), "bytes where"),
    "missing": (lambda s, n: s.delete(f"{n}/{MODEL_FILE}"), "No such file"),
    "other seal": (lambda s, n: s.write(f"{n}/{SEAL_FILE}", b"0", replace=True), "its sha256"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_in_a_bucket_is_named_and_the_one_before_used(
    bucket: Bucket, damage: Callable[[RemoteStorage, str], object], message: str
) -> None:
    location = bucket.uri("c")
    good, bad = write(location, 1), write(location, 2)
    storage = open_storage(location)
    assert isinstance(storage, RemoteStorage)
    damage(storage, "step-00000002")
    found = find_checkpoint(location)
    assert found.path == good
    assert len(found.damaged) == 1
    assert message in found.damaged[0]
    assert bad in found.damaged[0]


def test_an_unreachable_bucket_is_no_damaged_checkpoint(bucket: Bucket) -> None:
    """Then an older checkpoint must not be taken in its place."""
    location = bucket.uri("c")
    write(location, 1)
    gone = RemoteStorage(location, _Unreachable(), "bucket/c")
    for ask in (gone.names, gone.leftovers, lambda: read_meta(gone, 1)):
        with pytest.raises(StorageError, match="could not connect"):
            ask()


class _Unreachable:
    def __getattr__(self, name: str) -> object:
        def refuse(*_: object) -> object:
            raise OSError("could not connect")

        return refuse


def test_a_missing_bucket_is_refused_with_its_name(bucket: Bucket) -> None:
    location = bucket.uri("c")
    bucket.drop()
    with pytest.raises(StorageError, match=f"(?i){bucket.name}.*not"):
        write(location, 1)


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        write(str(tmp_path / "file" / "checkpoints"), 1)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/a/b", "/a/b/x"),
        ("/a/b/", "/a/b/x"),
        ("s3://bucket", "s3://bucket/x"),
        ("s3://bucket/a/", "s3://bucket/a/x"),
        ("s3://bucket/a" + QUERY, "s3://bucket/a/x" + QUERY),
    ],
)
def test_paths_and_uris_are_joined_and_split(folder: str, expected: str) -> None:
    assert below(folder, "x") == expected
    assert split(expected)[1] == "x"
    assert below(split(expected)[0], "x") == expected
    assert is_uri(folder) == folder.startswith("s3")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("checkpoints", "needs an absolute path or a URI"),
        ("~/checkpoints", "needs an absolute path"),
        ("s4://bucket/a", "known schemes are s3, gs"),
        ("https://host/a", "known schemes are"),
        ("s3:///a", "names no bucket"),
        ("s3://key:secret@bucket/a", r"s3://key:\.\.\.@bucket/a.*AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_wrong_location_is_refused_in_words(location: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_location(location)
    assert "secret@" not in str(caught.value)


def test_a_uri_that_cannot_be_opened_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_storage("s3://bucket/a?nonsense=1")


def test_a_local_entry_is_staged_beside_the_others(tmp_path: Path) -> None:
    """So that the rename does not cross file systems."""
    assert LocalStorage(tmp_path / "c").stage("step-1").parent == tmp_path / "c"
