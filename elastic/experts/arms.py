"""Who answers, in a comparison of experts: policies, their bounds, and nulls that must do worse.

An arm turns the router's probabilities into weights of experts, for every sample at every step.
Pure: randomness arrives as a generator. Letters: B samples, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.routing import All, Cascade, Core, Mass, Policy, TopK, window

Floats = NDArray[np.floating[Any]]
Weigh = Callable[[Floats, NDArray[np.int64], np.random.Generator], Floats]
"""(router's probabilities (B, K), each sample's own subset (B,), random) -> weights (B, K)."""


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        team: whose experts: expert, random (subsets drawn by lot) or monolith.
        asks_router: whether the router's operations count.
    """

    name: str
    about: str
    weigh: Weigh
    team: str = "expert"
    asks_router: bool = True
    is_null: bool = False
    policy: Policy | None = None
    """Where the weights are those of a policy, which may ask again after it has heard an answer."""


def of_policy(name: str, policy: Policy, about: str = "") -> Arm:
    """The experts that a selection policy chooses."""

    def weigh(p_BK: Floats, own_B: NDArray[np.int64], random: np.random.Generator) -> Floats:
        return policy.weights(p_BK, np.ones(p_BK.shape[1], bool))

    return Arm(name, about or f"selection policy {policy}", weigh, policy=policy)


def candidates(num_experts: int, *, of_texts: bool = False) -> Mapping[str, Policy]:
    """What is tried on validation data; the best is what the repository is packed with."""
    found: dict[str, Policy] = {f"top-{k}": TopK(k=k) for k in (1, 2, 3) if k < num_experts}
    for threshold in (0.6, 0.8, 0.95):
        found[f"mass {threshold}"] = Mass(threshold=threshold, at_most=num_experts)
    found["all"] = All()
    if of_texts:
        found["core"] = Core(at_most=num_experts)
    return found


def cascade_around(confidence_N: Floats, is_right_N: NDArray[np.bool_]) -> Cascade:
    """A second opinion where the first answer is about as sure as answers that are wrong.

    The threshold is the confidence that tells right answers from wrong ones best; around it the
    window is measured as `policies.routing.window` says.
    """
    levels = np.quantile(confidence_N, np.linspace(0, 1, 101))
    above = confidence_N[:, None] >= levels
    num_right, num_wrong = max(1, is_right_N.sum()), max(1, (~is_right_N).sum())
    gain = above[is_right_N].sum(0) / num_right - above[~is_right_N].sum(0) / num_wrong
    low, high = window(confidence_N, float(levels[gain.argmax()]))
    return Cascade(low=low, high=high)


def standard_arms(chosen: Policy, *, with_monolith: bool, with_random: bool) -> Sequence[Arm]:
    """Everything that is compared on test data: bounds and nulls around the policy that was chosen.

    Null: a router that knows nothing, one whose experts were swapped, subsets that mean nothing.
    """
    monolith = Arm("monolith", "one model of everything", _own, "monolith", asks_router=False)
    lot = Arm("random partition", "subsets drawn by lot", _own, "random", False, is_null=True)
    return [
        *([monolith] if with_monolith else []),
        of_policy("chosen", chosen, f"{chosen}, the best on validation data"),
        of_policy("all", All(), "every expert, by its probability"),
        of_policy("top-1", TopK(k=1), "the most probable expert"),
        of_policy("top-2", TopK(k=2), "the two most probable"),
        of_policy("mass 0.8", Mass(threshold=0.8, at_most=64), "the fewest with 0.8 together"),
        Arm("oracle", "the expert of a subset drawn beforehand", _own, asks_router=False),
        Arm("sampled", "one expert drawn by its probability, at every step", _sampled),
        Arm("uniform", "all experts alike", _uniform, asks_router=False, is_null=True),
        Arm("shuffled", "as chosen, the experts swapped", _shuffled(chosen), is_null=True),
        *([lot] if with_random else []),
    ]


def _own(p_BK: Floats, own_B: NDArray[np.int64], random: np.random.Generator) -> Floats:
    weights: Floats = np.eye(p_BK.shape[1])[own_B]
    return weights


def _sampled(p_BK: Floats, own_B: NDArray[np.int64], random: np.random.Generator) -> Floats:
    ends_BK = np.cumsum(p_BK, axis=1)
    drawn_B = (random.random((len(p_BK), 1)) * ends_BK[:, -1:] > ends_BK).sum(1)
    return _own(p_BK, drawn_B, random)


def _uniform(p_BK: Floats, own_B: NDArray[np.int64], random: np.random.Generator) -> Floats:
    return np.full_like(p_BK, 1 / p_BK.shape[1])


def _shuffled(policy: Policy) -> Weigh:
    def weigh(p_BK: Floats, own_B: NDArray[np.int64], random: np.random.Generator) -> Floats:
        weights_BK = policy.weights(p_BK, np.ones(p_BK.shape[1], bool))
        return np.roll(weights_BK, 1, axis=1)  # nobody keeps his place

    return weigh
