"""Rows share calls without seeing each other; a lost expert changes weights, not right answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elastic.core.experts.ensemble import mix_velocities
from elastic.core.experts.flow import sample
from policies.routing import All, Cascade, Core, Mass, TopK
from serve.engine import Job
from serve.mixing import Only
from serve.pool import Slow
from serve.refusals import Refusal
from serve.work import Completing, Denoising, Predicting, noise_of
from tests.served import CONTEXT, SHAPE, Bench, make_repository

NUM_STEPS = 5


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    make_repository(tmp_path / "flow")
    return tmp_path / "flow"


def samples(bench: Bench, *seeds: int, **fields: Any) -> Job:
    return bench.job((Denoising(noise_of(seed, SHAPE), NUM_STEPS) for seed in seeds), **fields)


def pixels(job: Job) -> Tensor:
    job.done.result(timeout=0)
    return torch.stack([work.x for work in job.works])  # type: ignore[attr-defined]


def plain(bench: Bench, seed: int, policy: Any, alive: np.ndarray | None = None) -> Tensor:
    """The same sample by a loop that shares nothing."""
    version = bench.version
    experts = [version.repository.load_expert(name) for name in version.names]
    alive = np.ones(len(experts), bool) if alive is None else alive

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        shares = version.router(x, t).double().softmax(1).numpy()
        weights = torch.from_numpy(policy.weights(shares, alive))
        return mix_velocities(experts, weights, x, t)

    return sample(velocity, noise_of(seed, SHAPE)[None], NUM_STEPS)[0]


@pytest.mark.parametrize("policy", [TopK(k=1), TopK(k=2), Mass(threshold=0.9, at_most=3), All()])
def test_samples_are_those_of_the_plain_loop(flow: Path, policy: Any) -> None:
    bench = Bench(flow)
    job = samples(bench, 1, 2, 3, policy=policy)
    assert bench.run() == NUM_STEPS
    for index, seed in enumerate((1, 2, 3)):
        assert pixels(job)[index] == pytest.approx(plain(bench, seed, policy), abs=1e-5)
    assert job.lost == set()


def test_requests_share_calls_at_different_steps(flow: Path) -> None:
    bench = Bench(flow)
    first = samples(bench, 1)
    bench.engine.tick()
    bench.engine.tick()
    second = samples(bench, 2, 3)
    assert bench.run() == NUM_STEPS  # not 3 + 5
    assert (0, 3) in bench.pool.num_rows
    alone = Bench(flow)
    job = samples(alone, 1)
    alone.run()
    assert pixels(first) == pytest.approx(pixels(job), abs=1e-4)
    assert second.done.done()


def test_a_fixed_batch_gives_the_same_bits_whatever_it_shares(flow: Path) -> None:
    fixed = {"batching": {"fixed": True, "max_rows": 8}}
    alone, shared = Bench(flow, **fixed), Bench(flow, **fixed)
    one = samples(alone, 7)
    alone.run()
    others = samples(shared, 5, 6)
    shared.engine.tick()
    again = samples(shared, 7, 8, 9)
    shared.run()
    assert torch.equal(pixels(one)[0], pixels(again)[0])
    assert others.done.done()
    assert {rows for _, rows in shared.pool.num_rows} == {8}


def nan(answer: Tensor) -> Tensor:
    return answer * torch.nan


def slow(answer: Tensor) -> Exception:
    return Slow("took 3 s")


def error(answer: Tensor) -> Exception:
    return RuntimeError("a matrix is singular")


def wrong_shape(answer: Tensor) -> Tensor:
    return answer[:, 0]


@pytest.mark.parametrize("fault", [nan, slow, error, wrong_shape])
def test_a_lost_expert_is_left_out_and_said_so(
    flow: Path, fault: Callable[[Tensor], Tensor | Exception]
) -> None:
    bench = Bench(flow)
    bench.pool.faults[1] = fault
    job = samples(bench, 4)
    bench.run()
    assert (job.answered, job.lost) == ({0, 2}, {1})
    alive = np.array([True, False, True])
    assert pixels(job)[0] == pytest.approx(plain(bench, 4, All(), alive), abs=1e-5)
    outcome = {nan: "garbage", wrong_shape: "garbage", slow: "slow", error: "error"}[fault]
    calls = bench.metrics.calls.labels("expert-1", outcome)._value.get()
    assert calls == (1 if fault is slow else 3)  # then nobody asked it any more


def test_who_is_left_out_is_tried_again_outside_of_requests(flow: Path) -> None:
    bench = Bench(flow)
    patients = bench.engine.patients
    bench.pool.faults[1] = slow
    samples(bench, 4)
    bench.run()
    assert patients.alive(bench.version).tolist() == [True, False, True]
    assert patients.to_probe(bench.version) == []
    bench.clock.now_s += 1.1
    assert patients.to_probe(bench.version) == [1]
    assert patients.to_probe(bench.version) == []  # one call, not many
    assert not patients.alive(bench.version)[1]  # no request waits for it
    patients.examine(bench.version, 1, Slow("again"), 1, 2.0)
    bench.clock.now_s += 1.1
    assert patients.to_probe(bench.version) == []  # the cool-down has doubled
    bench.clock.now_s += 1.0
    assert patients.to_probe(bench.version) == [1]
    patients.examine(bench.version, 1, torch.zeros(1, *SHAPE), 1, 0.1)
    assert patients.alive(bench.version).all()
    job = samples(bench, 4)
    del bench.pool.faults[1]
    bench.run()
    assert job.lost == set()


def test_nobody_left_is_503_with_a_time_to_come_again(flow: Path) -> None:
    bench = Bench(flow)
    bench.pool.faults = dict.fromkeys(range(3), slow)
    job = samples(bench, 4)
    bench.run()
    with pytest.raises(Refusal) as refusal:
        job.done.result(timeout=0)
    assert refusal.value.status == 503
    assert refusal.value.retry_after_s == pytest.approx(1.0)


def test_a_router_that_answers_garbage_is_503(flow: Path) -> None:
    bench = Bench(flow)
    with torch.no_grad():
        bench.version.router.net[0].weight.fill_(torch.nan)  # type: ignore[index, union-attr]
    job = samples(bench, 4)
    bench.run()
    with pytest.raises(Refusal, match="router"):
        job.done.result(timeout=0)


def test_the_queue_is_bounded(flow: Path) -> None:
    bench = Bench(flow, batching={"max_queue_rows": 3})
    samples(bench, 1, 2)
    with pytest.raises(Refusal, match=r"2 rows wait; batching.max_queue_rows is 3") as refusal:
        samples(bench, 3, 4)
    assert refusal.value.status == 429
    assert refusal.value.retry_after_s is not None
    bench.run()
    samples(bench, 3, 4)


def test_deadlines_and_who_left_free_the_engine(flow: Path) -> None:
    bench = Bench(flow)
    late = samples(bench, 1, deadline_s=bench.clock.now_s + 1)
    left = samples(bench, 2)
    stays = samples(bench, 3)
    bench.engine.tick()
    bench.clock.now_s += 2
    bench.engine.cancel(left)
    bench.pool.num_rows.clear()
    bench.run()
    with pytest.raises(Refusal) as refusal:
        late.done.result(timeout=0)
    assert refusal.value.status == 504
    assert {rows for _, rows in bench.pool.num_rows} == {1}
    assert pixels(stays).shape == (1, *SHAPE)
    assert bench.engine.num_rows == 0


def test_more_rows_than_a_call_holds_go_in_turn(flow: Path) -> None:
    bench = Bench(flow, batching={"max_rows": 2})
    jobs = [samples(bench, seed) for seed in range(5)]
    assert bench.run() == 3 * NUM_STEPS
    assert all(pixels(job).shape == (1, *SHAPE) for job in jobs)


def test_one_expert_may_be_asked_alone(flow: Path) -> None:
    bench = Bench(flow)
    job = samples(bench, 3, policy=Only(2), keeps_trace=True)
    bench.run()
    assert job.answered == {2}
    assert job.trace == [[[0.0, 0.0, 1.0]] * NUM_STEPS]


def classify(tmp_path: Path, **settings: Any) -> Bench:
    make_repository(tmp_path / "classes", "classifier")
    return Bench(tmp_path / "classes", **settings)


def inputs(num: int) -> Tensor:
    return torch.randn((num, *SHAPE), generator=torch.Generator().manual_seed(8))


def test_classes_are_mixtures_of_probabilities(tmp_path: Path) -> None:
    bench = classify(tmp_path)
    x = inputs(6)
    job = bench.job(Predicting(one) for one in x)
    assert bench.run() == 1
    experts = [bench.version.repository.load_expert(name) for name in bench.version.names]
    with torch.no_grad():
        shares = bench.version.router(x).softmax(1)
        wanted = sum(shares[:, k, None] * expert(x).softmax(1) for k, expert in enumerate(experts))
    got = torch.stack([work.probabilities for work in job.works])  # type: ignore[attr-defined]
    assert got == pytest.approx(wanted, abs=1e-6)
    assert got.sum(1) == pytest.approx(torch.ones(6))


def test_a_cascade_asks_more_only_for_rows_that_are_unsure(tmp_path: Path) -> None:
    bench = classify(tmp_path)
    job = bench.job((Predicting(one) for one in inputs(40)), policy=Only(0))
    bench.run()
    sure = [float(work.probabilities.max()) for work in job.works]  # type: ignore[attr-defined]
    low, high = np.quantile(sure, [0.2, 0.6])
    bench.pool.num_rows.clear()
    cascade = Cascade(low=float(low), high=float(high))
    job = bench.job((Predicting(one) for one in inputs(32)), policy=cascade, keeps_trace=True)
    bench.run()
    asked = [sum(weight > 0 for weight in steps[0]) for steps in job.trace]
    assert set(asked) == {1, 2}
    assert sum(rows for _, rows in bench.pool.num_rows) == sum(asked)


def test_the_survivors_of_a_cascade_answer(tmp_path: Path) -> None:
    bench = classify(tmp_path)
    bench.pool.faults[0] = slow
    bench.pool.faults[1] = slow
    job = bench.job(
        (Predicting(one) for one in inputs(9)), policy=Cascade(low=0.0, high=1.0, at_most=2**70)
    )
    bench.run()
    job.done.result(timeout=0)
    assert (job.answered, job.lost) == ({2}, {0, 1})


def test_a_second_opinion_that_is_lost_is_said_so(tmp_path: Path) -> None:
    bench = classify(tmp_path)
    (x,) = inputs(1)
    with torch.no_grad():
        first, second, _ = bench.version.router(x[None])[0].argsort(descending=True).tolist()
    bench.engine.patients.unloaded = frozenset({f"expert-{second}"})
    unsure = bench.job([Predicting(x)], policy=Cascade(low=0.0, high=1.0))
    sure = bench.job([Predicting(x)], policy=Cascade(low=0.0, high=0.0))
    bench.run()
    assert (first in unsure.answered, unsure.lost) == (True, {second})
    assert (sure.answered, sure.lost) == ({first}, set())


def test_bytes_are_drawn_from_each_request_s_own_numbers(tmp_path: Path) -> None:
    make_repository(tmp_path / "text", "language")
    bench = Bench(tmp_path / "text")

    def completing(seed: int, temperature: float = 1.0) -> Completing:
        return Completing(
            b"hello", CONTEXT, max_tokens=12, temperature=temperature, top_p=0.9, seed=seed
        )

    works = [completing(1), completing(2), completing(1), completing(3, 0.0), completing(4, 0.0)]
    bench.job(works)
    bench.run()
    texts = [bytes(work.text) for work in works]
    assert texts[0] == texts[2] != texts[1]
    assert texts[3] == texts[4]
    assert {len(text) for text in texts} == {12}
    core = completing(1)
    bench.job([core], policy=Core(at_most=2))
    bench.run()
    assert core.finish_reason == "length"


def test_a_completion_ends_at_a_stop_word(tmp_path: Path) -> None:
    make_repository(tmp_path / "text", "language")
    bench = Bench(tmp_path / "text")
    free = Completing(b"a", CONTEXT, max_tokens=9, temperature=0, top_p=1, seed=0)
    bench.job([free])
    bench.run()
    stop = bytes(free.text[2:4])
    work = Completing(b"a", CONTEXT, max_tokens=9, temperature=0, top_p=1, seed=0, stop=[stop])
    bench.job([work])
    bench.run()
    assert work.finish_reason == "stop"
    assert bytes(work.text) == bytes(free.text).partition(stop)[0]


def test_a_stream_holds_back_what_may_become_a_stop_word() -> None:
    told = bytearray()
    work = Completing(
        b"a", 8, max_tokens=9, temperature=0, top_p=1, seed=0, stop=[b"xyz"], on_byte=told.append
    )
    seen = []
    for letter in b"axyaxyz":
        work.take(torch.nn.functional.one_hot(torch.tensor(letter), 256))
        seen.append(bytes(told))
    assert seen == [b"a", b"a", b"a", b"axya", b"axya", b"axya", b"axya"]
    assert (bytes(work.text), work.finish_reason) == (b"axya", "stop")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.0), (5e-324, 1.0), (1e-310, 0.0)])
def test_the_coldest_draws_take_the_most_probable_byte(temperature: float, top_p: float) -> None:
    work = Completing(b"a", 8, max_tokens=1, temperature=temperature, top_p=top_p, seed=0)
    probabilities = torch.full((256,), 0.003)
    probabilities[65] = 0.01
    work.take(probabilities)
    assert bytes(work.text) == b"A"


def test_who_asks_for_no_token_is_answered(tmp_path: Path) -> None:
    make_repository(tmp_path / "text", "language")
    bench = Bench(tmp_path / "text")
    job = bench.job([Completing(b"a", CONTEXT, max_tokens=0, temperature=1, top_p=1, seed=0)])
    bench.run()
    job.done.result(timeout=0)


def test_who_asks_for_a_lost_expert_alone_takes_nobody_along(flow: Path) -> None:
    bench = Bench(flow)
    bench.engine.patients.unloaded = frozenset({"expert-1"})
    others, alone = samples(bench, 1), samples(bench, 2, policy=Only(1))
    bench.run()
    with pytest.raises(Refusal) as refusal:
        alone.done.result(timeout=0)
    assert refusal.value.status == 503
    alive = np.array([True, False, True])
    assert pixels(others)[0] == pytest.approx(plain(bench, 1, All(), alive), abs=1e-5)


def test_a_row_that_the_router_cannot_take_takes_nobody_along(flow: Path) -> None:
    bench = Bench(flow)
    others, huge = samples(bench, 1), bench.job([Denoising(torch.full(SHAPE, torch.inf), 1)])
    bench.run()
    with pytest.raises(Refusal, match="router"):
        huge.done.result(timeout=0)
    assert pixels(others)[0] == pytest.approx(plain(bench, 1, All()), abs=1e-5)
