"""State in shared memory: whole or not there, one acting process, nothing left behind."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic.core.errors import StoreError
from elastic.core.layout import ALIGNMENT_BYTES, make_layout
from elastic.core.mapped import (
    PAGE,
    Control,
    MappedFile,
    Record,
    Sizes,
    Slot,
    Version,
    check_space,
    open_manifest,
)
from elastic.core.store import ROOT, Store, kill_and_wait, remove_leftovers

Fork = Callable[[Callable[[], None]], Any]

LAYOUT = make_layout(
    [[("a", (30,)), ("b", (9,))]],
    buffers=[("mean", (5,))],
    counters=[("steps", (), "int64", 8)],
    chunk_elements=16,
)
SIZES = Sizes(LAYOUT, 5, optimizer_keys=("m", "v"), scalar_keys=("step",), constants_bytes=100)


# --- records ---------------------------------------------------------------------------------


def new_record(payload_bytes: int = 100) -> tuple[Record, bytearray]:
    memory = bytearray(Record.size_for(payload_bytes))
    return Record(memoryview(memory)), memory


def selected(memory: bytearray, *, other: bool = False) -> int:
    """Where the payload of the selected cell begins, or that of the other one."""
    selector = int.from_bytes(memory[:8], "little") + other
    return ALIGNMENT_BYTES + (selector & 1) * (len(memory) - ALIGNMENT_BYTES) // 2 + 8


def test_a_record_is_none_before_the_first_write() -> None:
    assert new_record()[0].read() is None


def test_a_record_holds_the_last_value() -> None:
    record, memory = new_record()
    for value in (b"", b"x", b"y" * 100, b"short"):
        record.write(value)
        assert record.read() == value
        assert Record(memoryview(memory)).read() == value


def test_a_successor_goes_on_with_a_record() -> None:
    record, memory = new_record()
    record.write(b"one")
    Record(memoryview(memory)).write(b"two")
    assert record.read() == b"two"


def test_a_write_torn_by_a_crash_changes_nothing() -> None:
    record, memory = new_record()
    record.write(b"first")
    record.write(b"whole")
    for num in range(1, 13):  # the cell being written, its header included
        at = selected(memory, other=True) - 8
        memory[at : at + num] = b"\xff" * num
        assert record.read() == b"whole"
    record.write(b"next")
    assert record.read() == b"next"


@pytest.mark.parametrize("offset", [-8, -4, 0, 4], ids=["length", "checksum", "first", "last"])
def test_a_damaged_value_is_an_error_and_never_a_value(offset: int) -> None:
    record, memory = new_record()
    record.write(b"older")
    record.write(b"newer")
    memory[selected(memory) + offset] ^= 0x40
    with pytest.raises(StoreError, match="record 2 is damaged"):
        record.read()
    record.write(b"third")
    assert record.read() == b"third"


def test_a_length_beyond_the_cell_is_damage() -> None:
    record, memory = new_record()
    record.write(b"value")
    at = selected(memory) - 8
    memory[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(StoreError):
        record.read()


def test_a_value_too_large_is_refused_and_the_old_one_stays() -> None:
    record, _ = new_record(100)
    record.write(b"old")
    with pytest.raises(StoreError, match=r"record of 1000 bytes exceeds"):
        record.write(b"x" * 1000)
    assert record.read() == b"old"


def test_readers_see_whole_values_while_a_writer_writes() -> None:
    record, _ = new_record(64)
    done = threading.Event()
    seen: list[bytes | None] = []

    def read() -> None:
        while not done.is_set():
            seen.append(record.read())

    record.write(b"\x00" * 64)
    reader = threading.Thread(target=read)
    reader.start()
    for value in range(3000):
        record.write(bytes([value % 256]) * (1 + value % 64))
    done.set()
    reader.join()
    assert seen
    assert all(value and len(set(value)) == 1 for value in seen)


# --- files -----------------------------------------------------------------------------------


def test_versions_are_apart_and_reopen_with_their_values(tmp_path: Path) -> None:
    first, second = (
        Version(tmp_path, index, SIZES, writable=True, optimizer=True) for index in range(2)
    )
    assert first.states.keys() == {"m", "v"}
    assert first.scalars["step"].shape == (len(LAYOUT.chunks),)
    tensors = [first.values, first.counters, *first.states.values(), *first.scalars.values()]
    for number, tensor in enumerate(tensors, start=1):
        assert not tensor.any()
        tensor.fill_(number)
    for number, tensor in enumerate(tensors, start=1):  # they do not overlap
        assert (tensor == number).all()
    assert not second.values.any()
    assert not second.states["m"].any()
    again = Version(tmp_path, 0, SIZES, writable=False, optimizer=True)
    assert (again.values == 1).all()
    assert (again.scalars["step"] == len(tensors)).all()


def test_a_worker_maps_no_optimizer_state(tmp_path: Path) -> None:
    Version(tmp_path, 0, SIZES, writable=True, optimizer=True)
    version = Version(tmp_path, 0, SIZES, writable=False, optimizer=False)
    assert version.states == version.scalars == {}


def test_everything_in_a_version_is_aligned(tmp_path: Path) -> None:
    version = Version(tmp_path, 0, SIZES, writable=True, optimizer=True)
    slot = Slot(tmp_path, 1, SIZES, writable=True)
    for tensor in (version.values, version.counters, *version.states.values(), *slot.halves):
        assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
    assert version.scalars["step"].data_ptr() % 8 == 0


def test_a_slot_has_two_halves_that_do_not_overlap(tmp_path: Path) -> None:
    slot = Slot(tmp_path, 7, SIZES, writable=True)
    slot.progress[0] = 2**63
    for half in range(2):
        slot.halves[half].fill_(half + 1)
        slot.counters[half].fill_(half + 3)
    again = Slot(tmp_path, 7, SIZES, writable=False)
    assert again.progress[0] == 2**63
    assert [half.unique().tolist() for half in again.halves] == [[1], [2]]
    assert [counters.unique().tolist() for counters in again.counters] == [[3], [4]]


def test_control_keeps_words_records_and_rows_apart(tmp_path: Path) -> None:
    control = Control(tmp_path, SIZES, writable=True)
    control.key[0], control.heartbeat[0], control.active_pid[0] = 2**64 - 1, 2, 3
    control.prepared[0], control.term[0] = 2**64 - 2, 5
    for micro_batch in range(SIZES.num_micro_batches):
        control.done[micro_batch] = 100 + micro_batch
        control.write_row(micro_batch, bytes([micro_batch + 1]) * SIZES.row_bytes)
    control.state.write(b"s" * 8000)
    control.membership.write(b"m" * 4000)
    again = Control(tmp_path, SIZES, writable=False)
    assert (again.key[0], again.heartbeat[0], again.active_pid[0]) == (2**64 - 1, 2, 3)
    assert (again.prepared[0], again.term[0]) == (2**64 - 2, 5)
    assert list(again.done) == [100, 101, 102, 103, 104]
    assert again.state.read() == b"s" * 8000
    assert again.membership.read() == b"m" * 4000
    rows = [again.read_row(one) for one in range(SIZES.num_micro_batches)]
    assert rows == [bytes([one + 1]) * SIZES.row_bytes for one in range(SIZES.num_micro_batches)]


def test_files_are_as_large_as_was_said(tmp_path: Path) -> None:
    before = SIZES.total_bytes(max_workers=0)
    Control(tmp_path, SIZES, writable=True)
    for index in range(2):
        Version(tmp_path, index, SIZES, writable=True, optimizer=True)
    used = sum(path.stat().st_size for path in tmp_path.iterdir())
    snapshot = SIZES.parameters_bytes + SIZES.optimizer_bytes
    assert before == used + snapshot + SIZES.constants_bytes
    per_slot = SIZES.total_bytes(max_workers=3) - SIZES.total_bytes(max_workers=2)
    Slot(tmp_path, 0, SIZES, writable=True)
    open_manifest(tmp_path, 0, SIZES)
    slot = sum((tmp_path / name).stat().st_size for name in ("slot-0", "manifest-0"))
    assert per_slot == slot


def test_a_layout_without_buffers_or_state_has_files_too(tmp_path: Path) -> None:
    sizes = Sizes(make_layout([], chunk_elements=16), 1)
    version = Version(tmp_path, 0, sizes, writable=True, optimizer=True)
    assert version.values.numel() == version.counters.numel() == 0
    assert sizes.parameters_bytes == sizes.optimizer_bytes == PAGE


def test_a_read_only_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "none", PAGE, writable=False)


def test_a_file_without_room_is_refused_before_it_is_touched() -> None:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        path, size = Path(folder) / "big", 2 * shutil.disk_usage(shared).total
        with pytest.raises(StoreError, match=r"no room for \d+ MiB more"):
            MappedFile(path, size, writable=True)
        assert path.stat().st_size == 0, "a second try is refused as well"


@pytest.mark.parametrize("what", ["values", "key", "slot"])
def test_a_write_to_what_is_mapped_read_only_ends_the_process(
    what: str, tmp_path: Path, fork: Fork
) -> None:
    Version(tmp_path, 0, SIZES, writable=True, optimizer=True)
    Slot(tmp_path, 0, SIZES, writable=True)
    Control(tmp_path, SIZES, writable=True)

    def write() -> None:
        faulthandler.disable()
        if what == "values":
            version = Version(tmp_path, 0, SIZES, writable=False, optimizer=False)
            version.values[0] = 1.0
        elif what == "slot":
            Slot(tmp_path, 0, SIZES, writable=False).halves[0][0] = 1
        else:
            with contextlib.suppress(TypeError):  # a memoryview is safer than a tensor
                Control(tmp_path, SIZES, writable=False).key[0] = 1
                os.write(2, b"a read-only word was written")
            os.kill(os.getpid(), signal.SIGSEGV)

    child = fork(write)
    assert not child.is_ready
    assert child.kill() == signal.SIGSEGV


def test_memory_outlives_the_process_that_wrote_it(tmp_path: Path, fork: Fork) -> None:
    def work() -> None:
        slot = Slot(tmp_path, 3, SIZES, writable=True)
        slot.halves[1][4] = 42
        open_manifest(tmp_path, 3, SIZES).write(b"granted")

    child = fork(work)
    assert child.is_ready
    assert child.kill() == signal.SIGKILL
    assert Slot(tmp_path, 3, SIZES, writable=False).halves[1][4] == 42
    assert open_manifest(tmp_path, 3, SIZES).read() == b"granted"


def test_opening_files_leaks_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        Version(tmp_path, 0, SIZES, writable=True, optimizer=True)
        Slot(tmp_path, 0, SIZES, writable=True)
        Control(tmp_path, SIZES, writable=True)
    # Python's mmap keeps a duplicate of the descriptor, which goes with the mapping
    assert len(os.listdir("/proc/self/fd")) <= before + 1


# --- the folder ------------------------------------------------------------------------------


def test_names_carry_job_run_and_node() -> None:
    assert Store.named("lm", "1a2b", "node-3").path == ROOT / "lm.1a2b.node-3"


def test_a_store_is_created_once_and_removed_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "job.run.node")
    store.create()
    store.create()
    Slot(store.path, 0, SIZES, writable=True)
    store.close()
    store.remove()
    store.remove()
    assert not store.path.exists()


def test_slots_are_known_by_their_manifests(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.worker_ids() == []
    for worker in (11, 2, 30):
        open_manifest(store.path, worker, SIZES)
        Slot(tmp_path, worker, SIZES, writable=True)
    assert store.worker_ids() == [2, 11, 30]
    store.drop_slot(11)
    store.drop_slot(11)
    assert store.worker_ids() == [2, 30]
    assert not (tmp_path / "slot-11").exists()


def test_a_dropped_slot_is_never_seen_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fenced = Slot(tmp_path, 4, SIZES, writable=True)
    open_manifest(store.path, 4, SIZES).write(b"old")
    store.drop_slot(4)
    fenced.halves[0].fill_(9)  # its worker still maps it
    assert not Slot(tmp_path, 4, SIZES, writable=True).halves[0].any()
    assert open_manifest(store.path, 4, SIZES).read() is None


def test_one_process_acts_at_a_time(tmp_path: Path, fork: Fork) -> None:
    def act() -> None:
        assert Store(tmp_path).try_act()

    first = fork(act)
    assert first.is_ready
    store = Store(tmp_path)
    assert not store.try_act()
    assert not store.try_act()
    assert not fork(act).is_ready
    first.kill()
    assert store.try_act()
    assert store.try_act()  # it is the one that acts
    assert not fork(act).is_ready
    store.close()
    assert fork(act).is_ready


def test_a_stopped_process_keeps_its_lock_until_it_is_dead(tmp_path: Path, fork: Fork) -> None:
    child = fork(lambda: assert_acts(tmp_path))
    os.kill(child.pid, signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    store = Store(tmp_path)
    assert not store.try_act()
    assert kill_and_wait(child.pid, timeout_s=10)
    deadline_s = time.monotonic() + 10
    while not store.try_act():
        assert time.monotonic() < deadline_s
    store.close()


def assert_acts(path: Path) -> None:
    assert Store(path).try_act()


def test_a_failed_attempt_to_act_leaks_no_descriptor(tmp_path: Path, fork: Fork) -> None:
    assert fork(lambda: assert_acts(tmp_path)).is_ready
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert not Store(tmp_path).try_act()
    assert len(os.listdir("/proc/self/fd")) == before


def test_kill_and_wait_of_what_is_dead_already(fork: Fork) -> None:
    child = fork(lambda: None)
    child.kill()
    assert kill_and_wait(child.pid, timeout_s=1)


# --- leftovers -------------------------------------------------------------------------------


def abandoned(path: Path) -> Path:
    """The store of a job whose every process is gone."""
    store = Store(path)
    store.create()
    Slot(path, 0, SIZES, writable=True)
    store.close()
    return path


def age(path: Path, seconds: float) -> None:
    then_s = time.time() - seconds
    os.utime(path, (then_s, then_s))


def test_leftovers_of_dead_jobs_are_removed_and_living_ones_stay(
    tmp_path: Path, fork: Fork
) -> None:
    abandoned(tmp_path / "dead.1.local")
    living = abandoned(tmp_path / "living.2.local")
    child = fork(lambda: Store(living).create())
    assert child.is_ready
    acting = Store(tmp_path / "mine.3.local")
    acting.create()
    assert remove_leftovers(tmp_path) == ["dead.1.local"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["living.2.local", "mine.3.local"]
    assert (living / "slot-0").exists()
    child.kill()
    acting.close()
    assert remove_leftovers(tmp_path) == ["living.2.local", "mine.3.local"]
    assert remove_leftovers(tmp_path) == []


def test_a_job_lives_as_long_as_any_of_its_processes(tmp_path: Path, fork: Fork) -> None:
    path = tmp_path / "job.1.local"
    Store(path).path.mkdir()
    children = [fork(lambda: Store(path).hold_alive()) for _ in range(3)]
    for child in children:
        assert child.is_ready
        assert remove_leftovers(tmp_path) == []
        child.kill() if child is not children[-1] else None
    children[-1].kill()
    assert remove_leftovers(tmp_path) == ["job.1.local"]


def test_a_folder_without_a_lock_is_left_alone_while_it_is_young(tmp_path: Path) -> None:
    young, old = tmp_path / "young.1.local", tmp_path / "old.1.local"
    young.mkdir()
    old.mkdir()
    age(old, 3600)
    assert remove_leftovers(tmp_path) == ["old.1.local"]
    assert young.exists()


def test_what_is_not_a_store_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "something"
    other.mkdir()
    age(other, 3600)
    assert remove_leftovers(tmp_path) == []
    assert other.exists()
    assert remove_leftovers(tmp_path / "none") == []


# --- space -----------------------------------------------------------------------------------


def test_too_little_space_is_said_with_need_free_and_setting(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        check_space(2**60, root=tmp_path / "new")
    message = str(caught.value)
    assert f"{2**40} MiB of shared memory are needed" in message
    assert "MiB are free" in message
    assert "workers.max" in message


def test_enough_space_passes(tmp_path: Path) -> None:
    check_space(1, root=tmp_path)


def test_the_need_grows_with_workers_and_state() -> None:
    less = Sizes(LAYOUT, 5)
    assert SIZES.total_bytes(max_workers=4) > less.total_bytes(max_workers=4)
    assert less.total_bytes(max_workers=4) > less.total_bytes(max_workers=3)
    assert torch.float64.itemsize == 8  # scalars: what `optimizer_bytes` counts
