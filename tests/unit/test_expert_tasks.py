"""The shipped tasks learn what they are for; arms ask whom they say; plans match in operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from elastic.core.data.memory import ArrayRows
from elastic.core.experts.language import ByteLM, ByteRouter
from elastic.core.yaml_file import Document, validate
from elastic.experts.arms import Arm, cascade_around, of_policy, standard_arms
from elastic.experts.config import ExpertsConfig, load_experts
from elastic.experts.evaluation import choose
from elastic.experts.jobs import MONOLITH, ROUTER, cost, expert_jobs, plan, router_jobs
from elastic.experts.partition import partition
from elastic.experts.table import render
from elastic.experts.tasks import Drawn, Subsets, as_inputs
from elastic.experts.team import Calls, Team
from policies.routing import All, Cascade, Core, TopK
from serve.mixing import Mixture

pytestmark = pytest.mark.usefixtures("one_thread")  # as in a worker

NUM_EXPERTS = 2


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., ExpertsConfig]:
    """Two clouds of images with texts that go with them, and an experts file of each kind."""
    random = np.random.default_rng(0)
    cloud_N = random.integers(0, 2, 300)
    images = np.where(cloud_N, 0.8, -0.8)[:, None] + 0.1 * random.normal(size=(300, 16))
    columns = {
        "image": pa.FixedSizeListArray.from_arrays(pa.array(images.astype(np.float32).ravel()), 16),
        "text": ["abcdefgh " * 9 if one else "zyxwvuts " * 9 for one in cloud_N],
        "cloud": cloud_N,
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")

    def build(kind: str, **settings: Any) -> ExpertsConfig:
        is_text = kind == "language"
        training = {
            "steps": 60,
            "micro_batch_size": 8,
            "task_args": {"lr": 0.01, "warmup_steps": 5, "model_args": {"width": 16, "depth": 1}},
        }
        data: dict[str, Any] = {
            "path": str(tmp_path / "rows.parquet"),
            "column": "text" if is_text else "image",
            "shape": [16] if is_text else [1, 4, 4],
            "label": "cloud",
            "num_classes": 2 if kind == "classifier" else None,
        }
        features = {"kind": "column", "column": "cloud"}
        document = {
            "name": "clouds",
            "kind": kind,
            "folder": str(tmp_path / kind),
            "data": data,
            "partition": {"num_experts": NUM_EXPERTS, "features": features},
            "expert": training,
            "router": training,
            **settings,
        }
        config = validate(ExpertsConfig, Document(document, "test"))
        partition(config)
        return config

    return build


def fit(task: Any, *, batch: int = 16) -> tuple[nn.Module, list[float]]:
    """A plain loop, without Ray; the model in eval mode and its losses."""
    torch.manual_seed(1)
    model, data = task.model(), task.dataset()
    optimizer = task.optimizer(list(model.named_parameters()))
    losses, random = [], np.random.default_rng(2)
    for _ in range(task.steps):
        loss_sum, weight, *_ = task.loss(model, data.fetch(random.integers(0, len(data), batch)))
        optimizer.zero_grad()
        (loss_sum / weight).backward()
        optimizer.step()
        losses.append(float(loss_sum.detach()) / weight)
    return model.eval(), losses


@pytest.mark.parametrize("kind", ["flow", "language", "classifier"])
@pytest.mark.parametrize("role", ["expert-1", "random-0", "monolith", "router"])
def test_a_shipped_task_learns(make: Callable[..., ExpertsConfig], kind: str, role: str) -> None:
    task = plan(make(kind), role, 0).task()
    _, losses = fit(task)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3]), losses


def test_a_router_tells_the_subsets_apart(make: Callable[..., ExpertsConfig]) -> None:
    config = make("flow")
    router, _ = fit(plan(config, ROUTER, 0).task())
    near = torch.stack([torch.full((1, 4, 4), -0.8), torch.full((1, 4, 4), 0.8)])
    assert router(near, torch.full((2,), 0.05)).argmax(1).tolist() == [0, 1]
    at_noise = router(torch.randn(64, 1, 4, 4), torch.ones(64)).softmax(1)
    assert (at_noise.mean(0) - 0.5).abs().max() < 0.25, "noise says nothing but the prior"


def test_the_monolith_takes_the_operations_of_all_others(
    make: Callable[..., ExpertsConfig],
) -> None:
    config = make("flow")
    others = NUM_EXPERTS * cost(config, "expert-0").training_flops
    others += cost(config, ROUTER).training_flops
    mine = cost(config, MONOLITH).training_flops
    assert abs(mine - others) <= 0.02 * others
    job = plan(config, MONOLITH, 0).job
    samples = job.steps * job.batch.micro_batches * job.batch.micro_batch_size
    assert mine == 3 * cost(config, "expert-0").flops_per_call * samples


def test_every_job_has_its_own_name_seed_and_folder(make: Callable[..., ExpertsConfig]) -> None:
    config = make("flow", seeds=[0, 1], random_partition=True)
    jobs = [*expert_jobs(config), *router_jobs(config)]
    assert len(jobs) == 2 * (NUM_EXPERTS + 1 + NUM_EXPERTS + 1)
    for values in ({j.job.name for j in jobs}, {j.job.seed for j in jobs}, {j.run for j in jobs}):
        assert len(values) == len(jobs)


@pytest.mark.parametrize(("given", "kept"), [("auto", 10 / 60), (0.9, 0.1), (None, None)])
def test_nothing_of_the_first_step_is_left_in_the_average(
    given: float | str | None, kept: float | None, make: Callable[..., ExpertsConfig]
) -> None:
    job = plan(make("flow", ema_decay=given), "expert-0", 0).job
    assert (job.ema and 1 - job.ema.decay) == pytest.approx(kept)
    if given == "auto":
        assert job.ema is not None
        assert job.ema.decay**job.steps < 1e-4


def test_subsets_say_where_each_sample_is_from() -> None:
    parts = [ArrayRows(x=torch.arange(3)), ArrayRows(x=torch.arange(10, 14))]
    rows, subset = Subsets(parts).fetch(np.array([6, 0, 3, 2]))
    assert rows["x"].tolist() == [13, 0, 10, 2]
    assert subset.tolist() == [1, 0, 1, 0]


def test_lots_share_the_data_evenly_and_nothing_twice() -> None:
    rows = ArrayRows(x=torch.arange(11))
    drawn = [Drawn(rows, k, 3, seed=4) for k in range(3)]
    values = [one.fetch(np.arange(len(one)))["x"].tolist() for one in drawn]
    assert sorted(one for lot in values for one in lot) == list(range(11))
    assert [len(one) for one in drawn] == [4, 4, 3]


def test_bytes_become_numbers_around_nought() -> None:
    assert as_inputs(torch.tensor([[0, 255]], dtype=torch.uint8), [2]).tolist() == [[-1, 1]]


class Constant(nn.Module):
    """The same logits for every input."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(inputs[0]), -1)


def team_of(*experts: nn.Module, router: nn.Module) -> Team:
    return Team({"expert": experts}, router, Calls())


def test_a_cascade_asks_again_where_the_first_is_unsure() -> None:
    unsure, sure = Constant(0.1, 0.0), Constant(0.0, 5.0)
    team = team_of(unsure, sure, router=Constant(1.0, 0.0))
    x, own_B = torch.zeros(4, 2), np.zeros(4, np.int64)
    asks = of_policy("cascade", Cascade(low=0.4, high=0.9))
    assert team.predict(asks, x, own_B, seed=0).argmax(1).tolist() == [1] * 4
    assert team.calls.experts_per_row == 2
    stays = of_policy("cascade", Cascade(low=0.0, high=0.3))
    team.calls.num_rows = team.calls.num_expert_rows = 0
    assert team.predict(stays, x, own_B, seed=0).argmax(1).tolist() == [0] * 4
    assert team.calls.experts_per_row == 1


def test_texts_are_judged_by_core_as_they_are_served() -> None:
    torch.manual_seed(5)
    experts = [ByteLM(6, width=8, depth=1, heads=2).eval() for _ in range(3)]
    for expert in experts:
        expert.trunk.bytes.weight.data *= 50  # who is sure of something can disagree
    router = ByteRouter(6, 3, width=8, depth=1, heads=2).eval()
    tokens, policy = torch.randint(0, 256, (4, 6)), Core(at_most=2)
    team = team_of(*experts, router=router)
    own_B = np.zeros(4, np.int64)
    found = team.predict_after(of_policy("core", policy), tokens, 6, own_B, seed=0)
    assert found.exp().sum(-1) == pytest.approx(torch.ones(4, 6))
    with torch.no_grad():
        p_BK = router(tokens).double().softmax(1).numpy()
        served = Mixture([policy] * 4, p_BK, np.ones(3, np.bool_))
        while missing := served.missing():
            for k, rows in missing.items():
                served.take(k, rows, experts[k](tokens[rows])[:, -1].double().softmax(-1))
    assert found[:, -1].exp().numpy() == pytest.approx(served.answer().numpy(), rel=1e-6)
    mean = team.predict_after(of_policy("top-2", TopK(k=2)), tokens, 6, own_B, seed=0)
    assert (found.exp() - mean.exp()).abs().max() > 1e-4, "agreement counts"


def test_a_window_lies_where_right_and_wrong_answers_part() -> None:
    random = np.random.default_rng(3)
    sure_N = random.random(2000)
    cascade = cascade_around(sure_N, sure_N > 0.6)
    assert 0.45 < cascade.low < 0.55
    assert 0.65 < cascade.high < 0.75


@pytest.mark.parametrize(
    ("name", "experts_per_row"),
    [("all", 3), ("top-1", 1), ("top-2", 2), ("oracle", 1), ("sampled", 1), ("uniform", 3)],
)
def test_an_arm_asks_whom_it_says(name: str, experts_per_row: int) -> None:
    arms = {one.name: one for one in standard_arms(TopK(k=1), with_monolith=True, with_random=True)}
    assert {"monolith", "chosen", "shuffled", "random partition"} <= set(arms)
    logits = [Constant(*row) for row in np.eye(3).tolist()]
    team = team_of(*logits, router=Constant(2.0, 1.0, 0.0))
    x, own_B = torch.zeros(5, 2), np.array([0, 1, 2, 0, 1])
    answer = team.predict(arms[name], x, own_B, seed=0)
    torch.testing.assert_close(answer.exp().sum(1), torch.ones(5))
    assert team.calls.experts_per_row == experts_per_row
    if name == "oracle":
        assert answer.argmax(1).tolist() == own_B.tolist()


def test_shuffled_experts_are_never_those_that_were_chosen() -> None:
    (shuffled,) = (
        one
        for one in standard_arms(TopK(k=1), with_monolith=False, with_random=False)
        if one.name == "shuffled"
    )
    p_BK = np.random.default_rng(5).dirichlet(np.ones(4), 50)
    weights_BK = shuffled.weigh(p_BK, np.zeros(50, np.int64), np.random.default_rng(0))
    assert (weights_BK.argmax(1) != p_BK.argmax(1)).all()


def test_the_drawn_expert_comes_in_proportion() -> None:
    sampled: Arm = next(
        one
        for one in standard_arms(TopK(k=1), with_monolith=False, with_random=False)
        if one.name == "sampled"
    )
    p_BK = np.tile([0.7, 0.0, 0.3], (20_000, 1))
    drawn = sampled.weigh(p_BK, np.zeros(20_000, np.int64), np.random.default_rng(6)).mean(0)
    np.testing.assert_allclose(drawn, p_BK[0], atol=0.02)


@pytest.mark.parametrize("name", ["digits_experts", "stdlib_experts"])
def test_the_examples_are_valid(name: str) -> None:
    root = Path(__file__).parents[2]
    config = load_experts(root / "examples" / name / "experts.yaml", ["seeds=[0,1]"])
    assert config.partition.num_experts == 4
    assert config.seeds == [0, 1]


class Scored:
    """Measures that a test says; NaN of what it does not name."""

    headline = "loss"

    def __init__(self, **scores: float) -> None:
        self._scores = scores

    def score(self, team: Team, arm: Arm, *, seed: int) -> dict[str, float]:
        return {"loss": self._scores.get(arm.name, np.nan)}


def test_a_policy_that_diverged_is_never_chosen(make: Callable[..., ExpertsConfig]) -> None:
    config, team = make("flow"), team_of(router=Constant(1.0))
    told: list[str] = []
    tried, chosen = choose(config, {0: team}, Scored(all=3.0), told.append)
    assert (np.isnan(tried["top-1"]), chosen) == (True, All())
    assert "validation, all: loss 3.000" in told


@pytest.mark.parametrize("is_apart", [True, False])
def test_a_table_says_where_the_policy_was_chosen_on_the_test_rows(is_apart: bool) -> None:
    measure = {"mean": 1.0, "low": 0.5, "high": 1.5}
    arm = {"measures": {"loss": measure}, "is_null": False, "about": "both"}
    found = {
        "name": "clouds",
        "seeds": [0, 1],
        "test": "rows",
        "is_test_apart": is_apart,
        "headline": "loss",
        "arms": {"all": {**arm, "experts_per_call": 2.0, "inference_flops": 3e6}},
        "validation": {"all": 1.0},
        "selection": {"kind": "all"},
        "training_flops": {"experts": 1e9},
    }
    table = render(found)
    assert "\n\n| arm | loss |" in table
    assert "| all | 1.000 [0.500, 1.500] | 2.00 | 3.00 | both |" in table
    assert ("chosen on these same rows" in table) is not is_apart
