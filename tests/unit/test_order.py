"""Which samples a micro-batch holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.core.data.order import SampleStream, digest
from elastic.core.errors import DataError


@given(
    num_samples=st.integers(1, 200),
    held_out_share=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 50),
)
def test_each_sample_comes_once_an_epoch_however_it_is_cut(
    num_samples: int, held_out_share: float, seed: int, batch: int
) -> None:
    held_out = int(num_samples * held_out_share)
    stream = SampleStream(num_samples=num_samples, held_out=held_out, seed=seed, split_seed=3)
    length = stream.num_training
    num_batches = -(-3 * length // batch)
    seen = np.concatenate([stream.micro_batch(step, 0, 1, batch) for step in range(num_batches)])
    held = set(stream.held_out_samples().tolist())
    assert len(held) == held_out
    for epoch in range(3):
        in_epoch = seen[epoch * length : (epoch + 1) * length].tolist()
        assert sorted([*in_epoch, *held]) == list(range(num_samples))


def test_micro_batches_cut_the_stream_in_order() -> None:
    stream = SampleStream(num_samples=50, held_out=7, seed=1, split_seed=2)
    whole = stream.training(np.arange(6 * 4 * 3))
    parts = [stream.micro_batch(step, m, 4, 3) for step in range(6) for m in range(4)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_seeds_change_the_order_and_only_the_split_seed_the_split() -> None:
    def stream(seed: int, split_seed: int) -> SampleStream:
        return SampleStream(num_samples=1000, held_out=100, seed=seed, split_seed=split_seed)

    first = np.arange(900)
    order = stream(0, 0).training(first).tolist()
    assert order != stream(1, 0).training(first).tolist()
    assert order != stream(0, 0).training(first + 900).tolist()  # the next epoch
    held = stream(0, 0).held_out_samples().tolist()
    assert held == stream(1, 0).held_out_samples().tolist()
    assert held != stream(0, 1).held_out_samples().tolist()


def test_a_set_of_10_to_the_12_needs_no_index() -> None:
    stream = SampleStream(num_samples=10**12, held_out=10**6, seed=0, split_seed=0)
    indices = stream.micro_batch(10**9, 3, 16, 8)
    assert len(set(indices.tolist())) == 8
    assert 0 <= indices.min() <= indices.max() < 10**12


def test_the_order_never_changes() -> None:
    stream = SampleStream(num_samples=100, held_out=10, seed=7, split_seed=1)
    assert stream.micro_batch(2, 1, 4, 5).tolist() == [27, 66, 22, 52, 30]
    assert stream.held_out_samples().tolist() == [62, 11, 46, 45, 94, 24, 83, 28, 25, 79]


@pytest.mark.parametrize("held_out", [10, 11, -1])
def test_a_split_that_leaves_nothing_is_refused(held_out: int) -> None:
    with pytest.raises(DataError, match=f"held_out is {held_out}"):
        SampleStream(num_samples=10, held_out=held_out, seed=0, split_seed=0)


def test_digest_names_a_sequence() -> None:
    assert digest(np.array([1, 2, 3])).hex() == "abccad42d03c940bc2b249bf5a4e1e3d"
    assert digest(np.array([1, 2, 3], dtype=">i8")) == digest(np.array([1, 2, 3]))
    assert digest(np.arange(6)[::2]) == digest(np.array([0, 2, 4]))
    assert digest(np.array([2, 1, 3])) != digest(np.array([1, 2, 3]))
