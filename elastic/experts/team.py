"""The trained models of one seed, asked as an arm of the comparison says, their calls counted.

Letters: B samples, K experts, T places, V values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from elastic.core.errors import ConfigError
from elastic.core.experts.ensemble import answers, mix, mix_log_probabilities
from elastic.core.experts.flow import sample
from elastic.core.experts.language import NUM_BYTES
from elastic.core.trained import load_model
from elastic.experts.arms import Arm
from elastic.experts.config import ExpertsConfig
from elastic.experts.jobs import MONOLITH, ROUTER, Planned, plan, random_names
from elastic.experts.training import is_finished
from policies.routing import Core, Floats, Policy
from serve.mixing import Mixture

Integers = NDArray[np.int64]


@dataclass
class Calls:
    """How many samples went through experts and router."""

    num_rows: int = 0
    num_expert_rows: int = 0

    @property
    def experts_per_row(self) -> float:
        return self.num_expert_rows / max(1, self.num_rows)


@dataclass(frozen=True)
class Team:
    """The models of one seed, in eval mode. `members` by the name that an arm gives."""

    members: dict[str, Sequence[nn.Module]]
    router: nn.Module
    calls: Calls = field(default_factory=Calls)

    @torch.no_grad()
    def generate(
        self, arm: Arm, noise: torch.Tensor, own_B: Integers, *, num_steps: int, seed: int
    ) -> torch.Tensor:
        """Images of a flow from `noise`, shape (B, *shape)."""
        random = np.random.default_rng(seed)
        members = self.members[arm.team]

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return mix(members, self._weights(arm, own_B, random, x, t), x, t)

        return sample(velocity, noise, num_steps)

    @torch.no_grad()
    def predict(self, arm: Arm, x: torch.Tensor, own_B: Integers, *, seed: int) -> torch.Tensor:
        """Log-probabilities of a language model or classifier, shape (B, ..., V)."""
        if arm.policy is not None:
            return self._asked(arm.policy, self.members[arm.team], x)
        weights_BK = self._weights(arm, own_B, np.random.default_rng(seed), x)
        return mix_log_probabilities(self.members[arm.team], weights_BK, x)

    def _asked(self, policy: Policy, members: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
        """As a server asks: a cascade goes on where an answer is unsure."""
        p_BK = self.router(x).double().softmax(1).numpy()
        mixture = Mixture([policy] * len(x), p_BK, np.ones(len(members), np.bool_))
        while missing := mixture.missing():
            for k, rows in missing.items():
                mixture.take(k, rows, members[k](x[rows]).softmax(-1))
        self._count(mixture.weights_BK)
        return mixture.answer().log()

    @torch.no_grad()
    def predict_after(
        self, arm: Arm, tokens: torch.Tensor, num: int, own_B: Integers, *, seed: int
    ) -> torch.Tensor:
        """As `predict`, of texts, by what the router makes of the first `num` bytes of each."""
        weights_BK = self._weights(arm, own_B, np.random.default_rng(seed), tokens[:, :num])
        if isinstance(arm.policy, Core):
            return _agreed(arm.policy, self.members[arm.team], weights_BK, tokens)
        return mix_log_probabilities(self.members[arm.team], weights_BK, tokens)

    def _weights(
        self, arm: Arm, own_B: Integers, random: np.random.Generator, *inputs: torch.Tensor
    ) -> torch.Tensor:
        num = len(self.members[arm.team])
        if arm.asks_router:
            p_BK = self.router(*inputs).double().softmax(1).numpy()
        else:
            p_BK = np.full((len(inputs[0]), num), 1 / num)
        weights_BK = arm.weigh(p_BK, own_B % num, random)
        self._count(weights_BK)
        return torch.from_numpy(weights_BK).float()

    def _count(self, weights_BK: Floats) -> None:
        self.calls.num_rows += len(weights_BK)
        self.calls.num_expert_rows += int((weights_BK > 0).sum())


def _agreed(
    policy: Core, members: Sequence[nn.Module], weights_BK: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of each next byte where experts that agree count for more."""
    p_BTKV = torch.zeros(*tokens.shape, len(members), NUM_BYTES, dtype=torch.float64)
    for k, rows, logits in answers(members, weights_BK, tokens):
        p_BTKV[rows, :, k] = logits.double().softmax(-1)
    each_NK = weights_BK.double().repeat_interleave(tokens.shape[1], 0)
    mixed_NV = policy.combine(each_NK.numpy(), p_BTKV.flatten(0, 1).numpy())
    return torch.from_numpy(mixed_NV).log().view(*tokens.shape, -1)


def load_team(config: ExpertsConfig, seed: int) -> Team:
    """All models of a seed.

    Raises:
        ConfigError: one is not trained yet.
    """
    members: dict[str, Sequence[nn.Module]] = {
        "expert": [_load(config, plan(config, one, seed)) for one in config.subset_names]
    }
    if config.monolith:
        members["monolith"] = [_load(config, plan(config, MONOLITH, seed))]
    if config.random_partition:
        members["random"] = [_load(config, plan(config, one, seed)) for one in random_names(config)]
    return Team(members, _load(config, plan(config, ROUTER, seed)))


def _load(config: ExpertsConfig, planned: Planned) -> nn.Module:
    if not is_finished(planned):
        verb = "router" if planned.role == ROUTER else "train"
        raise ConfigError(f"{planned.run}: is not trained yet; `elastic experts {verb}` does so")
    task: Any = planned.task()
    return load_model(planned.run, task, averaged=config.ema_decay is not None)
