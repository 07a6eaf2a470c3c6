"""Which experts answer, and with what weight, once the router has given its probabilities.

Pure: probabilities and who is alive arrive, weights come back. A row's weights do not depend on the
other rows, so a request is answered alike whatever batch it shares. Never asks an expert anything.

Sources: Decentralized Diffusion Models (arXiv 2501.05450) for top-k and all; window-based early
exits for the cascade; CoRE, consistency and robust ensembles of language models, for `Core`.

Letters: B rows, K experts, V outcomes (classes, bytes), N rows of validation data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


class NobodyLives(ValueError):
    """No expert is alive, so there is nothing to weigh."""


class Selection(Protocol):
    """How a row's probabilities become weights of experts."""

    @property
    def kind(self) -> str: ...

    def weights(self, probabilities_BK: Floats, alive_K: Bools) -> Floats:
        """Weights (B, K): 0 for who is not asked or not alive; each row sums to 1.

        Raises NobodyLives, and ValueError where the shapes do not fit.
        """
        ...


def living(probabilities_BK: Floats, alive_K: Bools) -> Floats:
    """Probabilities given that one of the living answers; even ones where all of them have 0."""
    if probabilities_BK.ndim != 2 or probabilities_BK.shape[1] != len(alive_K):
        shape = probabilities_BK.shape
        raise ValueError(f"probabilities {shape} for {len(alive_K)} experts: needs (rows, experts)")
    if not alive_K.any():
        raise NobodyLives(f"none of {len(alive_K)} experts is alive")
    masked: Floats = np.where(alive_K, probabilities_BK, 0.0)
    total_B1 = masked.sum(axis=1, keepdims=True)
    if total_B1.all():  # as nearly always, and this is asked at every step
        masked /= total_B1
        return masked
    even_BK = np.broadcast_to(alive_K / alive_K.sum(), masked.shape)
    shares: Floats = np.where(total_B1 > 0, masked / np.where(total_B1 > 0, total_B1, 1.0), even_BK)
    return shares


def _ranks(shares_BK: Floats, alive_K: Bools) -> NDArray[np.intp]:
    """0 for a row's most probable living expert; of equal ones the first comes first."""
    order_BK = np.argsort(np.where(alive_K, -shares_BK, np.inf), axis=1, kind="stable")
    return np.argsort(order_BK, axis=1, kind="stable")


def _keep(shares_BK: Floats, kept_BK: Bools) -> Floats:
    """Shares of those kept; even where all of them have 0."""
    kept: Floats = np.where(kept_BK, shares_BK, 0.0)
    total_B1 = kept.sum(axis=1, keepdims=True)
    if total_B1.all():
        kept /= total_B1
        return kept
    even_BK = kept_BK / kept_BK.sum(axis=1, keepdims=True)
    weights: Floats = np.where(total_B1 > 0, kept / np.where(total_B1 > 0, total_B1, 1.0), even_BK)
    return weights


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The `k` most probable experts that live, in proportion to their probabilities."""

    k: int
    kind: Literal["top_k"] = "top_k"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k {self.k}: needs at least 1")

    def weights(self, probabilities_BK: Floats, alive_K: Bools) -> Floats:
        shares_BK = living(probabilities_BK, alive_K)
        return _keep(shares_BK, (_ranks(shares_BK, alive_K) < self.k) & alive_K)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mass:
    """The fewest experts whose probabilities reach `threshold`, at most `at_most` of them.

    Adapts by itself: one expert near the data, several where the router cannot tell.
    """

    threshold: float
    at_most: int
    kind: Literal["mass"] = "mass"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold}: needs more than 0, at most 1")
        if self.at_most < 1:
            raise ValueError(f"at_most {self.at_most}: needs at least 1")

    def weights(self, probabilities_BK: Floats, alive_K: Bools) -> Floats:
        shares_BK = living(probabilities_BK, alive_K)
        ranks_BK = _ranks(shares_BK, alive_K)
        falling_BK = np.take_along_axis(shares_BK, np.argsort(ranks_BK, axis=1), axis=1)
        before_BK = np.cumsum(falling_BK, axis=1) - falling_BK
        num_B1 = np.maximum((before_BK < self.threshold).sum(axis=1, keepdims=True), 1)
        return _keep(
            shares_BK, (ranks_BK < np.minimum(num_B1, min(self.at_most, len(alive_K)))) & alive_K
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class All:
    """Every living expert, in proportion to its probability: the exact sum over the subsets."""

    kind: Literal["all"] = "all"

    def weights(self, probabilities_BK: Floats, alive_K: Bools) -> Floats:
        return living(probabilities_BK, alive_K)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cascade:
    """The most probable expert; another one only where its confidence is in [`low`, `high`].

    Outside of the window another opinion would hardly change the decision. Inside, the answer is
    the mean of those asked, at most `at_most`. For classifiers: confidence is the largest
    probability of a class. `window` measures the bounds on validation data.
    """

    low: float
    high: float
    at_most: int = 2
    kind: Literal["cascade"] = "cascade"

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"window [{self.low}, {self.high}]: low is above high")
        if self.at_most < 1:
            raise ValueError(f"at_most {self.at_most}: needs at least 1")

    def weights(self, probabilities_BK: Floats, alive_K: Bools) -> Floats:
        """Who is asked first."""
        return TopK(k=1).weights(probabilities_BK, alive_K)

    def next_weights(
        self, probabilities_BK: Floats, alive_K: Bools, num_asked: int, confidence_B: Floats
    ) -> Floats:
        """Even weights of the `num_asked` asked so far and, where they are unsure, of one more."""
        ranks_BK = _ranks(living(probabilities_BK, alive_K), alive_K)
        num_B = num_asked + self.goes_on(confidence_B, num_asked)
        asked_BK = (ranks_BK < num_B[:, None]) & alive_K
        weights: Floats = asked_BK / asked_BK.sum(axis=1, keepdims=True)
        return weights

    def goes_on(self, confidence_B: Floats, num_asked: int) -> Bools:
        """Whether each row asks one more expert."""
        inside: Bools = (self.low <= confidence_B) & (confidence_B <= self.high)
        return inside & (num_asked < self.at_most)


def window(confidence_N: Floats, threshold: float, *, share: float = 0.10) -> tuple[float, float]:
    """Bounds of a cascade around the task's `threshold`: `share` of the data on either side of it.

    Under a shift of the data keep the threshold and measure this again on unlabelled confidences.
    """
    place = float((confidence_N < threshold).mean())
    low, high = np.quantile(confidence_N, [max(place - share, 0.0), min(place + share, 1.0)])
    return float(low), float(high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """The `at_most` most probable experts, weighed by how well they agree and how sure they are.

    For distributions over outcomes, such as the next byte.
    """

    at_most: int
    kind: Literal["core"] = "core"

    def __post_init__(self) -> None:
        if self.at_most < 1:
            raise ValueError(f"at_most {self.at_most}: needs at least 1")

    def weights(self, probabilities_BK: Floats, alive_K: Bools) -> Floats:
        """Who is asked."""
        return TopK(k=self.at_most).weights(probabilities_BK, alive_K)

    def combine(self, weights_BK: Floats, predictions_BKV: Floats) -> Floats:
        """Probabilities (B, V) from those of the experts; of who has weight 0 nothing is read.

        Per outcome: `d = |p_k - mean p|`, `s = (e^(-2d) - e^-2) / (1 - e^-2)` damps what the others
        do not share. Per expert: the weight of the router, times the mean of s under p_k, over the
        entropy of p_k.
        """
        asked_BK1 = (weights_BK > 0)[:, :, None]
        p = np.where(asked_BK1, predictions_BKV, 0.0)
        mean_B1V = p.sum(axis=1, keepdims=True) / asked_BK1.sum(axis=1, keepdims=True)
        s = (np.exp(-2 * np.abs(p - mean_B1V)) - np.exp(-2)) / (1 - np.exp(-2))
        entropy_BK = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=2)
        trust_BK = weights_BK * (p * s).sum(axis=2) / np.maximum(entropy_BK, 1e-6)
        mixed_BV = (trust_BK[:, :, None] * s * p).sum(axis=1)
        combined: Floats = mixed_BV / mixed_BV.sum(axis=1, keepdims=True)
        return combined


Policy = TopK | Mass | All | Cascade | Core
"""The registry: a policy is found by its `kind`."""

_KINDS: dict[str, type[Policy]] = {
    "top_k": TopK,
    "mass": Mass,
    "all": All,
    "cascade": Cascade,
    "core": Core,
}


def kinds() -> Sequence[str]:
    """The names of all policies."""
    return tuple(_KINDS)


def _float(value: float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is a whole number of {len(str(value))} digits") from None


def policy_from(section: dict[str, Any]) -> Policy:
    """A policy from `{"kind": ..., settings}`. Raises ValueError that names what does not fit."""
    given = dict(section)
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"selection kind {kind!r}: needs one of {', '.join(_KINDS)}")
    fields = {
        name: one for name, one in _KINDS[kind].__dataclass_fields__.items() if name != "kind"
    }
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise ValueError(f"selection {kind}: no setting {unknown[0]!r}; has {', '.join(fields)}")
    for name, value in given.items():
        wanted = int if fields[name].type == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"selection {kind}: {name} {value!r} is not a number that fits")
        if fields[name].type == "float":
            given[name] = _float(value, f"selection {kind}: {name}")
    try:
        return _KINDS[kind](**given)
    except TypeError as error:
        raise ValueError(f"selection {kind}: {error}; needs {', '.join(fields)}") from None
