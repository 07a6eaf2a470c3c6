"""k-means, in two steps as for decentralized experts, and with subsets of even size if wanted.

Works on rows that are in memory: of a larger data set on a sample, whose centres then take in the
rest. Randomness comes from a seed only. Letters: N rows, F features, K centres.

Sources: k-means++ (Arthur and Vassilvitskii, 2007); two steps as in Decentralized Diffusion Models
(arXiv 2501.05450), section 4.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]

_MAX_ROUNDS = 100
_BLOCK_ROWS = 8192
_PRICE_ROUNDS = 400


def kmeans(rows_NF: Floats, num_centres: int, *, seed: int = 0) -> Floats:
    """Lloyd's algorithm from k-means++ centres; shape (num_centres, F).

    Raises:
        ValueError: there are fewer rows than centres.
    """
    if not 1 <= num_centres <= len(rows_NF):
        raise ValueError(f"{num_centres} centres for {len(rows_NF)} rows: needs 1 to that many")
    random = np.random.default_rng(seed)
    centres_KF = _spread(rows_NF, num_centres, random)
    before = np.full(len(rows_NF), -1)
    for _ in range(_MAX_ROUNDS):
        squares_NK = squares(rows_NF, centres_KF)
        nearest_N = squares_NK.argmin(1)
        if np.array_equal(nearest_N, before):
            break
        before = nearest_N
        centres_KF = _means(rows_NF, nearest_N, squares_NK, centres_KF)
    return centres_KF


def two_step(rows_NF: Floats, num_centres: int, *, num_fine: int, seed: int = 0) -> Floats:
    """Centres of the centres of `num_fine` small groups: rare kinds of rows count as common ones.

    With as many fine groups as rows, or more, this is `kmeans`.
    """
    if num_fine < len(rows_NF):
        rows_NF = kmeans(rows_NF, num_fine, seed=seed)
    return kmeans(rows_NF, num_centres, seed=seed)


def squares(rows_NF: Floats, centres_KF: Floats) -> Floats:
    """Squared distances, shape (N, K)."""
    centres = torch.from_numpy(np.ascontiguousarray(centres_KF))
    blocks = [
        torch.cdist(torch.from_numpy(np.ascontiguousarray(block)), centres).square().numpy()
        for block in np.array_split(rows_NF, max(1, len(rows_NF) // _BLOCK_ROWS))
    ]
    found: Floats = np.concatenate(blocks)
    return found


def even_prices(squares_NK: Floats) -> Floats:
    """What to add to each centre's squared distances so that every centre is nearest to as many.

    The prices of an auction: who is nearest to too many becomes dearer, by steps that shrink. Shape
    (K,).
    """
    num_rows, num_centres = squares_NK.shape
    prices_K = np.zeros(num_centres)
    best, best_prices_K = np.inf, prices_K
    scale = float(np.ptp(squares_NK, axis=1).mean()) or 1.0
    for number in range(_PRICE_ROUNDS):
        counts_K = np.bincount((squares_NK + prices_K).argmin(1), minlength=num_centres)
        excess_K = counts_K * num_centres / num_rows - 1
        if (worst := float(np.abs(excess_K).max())) < best:
            best, best_prices_K = worst, prices_K
        prices_K = prices_K + scale * 0.5 / (1 + number) ** 0.7 * excess_K
    return best_prices_K


def _spread(rows_NF: Floats, num_centres: int, random: np.random.Generator) -> Floats:
    """k-means++: each next centre in proportion to its squared distance to those chosen."""
    chosen = [int(random.integers(len(rows_NF)))]
    nearest_N = squares(rows_NF, rows_NF[chosen])[:, 0]
    while len(chosen) < num_centres:
        total = nearest_N.sum()
        share_N = nearest_N / total if total > 0 else np.full(len(rows_NF), 1 / len(rows_NF))
        chosen.append(int(random.choice(len(rows_NF), p=share_N)))
        nearest_N = np.minimum(nearest_N, squares(rows_NF, rows_NF[chosen[-1:]])[:, 0])
    return rows_NF[chosen].astype(np.float64)


def _means(rows_NF: Floats, nearest_N: Integers, squares_NK: Floats, centres_KF: Floats) -> Floats:
    """The mean of each centre's rows; a centre without any moves to the row farthest off."""
    num_centres = len(centres_KF)
    sums_KF = np.zeros_like(centres_KF)
    np.add.at(sums_KF, nearest_N, rows_NF)
    counts_K = np.bincount(nearest_N, minlength=num_centres)
    means_KF = sums_KF / np.maximum(counts_K, 1)[:, None]
    empty = np.flatnonzero(counts_K == 0)
    if len(empty):
        own_N = squares_NK[np.arange(len(rows_NF)), nearest_N]
        means_KF[empty] = rows_NF[np.argsort(-own_N, kind="stable")[: len(empty)]]
    return means_KF
