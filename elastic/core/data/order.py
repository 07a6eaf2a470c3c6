"""Which samples a micro-batch holds: a pure function of the seed.

`SampleStream` names the samples of any micro-batch of any step at once, for whoever asks. It must
never keep an index array or any other memory of what was asked before.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from elastic.core.errors import DataError
from elastic.core.permutation import derive_key, permute

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStream:
    """The endless stream of training samples: epochs one after the other, each shuffled anew.

    Sample i of the stream is position i mod N of epoch i div N, with N = num_samples - held_out,
    so a batch may span epochs and every epoch holds each training sample exactly once. The split
    depends on `split_seed` only: jobs with other seeds hold out the same samples.

    Raises:
        DataError: `held_out` leaves nothing to train on.
    """

    num_samples: int
    held_out: int
    seed: int
    split_seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < self.num_samples:
            raise DataError(
                f"held_out is {self.held_out}, must be at least 0 and less than the"
                f" {self.num_samples} samples of the data set"
            )

    @property
    def num_training(self) -> int:
        """Samples in one epoch."""
        return self.num_samples - self.held_out

    def training(self, stream_positions: Int64Array) -> Int64Array:
        """Sample indices at `stream_positions` (any shape, each >= 0) of the stream."""
        positions = np.asarray(stream_positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_training)
        shuffled = np.empty_like(positions)
        for epoch in sorted(set(epochs.reshape(-1).tolist())):
            in_epoch = epochs == epoch
            key = derive_key("epoch", self.seed, epoch)
            shuffled[in_epoch] = permute(within[in_epoch], self.num_training, key)
        return self._split(shuffled + self.held_out)

    def held_out_samples(self) -> Int64Array:
        """Indices of the samples that training never sees, shape (held_out,)."""
        return self._split(np.arange(self.held_out, dtype=np.int64))

    def micro_batch(
        self, step: int, micro_batch: int, micro_batches: int, micro_batch_size: int
    ) -> Int64Array:
        """Sample indices of one of the `micro_batches` of a step, shape (micro_batch_size,)."""
        start = (step * micro_batches + micro_batch) * micro_batch_size
        return self.training(np.arange(start, start + micro_batch_size, dtype=np.int64))

    def _split(self, positions: Int64Array) -> Int64Array:
        """The split permutation of all samples; positions below `held_out` are held out."""
        if not self.held_out:
            return positions
        return permute(positions, self.num_samples, derive_key("split", self.split_seed))


def digest(indices: Int64Array) -> bytes:
    """16 bytes that name a sequence of sample indices, on a machine of any byte order."""
    return blake2b(np.ascontiguousarray(indices, dtype="<i8").tobytes(), digest_size=16).digest()


def check_indices(indices: Int64Array, num_samples: int) -> None:
    """Raise `IndexError` unless all are in range(num_samples)."""
    if len(indices) and not (indices.min() >= 0 and indices.max() < num_samples):
        raise IndexError(
            f"samples {indices.min()}..{indices.max()} are not all in range({num_samples})"
        )
