"""How good generated samples are: Fréchet distance, precision, recall, coverage, memorisation.

Pure functions of features that somebody else made. All but the last depend on the number of
samples: compare at equal numbers only. Letters: N real samples, M generated ones, F features.

Sources: Heusel et al. (arXiv 1706.08500) for the Fréchet distance; Kynkäänniemi et al. (arXiv
1904.06991) for precision and recall; Naeem et al. (arXiv 2002.09797) for coverage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

NEIGHBOURS = 5


@dataclass(frozen=True, slots=True)
class Quality:
    """What samples are worth beside real ones that no model has seen.

    Attributes:
        fid: Fréchet distance of Gaussians fitted to the features; 0 is best.
        precision: share of the generated that lie among the real.
        recall: share of the real that lie among the generated.
        coverage: share of the real that have a generated one near.
        nearest: mean distance to the nearest training sample, in pixels; much less than that of
            `nearest` of real samples means that the model remembers.
    """

    fid: float
    precision: float
    recall: float
    coverage: float
    nearest: float


def measure(
    generated_MF: Floats,
    real_NF: Floats,
    *,
    samples: Floats,
    training: Floats,
) -> Quality:
    """Compare features of generated samples with those of real ones.

    Args:
        samples: the generated as they are, shape (M, ...).
        training: what the model was trained on, likewise.
    """
    precision, recall, coverage = neighbourhoods(generated_MF, real_NF)
    flat, known = samples.reshape(len(samples), -1), training.reshape(len(training), -1)
    nearest = float(_distances(flat, known).min(1).mean())
    return Quality(frechet(generated_MF, real_NF), precision, recall, coverage, nearest)


def frechet(first_NF: Floats, second_MF: Floats) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to both."""
    mean_1, mean_2 = first_NF.mean(0), second_MF.mean(0)
    cov_1 = np.atleast_2d(np.cov(first_NF, rowvar=False))
    cov_2 = np.atleast_2d(np.cov(second_MF, rowvar=False))
    root_1 = _root(cov_1)
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root_1 @ cov_2 @ root_1), 0, None)).sum()
    return float(np.square(mean_1 - mean_2).sum() + np.trace(cov_1 + cov_2) - 2 * shared)


def neighbourhoods(
    generated_MF: Floats, real_NF: Floats, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float, float]:
    """Precision, recall, coverage: who lies within the distance of another's k-th neighbour."""
    real_N = _radius(real_NF, neighbours)
    generated_M = _radius(generated_MF, neighbours)
    apart_MN = _distances(generated_MF, real_NF)
    precision = (apart_MN <= real_N).any(1).mean()
    recall = (apart_MN <= generated_M[:, None]).any(0).mean()
    coverage = (apart_MN.min(0) <= real_N).mean()
    return float(precision), float(recall), float(coverage)


def interval(values: Floats, *, share: float = 0.90, seed: int = 0) -> tuple[float, float]:
    """Bounds of the mean by the t distribution; equal to it where there is one value.

    The quantile is simulated (10^5 draws of the given seed), so that nothing else is needed.
    """
    num = len(values)
    if num < 2:
        return float(values.mean()), float(values.mean())
    draws = np.random.default_rng(seed).standard_t(num - 1, 100_000)
    half = np.quantile(np.abs(draws), share) * values.std(ddof=1) / np.sqrt(num)
    return float(values.mean() - half), float(values.mean() + half)


def _root(matrix: Floats) -> Floats:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    root: Floats = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def _distances(first: Floats, second: Floats) -> Floats:
    apart: Floats = torch.cdist(
        torch.from_numpy(np.ascontiguousarray(first, dtype=np.float64)),
        torch.from_numpy(np.ascontiguousarray(second, dtype=np.float64)),
    ).numpy()
    return apart


def _radius(points: Floats, neighbours: int) -> Floats:
    """Distance of each point to its k-th neighbour among the others."""
    apart = _distances(points, points)
    np.fill_diagonal(apart, np.inf)
    radius: Floats = np.partition(apart, neighbours - 1, axis=1)[:, neighbours - 1]
    return radius
