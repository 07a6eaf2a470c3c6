"""The honest comparison: policy chosen on validation data, arms and nulls measured on test data.

Every arm of a seed gets the same noise or the same rows. Operations of training and of inference
stand beside each figure, the router's among them. Writes FOLDER/evaluation/evaluation.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from elastic.core.errors import ConfigError
from elastic.core.experts.flow import ClosedForm, interpolate
from elastic.experts.arms import Arm, candidates, cascade_around, of_policy, standard_arms
from elastic.experts.config import ExpertsConfig
from elastic.experts.jobs import MONOLITH, ROUTER, cost
from elastic.experts.partition import read_partition, subset_folders, subsets_of, validation_folder
from elastic.experts.quality import interval
from elastic.experts.team import Calls, Team, load_team
from elastic.experts.testing import Classes, Images, Test, inputs_of, make_test, read_table
from policies.routing import Policy, TopK

TIMES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
JSON_FILE = "evaluation.json"
_VALIDATION_SEED = 1_000_000  # noise that the comparison on test data never sees
_ROUTER_ROWS = 2000
_ORACLE_ROWS = 64

JSON = dict[str, Any]
Tell = Callable[[str], None]


def evaluate(config: ExpertsConfig, tell: Tell) -> JSON:
    """Choose the policy, compare the arms, write and return all figures.

    Raises:
        ConfigError: something is not trained yet.
    """
    read_partition(config)
    teams = {seed: load_team(config, seed) for seed in config.seeds}
    validation = make_test(config, str(validation_folder(config)))
    tried, chosen = choose(config, teams, validation, tell)
    unseen = config.evaluation.test or str(validation_folder(config))
    test = make_test(config, unseen)
    arms = standard_arms(chosen, with_monolith=config.monolith, with_random=config.random_partition)
    found: JSON = {
        "name": config.name,
        "kind": config.kind,
        "headline": test.headline,
        "seeds": list(config.seeds),
        "test": unseen,
        "is_test_apart": config.evaluation.test is not None,
        "selection": asdict(chosen),
        "validation": tried,
        "training_flops": _training_flops(config),
        "arms": {one.name: _measure(config, teams, test, one, tell) for one in arms},
    }
    if isinstance(test, Images):
        found["bars"] = test.bars()
        found["judge_accuracy"] = test.accuracy
        found["router"] = router_by_time(config, teams, unseen)
    folder = config.root / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def choose(
    config: ExpertsConfig, teams: Mapping[int, Team], validation: Test, tell: Tell
) -> tuple[JSON, Policy]:
    """The candidate that is best on validation data, by the mean over the seeds."""
    of_texts = config.kind == "language"
    tried, policies = {}, dict(candidates(config.partition.num_experts, of_texts=of_texts))
    if isinstance(validation, Classes):
        policies["cascade"] = _cascade(teams, validation)
    for name, policy in policies.items():
        arm = of_policy(name, policy)
        scores = [
            validation.score(team, arm, seed=_VALIDATION_SEED + seed)[validation.headline]
            for seed, team in teams.items()
        ]
        tried[name] = float(np.mean(scores))
        tell(f"validation, {name}: {validation.headline} {tried[name]:.3f}")
    best = min(tried, key=lambda name: np.nan_to_num(tried[name], nan=np.inf))
    return tried, policies[best]


def _cascade(teams: Mapping[int, Team], validation: Classes) -> Policy:
    first = of_policy("top-1", TopK(k=1))
    answers = [validation.first_answers(team, first) for team in teams.values()]
    return cascade_around(
        np.concatenate([sure for sure, _ in answers]),
        np.concatenate([right for _, right in answers]),
    )


def read_evaluation(config: ExpertsConfig) -> JSON:
    """What `evaluate` wrote.

    Raises:
        ConfigError: there is nothing yet.
    """
    file = config.root / "evaluation" / JSON_FILE
    try:
        found: JSON = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `elastic experts evaluate` makes it") from None
    return found


def router_by_time(config: ExpertsConfig, teams: Mapping[int, Team], unseen: str) -> JSON:
    """How often the router is right at each time, beside the posterior of the training data.

    That is the best guess of who knows nothing but the training images (Decentralized Diffusion
    Models, equation 6); it is no bound for a router that generalises. Averaged over the seeds.
    """
    table = read_table(unseen)
    x0, subset_N = inputs_of(config, table), torch.from_numpy(subsets_of(config, table))
    repeats = max(1, _ROUTER_ROWS // len(x0))
    x0, subset_N = x0.repeat(repeats, 1, 1, 1), subset_N.repeat(repeats)
    training = [inputs_of(config, read_table(one)) for one in subset_folders(config)]
    owner_N = torch.cat([torch.full((len(one),), k) for k, one in enumerate(training)])
    oracle = ClosedForm(torch.cat(training), owner_N)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for time in TIMES:
        t = torch.full((len(x0),), time)
        x = interpolate(x0, torch.randn(x0.shape, generator=generator), t)
        with torch.no_grad():
            p_by_seed = [team.router(x, t).softmax(1) for team in teams.values()]
        ceiling = _guesses(oracle, x, t)
        rows.append(
            {
                "t": time,
                "accuracy": _mean(_share(p.argmax(1) == subset_N) for p in p_by_seed),
                "ceiling": _share(ceiling == subset_N),
                "top_1": _mean(float(p.max(1).values.mean()) for p in p_by_seed),
                "mean_p": [
                    [float(one) for one in p_by_seed[0][subset_N == k].mean(0)]
                    for k in range(len(training))
                ],
            }
        )
    return {"rows": rows}


def _guesses(oracle: ClosedForm, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The most probable subsets, in parts: the posterior over all training images is large."""
    parts = (slice(at, at + _ORACLE_ROWS) for at in range(0, len(x), _ORACLE_ROWS))
    return torch.cat([oracle.logits(x[at], t[at]).argmax(1) for at in parts])


def _measure(
    config: ExpertsConfig, teams: Mapping[int, Team], test: Test, arm: Arm, tell: Tell
) -> JSON:
    """All measures of an arm: each seed's, their mean and 90 % interval; and what it costs."""
    calls, scores = Calls(), []
    for seed, team in teams.items():
        team.calls.num_rows = team.calls.num_expert_rows = 0
        scores.append(test.score(team, arm, seed=seed))
        calls.num_rows += team.calls.num_rows
        calls.num_expert_rows += team.calls.num_expert_rows
    measures = {name: _summary([one[name] for one in scores]) for name in scores[0]}
    router = cost(config, ROUTER).flops_per_call if arm.asks_router else 0
    expert = cost(config, "expert-0").flops_per_call
    head = measures[test.headline]
    tell(f"{arm.name}: {test.headline} {head['mean']:.3f} [{head['low']:.3f}, {head['high']:.3f}]")
    return {
        "about": arm.about,
        "is_null": arm.is_null,
        "measures": measures,
        "experts_per_call": calls.experts_per_row,
        "inference_flops": round(router + calls.experts_per_row * expert),
    }


def _summary(values: Sequence[float]) -> JSON:
    low, high = interval(np.array(values))
    return {"mean": float(np.mean(values)), "low": low, "high": high, "values": list(values)}


def _training_flops(config: ExpertsConfig) -> JSON:
    found = {
        "experts": config.partition.num_experts * cost(config, "expert-0").training_flops,
        "router": cost(config, ROUTER).training_flops,
    }
    if config.monolith:
        found["monolith"] = cost(config, MONOLITH).training_flops
    return found


def _share(right: torch.Tensor) -> float:
    return float(right.float().mean())


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
