"""The examples: small, readable, and what their job files say."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import nn

import examples
from elastic.core.data.order import SampleStream
from elastic.core.errors import ConfigError
from elastic.core.task import Task, load_task
from elastic.core.weights import find_initial, initialize
from examples.digits.task import Digits
from examples.finetune.task import NewHead, write_pretrained
from examples.images.task import Images, write_digits
from examples.padded_text.task import PaddedText, write_docstrings
from examples.stdlib_lm.task import StdlibLM
from examples.stdlib_lm.texts import stdlib_texts, write_texts

pytestmark = pytest.mark.usefixtures("one_thread")  # as in a worker

FOLDER = Path(examples.__file__).parent
KEYS = {
    *("name", "task", "task_args", "seed", "steps", "batch", "workers"),
    *("device", "precision", "clip_norm", "checkpoint"),
}


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard library as Parquet, written by two at once."""
    path = tmp_path_factory.mktemp("data") / "new" / "stdlib.parquet"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_texts, [stdlib_texts()] * 2, [path, path]))
    return path


@pytest.mark.parametrize("name", ["stdlib_lm", "digits", "finetune", "images", "padded_text"])
def test_a_task_is_short_and_its_job_file_fits(name: str) -> None:
    assert len((FOLDER / name / "task.py").read_text().splitlines()) < 100
    job = yaml.safe_load((FOLDER / name / "job.yaml").read_text())
    assert set(job) >= KEYS
    load_task(job["task"], job["task_args"])


def test_the_standard_library_is_written_once_and_whole(stdlib: Path) -> None:
    assert [path.name for path in stdlib.parent.iterdir()] == ["stdlib.parquet"]
    metadata = pq.ParquetFile(stdlib).metadata
    size_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    assert 2**18 < size_bytes / metadata.num_row_groups < 2**22
    inode = stdlib.stat().st_ino
    data = StdlibLM(data=str(stdlib)).dataset()
    assert stdlib.stat().st_ino == inode
    assert len(data) > 20_000
    assert data.fetch(np.arange(3)).shape == (3, 129)


@pytest.mark.parametrize(("size", "millions"), [("small", 0.85), ("10m", 10.8), ("100m", 101)])
def test_sizes_are_as_named(size: str, millions: float) -> None:
    model = StdlibLM(size=size).model()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters / 1e6 == pytest.approx(millions, rel=0.02)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="'huge', allowed: small, 10m, 100m"):
        StdlibLM(size="huge").model()


def test_the_gpt_sees_no_future() -> None:
    torch.manual_seed(0)
    model = StdlibLM().model()
    text = torch.randint(0, 256, (1, 128))
    changed = text.clone()
    changed[0, 64] ^= 1
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :64], after[:, :64])
    assert not torch.equal(before[:, 64], after[:, 64])


def test_the_gpt_decays_matrices_only_and_warms_up() -> None:
    task = StdlibLM(warmup_steps=4)
    optimizer = task.optimizer(list(task.model().named_parameters()))
    decays = {(p.ndim >= 2, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert decays == {(True, 0.1), (False, 0.0)}
    assert [task.schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert StdlibLM(warmup_steps=0).schedule(0) == 1


def test_the_gpt_learns(stdlib: Path) -> None:
    task = StdlibLM(data=str(stdlib), warmup_steps=5)
    first, last = train(task, num_steps=12, size=4)
    assert first == pytest.approx(np.log(256), rel=0.1)
    assert last < first - 0.5


def test_digits_learns() -> None:
    first, last = train(Digits(), num_steps=30, size=64)
    assert first == pytest.approx(np.log(10), rel=0.2)
    assert last < 0.5


def test_digits_has_buffers_and_noise() -> None:
    task = Digits()
    model = task.model()
    assert any(name.endswith("running_mean") for name, _ in model.named_buffers())
    batch = task.dataset().fetch(np.arange(32))
    assert batch["images"].shape == (32, 1, 8, 8)
    torch.manual_seed(0)
    first = task.loss(model, batch)[0].item()
    assert task.loss(model, batch)[0].item() != first
    torch.manual_seed(0)
    assert task.loss(model, batch)[0].item() == first


def test_a_new_head_learns_on_a_frozen_backbone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "digits.safetensors"
    write_pretrained(path)
    task = NewHead()
    torch.manual_seed(0)
    model = task.model()
    targets = model.state_dict(keep_vars=True)
    with pytest.raises(ConfigError, match=r"head\.bias: shape \(5,\), the model has \(10,\)"):
        initialize(targets, find_initial(str(path)), [])
    initialize(targets, find_initial(str(path)), ["head.*"])
    before = model.backbone[0].weight.clone()
    first, last = train(task, num_steps=60, size=64, model=model)
    assert last < 0.5 < first
    assert torch.equal(model.backbone[0].weight, before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    path = tmp_path_factory.mktemp("images") / "new" / "digits.parquet"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_digits, [path, path]))
    assert [one.name for one in path.parent.iterdir()] == ["digits.parquet"]
    return Images(data=str(path))


def test_images_are_decoded_as_they_were(images: Images) -> None:
    ours = images.dataset().fetch(np.array([1700, 3]))
    theirs = Digits().dataset().fetch(np.array([1700, 3]))
    assert ours["images"].shape == (2, 1, 8, 8)
    assert torch.allclose(ours["images"], theirs["images"], atol=1 / 255)
    assert ours["labels"].tolist() == theirs["labels"].tolist()


def test_images_move_at_random_and_learn(images: Images) -> None:
    model, batch = images.model().eval(), images.dataset().fetch(np.arange(8))
    seen = set()
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        seen.add(images.loss(model, batch)[0].item())
    assert len(seen) == 3
    first, last = train(images, num_steps=40, size=64)
    assert first == pytest.approx(np.log(10), rel=0.2)
    assert last < 1.6
    correct = images.evaluate(model, batch)[2]["accuracy"]
    assert 0 <= correct <= 8


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory: pytest.TempPathFactory) -> PaddedText:
    path = tmp_path_factory.mktemp("text") / "docstrings.parquet"
    write_docstrings(path)
    return PaddedText(data=str(path))


def test_padding_counts_for_nothing(docstrings: PaddedText) -> None:
    """Texts give the same sums one by one as side by side."""
    torch.manual_seed(0)
    model = docstrings.model()
    texts = ["short", "a longer text " * 20, "ää"]
    together, weight = docstrings.loss(model, {"text": texts})
    alone = [docstrings.loss(model, {"text": [text]}) for text in texts]
    assert weight.item() == sum(one.item() for _, one in alone) == 4 + 159 + 3
    assert together.item() == pytest.approx(sum(one.item() for one, _ in alone), rel=1e-5)


def test_padded_text_learns(docstrings: PaddedText) -> None:
    data = docstrings.dataset()
    assert len(data) > 2000
    assert len({len(text) for text in data.fetch(np.arange(8))["text"]}) > 4
    task = replace(docstrings, width=64, longest=40, lr=0.01)
    first, last = train(task, num_steps=15, size=8)
    assert first == pytest.approx(np.log(256), rel=0.1)
    assert last < first - 1.5


def train(
    task: Task, *, num_steps: int, size: int, model: nn.Module | None = None
) -> tuple[float, float]:
    """Plain training with one micro-batch a step; the first loss and the last."""
    torch.manual_seed(0)
    model, data = model or task.model(), task.dataset()
    optimizer = task.optimizer(list(model.named_parameters()))
    stream = SampleStream(num_samples=len(data), held_out=100, seed=0, split_seed=0)
    losses = []
    for step in range(num_steps):
        loss_sum, weight, *_ = task.loss(model, data.fetch(stream.micro_batch(step, 0, 1, size)))
        optimizer.zero_grad()
        (loss_sum / weight).backward()
        optimizer.step()
        losses.append(loss_sum.item() / weight)
    return losses[0], losses[-1]
