"""The answers of some experts to the rows of one call, as they come in, and their mixture.

Knows which experts are still to be asked, also when some are lost on the way or when a cascade goes
on. Pure: asks nobody. Letters: B rows, K experts, V outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.routing import Bools, Cascade, Core, Floats, NobodyLives, Selection, TopK


@dataclass(frozen=True)
class Only:
    """One expert by its index, whatever the router says; not in the registry, since a repository
    is more than one of its experts."""

    k: int
    kind: str = "only"

    def weights(self, probabilities_BK: Floats, alive_K: Bools) -> Floats:
        if not alive_K[self.k]:
            raise NobodyLives(f"expert {self.k} is not alive")
        weights = np.zeros(probabilities_BK.shape)
        weights[:, self.k] = 1.0
        return weights


class Mixture:
    """Of one call. `missing` says whom to ask, `take` and `lose` how that went."""

    def __init__(
        self, policies: Sequence[Selection], probabilities_BK: Floats, alive_K: Bools
    ) -> None:
        """Rows may have different policies; `alive_K` is who may be asked."""
        self._groups: dict[Selection, list[int]] = {}
        for b, policy in enumerate(policies):
            self._groups.setdefault(policy, []).append(b)
        self._probabilities_BK, self._alive_K = probabilities_BK, alive_K.copy()
        self._asked_BK = np.zeros(probabilities_BK.shape, np.bool_)
        self._answers: dict[int, Tensor] = {}
        self.weights_BK: Floats = np.zeros(probabilities_BK.shape)
        self.hopeless: set[int] = set()
        """Rows that nobody who lives may answer; the others are not worse off for them."""
        self._num_wanted_B = np.ones(len(probabilities_BK), np.int64)
        """Of a cascade: how many each row asks, were all alive."""
        self._is_settled = False
        self._may_go_on = any(isinstance(policy, Cascade) for policy in self._groups)

    def lost(self) -> Bools:
        """Who would have been asked, were it alive (B, K)."""
        if self._alive_K.all():
            return np.zeros(self.weights_BK.shape, np.bool_)
        everybody = np.ones_like(self._alive_K)
        wanted_BK = np.zeros(self.weights_BK.shape, np.bool_)
        for policy, rows in self._groups.items():
            wanted_BK[rows] = self._wanted(policy, np.array(rows), everybody)
        lost: Bools = wanted_BK & ~self._alive_K
        return lost

    def missing(self) -> dict[int, Tensor]:
        """Whom to ask about which rows; empty when all is there.

        Raises NobodyLives where every row is hopeless.
        """
        if not self._is_settled:
            self._weigh()
            self._is_settled = not self._may_go_on
        needed_BK = (self.weights_BK > 0) & ~self._asked_BK
        columns = np.flatnonzero(needed_BK.any(axis=0)).tolist()
        return {k: torch.from_numpy(np.flatnonzero(needed_BK[:, k])) for k in columns}

    def _weigh(self) -> None:
        if len(self._groups) == 1:
            ((policy, rows),) = self._groups.items()
            self.weights_BK = self._weights(policy, rows)
            return
        self.weights_BK = np.zeros(self.weights_BK.shape)
        self.hopeless = set()
        for policy, rows in self._groups.items():
            try:
                self.weights_BK[rows] = self._weights(policy, rows)
            except NobodyLives:
                self.hopeless.update(rows)
        if len(self.hopeless) == len(self.weights_BK):
            raise NobodyLives("no row has an expert that lives")

    def take(self, k: int, rows: Tensor, answer: Tensor) -> None:
        """What expert k says of some rows."""
        num_rows = len(self._asked_BK)
        if len(rows) == num_rows:
            self._answers[k] = answer
        else:
            if k not in self._answers:
                self._answers[k] = answer.new_zeros((num_rows, *answer.shape[1:]))
            self._answers[k][rows] = answer
        self._asked_BK[rows.numpy(), k] = True

    def lose(self, k: int) -> None:
        """Expert k does not answer; what it said of other rows before does not count either."""
        self._alive_K[k] = False
        self._is_settled = False

    def answer(self) -> Tensor:
        """The mixture, for each row; needs that nothing is missing."""
        whole = self._sum(self.weights_BK)
        for policy, rows in self._groups.items():
            if isinstance(policy, Core):
                predictions = np.stack([self._of(k)[rows].numpy() for k in self._columns], axis=1)
                mixed = policy.combine(self.weights_BK[rows], predictions.astype(np.float64))
                whole[rows] = torch.from_numpy(mixed).to(whole.dtype)
        return whole

    @property
    def _columns(self) -> range:
        return range(len(self._alive_K))

    def _of(self, k: int) -> Tensor:
        like = next(iter(self._answers.values()))
        return self._answers.get(k, torch.zeros_like(like))

    def _sum(self, weights_BK: Floats) -> Tensor:
        """sum_k w_k answer_k, in the order of the experts."""
        total: Tensor | None = None
        for k, answer in sorted(self._answers.items()):
            column = torch.from_numpy(weights_BK[:, k]).to(answer.dtype)
            part = answer * column.view(-1, *(1,) * (answer.ndim - 1))
            total = part if total is None else total + part
        assert total is not None, "nobody was asked"
        return total

    def _wanted(self, policy: Selection, rows: NDArray[np.int64], everybody: Bools) -> Bools:
        probabilities = self._probabilities_BK[rows]
        wanted: Bools = policy.weights(probabilities, everybody) > 0
        if isinstance(policy, Cascade):
            num_wanted = self._num_wanted_B[rows]
            for num in np.unique(num_wanted).tolist():
                same = num_wanted == num
                wanted[same] = TopK(k=num).weights(probabilities[same], everybody) > 0
        return wanted

    def _weights(self, policy: Selection, rows: Sequence[int]) -> Floats:
        probabilities, alive_K = self._probabilities_BK[rows], self._alive_K
        weights = policy.weights(probabilities, alive_K)
        if not isinstance(policy, Cascade):
            return weights
        goes_on = np.ones(len(rows), np.bool_)
        self._num_wanted_B[rows] = 1
        for num_asked in range(1, min(policy.at_most, len(alive_K))):
            if ((weights > 0) & ~self._asked_BK[rows]).any():
                return weights  # the next one depends on what these say
            everywhere_BK = np.zeros(self.weights_BK.shape)
            everywhere_BK[rows] = weights
            confidence = self._sum(everywhere_BK)[rows].amax(dim=1).double().numpy()
            goes_on &= policy.goes_on(confidence, num_asked)
            self._num_wanted_B[rows] += goes_on
            further = policy.next_weights(probabilities, alive_K, num_asked, confidence)
            weights = np.where(goes_on[:, None], further, weights)
        return weights
