"""What arms are measured by: images against unseen ones, probabilities of unseen texts, classes.

Each measure is lower for better. Never trains anything but the judge of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from elastic.core.data.columns import decode
from elastic.core.data.files import find_files, open_file
from elastic.core.data.text import TextWindows
from elastic.core.errors import ConfigError
from elastic.experts.arms import Arm
from elastic.experts.config import ExpertsConfig
from elastic.experts.judge import Judge, train_judge
from elastic.experts.partition import batches, subset_folders, subsets_of
from elastic.experts.quality import measure
from elastic.experts.tasks import as_inputs
from elastic.experts.team import Team

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]

_BATCH = 512
_MAX_WINDOWS = 2048
_NATS_PER_BIT = float(np.log(2))


class Test(Protocol):
    """Unseen data of one kind."""

    headline: str
    """The measure that decides."""

    def score(self, team: Team, arm: Arm, *, seed: int) -> Mapping[str, float]:
        """Measures of an arm."""
        ...


def read_table(source: str | list[str]) -> pa.Table:
    """All rows of a data set that is small enough to be judged by."""
    return pa.concat_tables(batches([open_file(place) for place in find_files(source)]))


def inputs_of(config: ExpertsConfig, table: pa.Table) -> torch.Tensor:
    """Images or inputs, shape (N, *shape)."""
    values = torch.from_numpy(np.array(decode(table.column(config.data.column))))
    return as_inputs(values, config.data.shape)


def labels_of(config: ExpertsConfig, table: pa.Table) -> torch.Tensor:
    """Classes, int64."""
    return torch.from_numpy(np.array(decode(table.column(config.data.label)))).long()


class Images:
    """Generated images beside unseen ones, by the features of a judge."""

    headline = "fid"

    def __init__(self, config: ExpertsConfig, unseen: str) -> None:
        if config.data.label is None:
            raise ConfigError("data.label is null; images are judged by what tells classes apart")
        training, table = read_table(subset_folders(config)), read_table(unseen)
        self._config, self._counts_K = config, _counts(config)
        self.training, self.labels = inputs_of(config, training), labels_of(config, training)
        self.real = inputs_of(config, table)
        self.judge: Judge = train_judge(self.training, self.labels)
        self.accuracy = self.judge.accuracy(self.real, labels_of(config, table))

    def generate(self, team: Team, arm: Arm, *, seed: int) -> torch.Tensor:
        """`evaluation.num_samples` images; the same noise for every arm."""
        settings = self._config.evaluation
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(settings.num_samples, *self._config.data.shape, generator=generator)
        own_B = _drawn_subsets(self._counts_K, len(noise), seed)
        parts = [
            team.generate(arm, noise[at], own_B[at], num_steps=settings.num_steps, seed=seed)
            for at in (slice(i, i + _BATCH) for i in range(0, len(noise), _BATCH))
        ]
        return torch.cat(parts).clamp(-1, 1)

    def score(self, team: Team, arm: Arm, *, seed: int) -> Mapping[str, float]:
        return self.judged(self.generate(team, arm, seed=seed))

    def judged(self, images: torch.Tensor) -> Mapping[str, float]:
        """Measures of any images."""
        found = measure(
            self.judge.features(images).numpy(),
            self.judge.features(self.real).numpy(),
            samples=images.numpy(),
            training=self.training.numpy(),
        )
        return asdict(found)

    def bars(self, *, seed: int = 0) -> Mapping[str, Mapping[str, float]]:
        """What needs no network: the training images again, Gaussians of classes and of all."""
        random, num = np.random.default_rng(seed), self._config.evaluation.num_samples
        flat, labels = self.training.flatten(1).double().numpy(), self.labels.numpy()
        classes = random.choice(labels, num)
        by_class = [
            _gaussian(flat[labels == one], int((classes == one).sum()), random)
            for one in np.unique(classes)
        ]
        found = {
            "memoriser": flat[random.choice(len(flat), num)],
            "Gaussian of each class": np.concatenate(by_class),
            "Gaussian of all": _gaussian(flat, num, random),
        }
        shape = (-1, *self._config.data.shape)
        nearest = float(
            torch.cdist(self.real.flatten(1), self.training.flatten(1)).min(1).values.mean()
        )
        bars = {
            name: self.judged(torch.from_numpy(one).float().clamp(-1, 1).view(shape))
            for name, one in found.items()
        }
        return {**bars, "real": {"fid": 0.0, "nearest": nearest}}


class Classes:
    """Log-loss and errors of a classifier on unseen rows."""

    headline = "log_loss"

    def __init__(self, config: ExpertsConfig, unseen: str) -> None:
        table = read_table(unseen)
        self._x, self._labels = inputs_of(config, table), labels_of(config, table)
        self._own_B = subsets_of(config, table)

    def first_answers(self, team: Team, arm: Arm) -> tuple[Floats, NDArray[np.bool_]]:
        """How sure each answer is, and whether it is right, shape (N,)."""
        sure, answer = team.predict(arm, self._x, self._own_B, seed=0).exp().max(1)
        return sure.numpy(), (answer == self._labels).numpy()

    def score(self, team: Team, arm: Arm, *, seed: int) -> Mapping[str, float]:
        log_p_BV = team.predict(arm, self._x, self._own_B, seed=seed)
        right = (log_p_BV.argmax(1) == self._labels).float().mean()
        loss = torch.nn.functional.nll_loss(log_p_BV, self._labels)
        return {"log_loss": float(loss), "error": 1 - float(right)}


class Texts:
    """Bits a byte of a language model on unseen texts; the first half of each window is the prefix
    that the router sees."""

    headline = "bits_per_byte"

    def __init__(self, config: ExpertsConfig, unseen: str) -> None:
        windows = TextWindows(unseen, config.data.column, config.data.shape[0])
        chosen = np.random.default_rng(0).permutation(len(windows))[:_MAX_WINDOWS]
        self._windows = windows.fetch(np.sort(chosen))
        self._own_B = _drawn_subsets(_counts(config), len(self._windows), 0)

    def score(self, team: Team, arm: Arm, *, seed: int) -> Mapping[str, float]:
        half, losses = self._windows.shape[1] // 2, []
        for at in range(0, len(self._windows), 64):
            windows = self._windows[at : at + 64]
            own_B = self._own_B[at : at + 64]
            log_p = team.predict_after(arm, windows[:, :-1], half, own_B, seed=seed)
            targets = windows[:, 1 + half :]
            losses.append(-log_p[:, half:].gather(2, targets[:, :, None]).flatten())
        return {"bits_per_byte": float(torch.cat(losses).mean()) / _NATS_PER_BIT}


def make_test(config: ExpertsConfig, unseen: str) -> Test:
    """The test of an experts file's kind."""
    kinds: dict[str, type[Images] | type[Classes] | type[Texts]] = {
        "flow": Images,
        "classifier": Classes,
        "language": Texts,
    }
    return kinds[config.kind](config, unseen)


def _counts(config: ExpertsConfig) -> Integers:
    """Rows of each subset."""
    return np.array(
        [
            sum(sum(open_file(place).rows_G) for place in find_files(folder))
            for folder in subset_folders(config)
        ]
    )


def _drawn_subsets(counts_K: Integers, num: int, seed: int) -> Integers:
    """One for each sample, in the proportions of the data."""
    random = np.random.default_rng((seed, 2))
    return random.choice(len(counts_K), num, p=counts_K / counts_K.sum())


def _gaussian(rows_ND: Floats, num: int, random: np.random.Generator) -> Floats:
    drawn: Floats = random.multivariate_normal(
        rows_ND.mean(0), np.cov(rows_ND, rowvar=False), num, method="eigh"
    )
    return drawn
