"""A device with memory of its own gives the bits of the host: here it is the host in disguise."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from actors.worker import WorkerShell
from elastic.core.device import Accelerator, Host, check_device, make_device, to_device
from elastic.core.errors import ConfigError
from elastic.core.layout import Layout, make_layout
from elastic.core.mapped import Sizes, Slot
from elastic.core.protocol.messages import Commit, Key, Lease
from elastic.core.protocol.worker import Exit, Send
from tests.unit.test_compute import run
from tests.unit.test_update import Trainer

MakeNode = Callable[..., Any]
CPU = torch.device("cpu")
LAYOUT = make_layout(
    [[("a", (70, 50)), ("b", (9,))], [("c", (33,))]],
    buffers=[("d", (5,))],
    chunk_elements=1024,
)


def values(seed: int) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    one, two, _, four = (torch.randn(field.shape, generator=generator) for field in LAYOUT.fields)
    return [one, two, None, four]


def test_maxima_and_sums_are_those_of_the_host(tmp_path: Any) -> None:
    slots = [Slot(tmp_path, worker, Sizes(LAYOUT, 4), writable=True) for worker in range(2)]
    exponents = np.arange(len(LAYOUT.chunks), dtype=np.int64) + 18
    devices = Host(LAYOUT), Accelerator(LAYOUT, CPU)
    half, base = 0, None
    for seed in range(3):
        maxima = [device.maxima(values(seed)) for device in devices]
        assert maxima[0].tobytes() == maxima[1].tobytes()
        for device, slot in zip(devices, slots, strict=True):
            device.add(values(seed), exponents, slot, half=half, base=base)
            device.wait()
            assert device.arrived()
        used = [
            torch.cat([slot.halves[half][one.start : one.stop] for one in LAYOUT.fields])
            for slot in slots
        ]
        assert torch.equal(*used)
        assert used[0].abs().max() > 2**17
        half, base = 1 - half, half


def test_a_nan_is_seen(tmp_path: Any) -> None:
    broken = values(0)
    assert broken[1] is not None
    broken[1][3] = torch.nan
    host, device = (one.maxima(broken) for one in (Host(LAYOUT), Accelerator(LAYOUT, CPU)))
    assert np.array_equal(np.isnan(host), np.isnan(device))
    assert np.isnan(device).any()


def test_parameters_are_brought_once_for_each_key() -> None:
    device = Accelerator(LAYOUT, CPU)
    source = torch.ones(LAYOUT.num_elements)
    assert device.bring(source, (0, False))[7] == 1
    source.fill_(2.0)
    assert device.bring(source, (0, False))[7] == 1
    assert device.bring(source, (1, False))[7] == 2
    average = torch.full((LAYOUT.num_parameter_elements,), 3.0)
    assert device.bring(average, (1, True)).tolist() == average.tolist()
    assert device.bring(source, (1, False))[7] == 2


def test_steps_on_a_device_equal_those_on_the_host(make_node: MakeNode) -> None:
    """The whole step, BatchNorm, counters and dropout, on workers of both kinds at once."""
    results = []
    for accelerators in (0, 1, 2):
        node = make_node(clip_norm=1.0)
        trainer = Trainer(node)
        for worker in range(accelerators):
            trainer.workers[worker] = node.worker(Accelerator(node.spec.layout, CPU))
        results.append(trainer.run(4))
    for result in results[1:]:
        assert all(torch.equal(result[name], value) for name, value in results[0].items())


def test_an_abandoned_version_is_not_taken_for_another(make_node: MakeNode) -> None:
    node = make_node()
    computer = node.worker(Accelerator(node.spec.layout, CPU))
    first = run(node, computer, 0)
    computer.warm_up()
    assert run(node, computer, 0) == first


def test_frozen_parameters_and_buffers_are_on_the_device(
    make_node: MakeNode, tiny_task: Any
) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model[0].requires_grad_(False)
        return model

    answers = []
    for kind in (Host, lambda layout: Accelerator(layout, CPU)):
        node = make_node(tiny_task(build))
        answers.append(run(node, node.worker(kind(node.spec.layout)), 1))
    assert answers[0] == answers[1]


Pair = namedtuple("Pair", "left right")


def test_a_micro_batch_keeps_its_structure() -> None:
    tensor = torch.arange(3)
    data = {"a": [tensor, ("x", tensor)], "b": Pair(tensor, 5), "c": None}
    moved = to_device(data, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][1].device.type == "meta"
    assert isinstance(moved["b"], Pair)
    assert (moved["b"].right, moved["c"], moved["a"][1][0]) == (5, None, "x")
    assert to_device(tensor, CPU) is tensor


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_missing_device_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"device is cuda, and torch .* sees no CUDA device"):
        check_device("cuda")
    with pytest.raises(ConfigError, match="set device: cpu"):
        make_device("cuda", LAYOUT, 0)
    assert isinstance(make_device("cpu", LAYOUT, 0), Host)


# --- asking once the sum has arrived ---------------------------------------------------------


class Lagging(Accelerator):
    """Its sums arrive when the test says so, or when somebody waits."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, CPU)
        self.here = False

    def arrived(self) -> bool:
        return self.here

    def wait(self) -> None:
        self.here = True


@pytest.fixture
def shell() -> Any:
    """A worker's shell whose channel keeps what is sent."""
    shell: Any = WorkerShell(SimpleNamespace(), 0, 0)  # type: ignore[arg-type]
    shell.sent = []
    shell._channel = SimpleNamespace(send=shell.sent.append)
    words = {"key_word": lambda: 1, "round_word": lambda: 0}
    shell._computed = SimpleNamespace(device=Lagging(LAYOUT), **words)
    shell._models = [shell._computed]
    return shell


COMMIT = Commit(Lease(Key(0, 0, 0), (1,)), 0, 0, ())


def play(shell: Any, *actions: Any) -> None:
    shell._protocol = SimpleNamespace(handle=lambda event, words, round_word: list(actions))
    shell._handle(None)


def test_a_worker_asks_once_its_sum_has_arrived(shell: Any) -> None:
    play(shell, Send(COMMIT))
    shell._send_held()
    assert shell.sent == []
    shell._computed.device.here = True
    shell._send_held()
    shell._send_held()
    assert shell.sent == [COMMIT]


def test_other_messages_do_not_wait(shell: Any) -> None:
    other: Any = object()
    play(shell, Send(COMMIT), Send(other), Exit("done"))
    assert shell.sent == [other]
    assert shell._exit == "done"
