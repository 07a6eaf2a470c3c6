"""Where checkpoints lie: a folder of this machine, or one at any URI that `pyarrow.fs` knows.

A storage holds entries, folders named step-..., of a few files of which the seal vouches for the
others. It publishes an entry whole or not at all: a folder is renamed, a bucket gets the seal last,
and what has no seal there is no entry. Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from elastic.core.errors import ConfigError, StorageError

SCHEMES = ("s3", "gs", "gcs", "hdfs", "abfs", "abfss", "file")
ALLOWED = "an absolute path or a URI such as s3://bucket/folder, gs://bucket/folder"
PREFIX = "step-"
SEAL_FILE = "meta.json.sha256"
_COPY_BYTES = 8 << 20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Storage(Protocol):
    """A place that holds checkpoints. Its methods raise `StorageError` where it refuses."""

    location: str
    """Path or URI, as messages and results give it."""

    def names(self) -> list[str]:
        """Published entries, in no order."""
        ...

    def leftovers(self) -> list[str]:
        """What a writer that died has left: perhaps readable, never to be counted."""
        ...

    def stage(self, name: str) -> Path:
        """An empty folder of this machine to fill and then `publish`, or remove."""
        ...

    def publish(self, new: Path, name: str) -> None:
        """Make what was staged an entry, in place of one of that name."""
        ...

    def fetch(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """The entry as a folder of this machine, for the length of a `with` block."""
        ...

    def remove(self, name: str) -> None:
        """Remove an entry or leftover. At no time does a part of it look like an entry."""
        ...

    def read(self, file: str) -> bytes | None:
        """The content of a file; None if there is none."""
        ...

    def write(self, file: str, data: bytes, *, replace: bool) -> bool:
        """Write a small file whole. False if it is there already and not to be replaced."""
        ...

    def delete(self, file: str) -> None:
        """Remove a small file, if it is there."""
        ...


def is_uri(location: str | Path) -> bool:
    """Whether `location` is a URI and not a path."""
    return _SCHEME.match(str(location)) is not None


def check_location(location: str) -> None:
    """Refuse what is neither an absolute path nor a URI of a known kind. Opens nothing.

    Raises:
        ValueError: it is something else, or holds a password.
    """
    if not is_uri(location):
        if not os.path.isabs(location):
            raise ValueError(f"got {location!r}; needs {ALLOWED}")
        return
    parts = urlsplit(location)
    if parts.scheme.lower() not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise ValueError(f"got {location!r}; needs {ALLOWED}: known schemes are {known}")
    if parts.password is not None:
        shown = location.replace(f":{parts.password}@", ":...@")
        raise ValueError(
            f"got {shown!r}, which holds a password; it would be written into the run folder:"
            " needs credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    if parts.scheme != "file" and not parts.netloc:
        raise ValueError(f"got {location!r}, which names no bucket; needs {ALLOWED}")


def below(location: str | Path, name: str) -> str:
    """The path or URI of `name` in the folder `location`."""
    if not is_uri(location):
        return str(Path(location) / name)
    parts = urlsplit(str(location))
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def split(location: str | Path) -> tuple[str, str]:
    """The folder that a path or URI lies in, and its last part."""
    if not is_uri(location):
        path = Path(location)
        return str(path.parent), path.name
    parts = urlsplit(str(location))
    folder, _, name = parts.path.rstrip("/").rpartition("/")
    return urlunsplit(parts._replace(path=folder)), name


def open_storage(location: str | Path) -> Storage:
    """The storage at a path or URI. Does not look whether it is there.

    Raises:
        ConfigError: it is no path and no URI that can be opened.
    """
    if not is_uri(location):
        return LocalStorage(Path(location))
    from pyarrow import ArrowException, fs  # only who uses a bucket pays for it

    try:
        check_location(str(location))
        filesystem, path = fs.FileSystem.from_uri(str(location))
    except (ValueError, OSError, ArrowException) as error:
        raise ConfigError(f"{location}: cannot be opened: {error}") from error
    if filesystem.type_name == "local":
        return LocalStorage(Path(path))
    return RemoteStorage(str(location), filesystem, path.rstrip("/"))


class LocalStorage:
    """A folder of this machine. Entries are made under a hidden name, then renamed."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder

    def names(self) -> list[str]:
        return [path.name for path in self._folder.glob(f"{PREFIX}*") if path.is_dir()]

    def leftovers(self) -> list[str]:
        """Entries that stepped aside for a rename that never came."""
        return [path.name for path in self._folder.glob(f".{PREFIX}*.old")]

    def stage(self, name: str) -> Path:
        with _reported(self.location):
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob(f".{PREFIX}*.new"):
                shutil.rmtree(path, ignore_errors=True)
            new = self._folder / f".{name}.new"
            new.mkdir()
            return new

    def publish(self, new: Path, name: str) -> None:
        """Bring it to disk, and rename. An entry in the way steps aside, and is read there if we
        die in between."""
        with _reported(self.location):
            for file in (*new.iterdir(), new):
                _sync(file)
            if (self._folder / name).exists():
                self._set_aside(name)
            new.rename(self._folder / name)
            _sync(self._folder)
            for old in self.leftovers():
                shutil.rmtree(self._folder / old, ignore_errors=True)

    @contextlib.contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        yield self._folder / name

    def remove(self, name: str) -> None:
        with _reported(self.location):
            aside = self._set_aside(name)  # half removed it must not look like a damaged entry
            shutil.rmtree(aside, ignore_errors=True)

    def _set_aside(self, name: str) -> Path:
        old = self._folder / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        (self._folder / name).rename(old)
        return old

    def read(self, file: str) -> bytes | None:
        with _reported(self.location):
            try:
                return (self._folder / file).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, file: str, data: bytes, *, replace: bool) -> bool:
        """Whole, through a file of another name: a link to it is refused if the file is there."""
        with _reported(self.location):
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = self._folder / f".{file}.{os.getpid()}.partial"
            partial.write_bytes(data)
            try:
                if replace:
                    partial.replace(self._folder / file)
                else:
                    os.link(partial, self._folder / file)
            except FileExistsError:
                return False
            finally:
                partial.unlink(missing_ok=True)
            return True

    def delete(self, file: str) -> None:
        with _reported(self.location):
            (self._folder / file).unlink(missing_ok=True)


class RemoteStorage:
    """A folder of a `pyarrow.fs` file system. Entries pass through TMPDIR of this machine."""

    def __init__(self, location: str, filesystem: Any, path: str) -> None:
        self.location = location
        self._fs = filesystem
        self._path = path

    def names(self) -> list[str]:
        """Sealed entries; one request for every thousand objects."""
        return sorted(name for name, files in self._listed().items() if SEAL_FILE in files)

    def leftovers(self) -> list[str]:
        """Half-uploaded or half-removed ones."""
        return sorted(name for name, files in self._listed().items() if SEAL_FILE not in files)

    def _listed(self) -> dict[str, set[str]]:
        from pyarrow import fs

        selector = fs.FileSelector(self._path, allow_not_found=True, recursive=True)
        with _reported(self.location):
            infos = self._fs.get_file_info(selector)
        found: dict[str, set[str]] = {}
        for info in infos:
            name, slash, file = info.path.removeprefix(f"{self._path}/").partition("/")
            if slash and info.is_file and name.startswith(PREFIX):
                found.setdefault(name, set()).add(file)
        return found

    def stage(self, name: str) -> Path:
        with _reported(tempfile.gettempdir()):
            return Path(tempfile.mkdtemp(prefix=f"elastic-{name}-"))

    def publish(self, new: Path, name: str) -> None:
        """Upload the seal last. One of that name loses its seal first, and is a leftover then."""
        with _reported(self.location):
            self._delete_file(f"{self._path}/{name}/{SEAL_FILE}")
            for leftover in self.leftovers():
                self._fs.delete_dir(f"{self._path}/{leftover}")
            self._fs.create_dir(f"{self._path}/{name}", recursive=True)
            for file in sorted(new.iterdir(), key=_what_it_vouches_for):
                with (
                    file.open("rb") as source,
                    self._fs.open_output_stream(f"{self._path}/{name}/{file.name}") as target,
                ):
                    shutil.copyfileobj(source, target, _COPY_BYTES)
        shutil.rmtree(new, ignore_errors=True)

    @contextlib.contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=f"elastic-{name}-") as folder:
            with _reported(self.location):
                self._download(name, Path(folder))
            yield Path(folder)

    def _download(self, name: str, folder: Path) -> None:
        from pyarrow import fs

        selector = fs.FileSelector(f"{self._path}/{name}", allow_not_found=True)
        for info in self._fs.get_file_info(selector):
            if info.is_file:
                with (
                    self._fs.open_input_stream(info.path) as source,
                    (folder / info.base_name).open("wb") as target,
                ):
                    shutil.copyfileobj(source, target, _COPY_BYTES)

    def remove(self, name: str) -> None:
        with _reported(self.location):
            self._delete_file(f"{self._path}/{name}/{SEAL_FILE}")
            self._fs.delete_dir(f"{self._path}/{name}")

    def read(self, file: str) -> bytes | None:
        with _reported(self.location):
            try:
                with self._fs.open_input_stream(f"{self._path}/{file}") as source:
                    data: bytes = source.read()
                    return data
            except FileNotFoundError:
                return None

    def write(self, file: str, data: bytes, *, replace: bool) -> bool:
        """Between two that write at once the later wins: look again whose it is."""
        if not replace and self.read(file) is not None:
            return False
        with _reported(self.location):
            self._fs.create_dir(self._path, recursive=True)
            with self._fs.open_output_stream(f"{self._path}/{file}") as target:
                target.write(data)
        return self.read(file) == data

    def delete(self, file: str) -> None:
        with _reported(self.location):
            self._delete_file(f"{self._path}/{file}")

    def _delete_file(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(path)


@contextlib.contextmanager
def _reported(location: str) -> Iterator[None]:
    """Say where it was that something was refused."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{error.filename or location}: {reason}") from error


def _what_it_vouches_for(file: Path) -> tuple[bool, str]:
    """Sorts tensors first, then what describes them, then its seal."""
    return SEAL_FILE.startswith(file.name), file.name


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
