"""The audits of a step: who is asked, when it may go on, what a lie takes with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elastic.core.protocol.auditing import MAX_TRIES, Anew, Auditing, Unsettled
from elastic.core.protocol.messages import Outcome
from policies.auditing import AskAgain, Audits

NUM = 4
EVERYBODY = {worker: worker % 2 for worker in range(4)}


def answer(micro_batch: int, digest: bytes = b"right", **more: float) -> Outcome:
    right = Outcome(micro_batch, 1.0, 2.0, bytes(16), bytes(8), np.ones(3, np.float32))
    return replace(right, digest=digest.ljust(16), start_s=np.random.random(), **more)


def auditing(probability: float = 1.0) -> Auditing:
    made = Auditing(Audits(seed=0, probability=probability))
    made.begin(3, NUM)
    return made


def test_a_step_waits_until_another_worker_has_answered_alike() -> None:
    audits = auditing()
    assert audits.is_done
    assert audits.granted(0, 0, answer(1)) == []
    assert not audits.is_done
    (asked,) = audits.next({0: 0, 1: 1}, EVERYBODY, ())
    assert isinstance(asked, AskAgain)
    assert (asked.micro_batch, asked.worker) == (1, 1)
    assert audits.next({0: 0, 2: 1}, EVERYBODY, [1]) == [], "its answer is on its way"
    assert audits.heard(1, 1, answer(1)) == []
    assert audits.is_done


def test_who_is_outvoted_has_lied_whoever_was_first() -> None:
    for first in (b"right", b"wrong"):
        audits = auditing()
        audits.granted(0, 0, answer(1, first))
        assert audits.heard(1, 1, answer(1, b"wrong" if first == b"right" else b"right")) == []
        (lie,) = audits.heard(2, 0, answer(1, b"right"))
        assert lie.worker == (1 if first == b"right" else 0)


@pytest.mark.parametrize("what", ["loss_sum", "weight"])
def test_all_that_is_reported_is_compared(what: str) -> None:
    audits = auditing()
    audits.granted(0, 0, answer(1))
    audits.heard(1, 1, replace(answer(1), **{what: 5.0}))
    assert [lie.worker for lie in audits.heard(2, 0, answer(1))] == [1]


def test_what_a_liar_has_vouched_for_is_asked_again() -> None:
    audits = auditing()
    for micro_batch in (1, 2):
        audits.granted(0, 0, answer(micro_batch))
        audits.heard(1, 1, answer(micro_batch))
    assert audits.is_done
    assert audits.forget(1) == []
    assert not audits.is_done
    asked = audits.next({2: 0, 3: 1}, EVERYBODY, ())
    assert [type(one) for one in asked] == [AskAgain, AskAgain]


def test_what_is_taken_back_keeps_the_opinions_of_others() -> None:
    audits = auditing()
    audits.granted(0, 0, answer(1, b"wrong"))
    audits.heard(1, 1, answer(1))
    audits.heard(2, 0, answer(1))
    audits.taken_back([1])
    audits.forget(0)
    assert audits.is_done
    assert audits.granted(3, 1, answer(1)) == []
    assert audits.is_done, "two have said so before"


def test_where_nobody_else_is_it_is_computed_anew_then_let_through() -> None:
    audits = auditing(0.999)
    found: list[object] = []
    for _ in range(MAX_TRIES + 1):
        audits.granted(0, 0, answer(1, b"one"))
        audits.heard(1, 1, answer(1, b"another"))
        found += audits.next({0: 0, 1: 1}, [0, 1], ())
        if isinstance(found[-1], Anew):
            audits.taken_back([1])
    assert [type(one) for one in found] == [Anew] * MAX_TRIES + [Unsettled]
    assert audits.is_done


def test_who_computes_anew_is_asked_nothing_besides() -> None:
    audits = auditing()
    audits.granted(0, 0, answer(1, b"one"))
    audits.heard(1, 1, answer(1, b"another"))
    audits.granted(1, 1, answer(2))
    (found,) = audits.next({0: 0}, [0, 1], ())
    assert isinstance(found, Anew)
    assert found.worker == 0, "its connection ends"


def test_where_all_is_audited_nothing_is_let_through_and_it_is_told_once() -> None:
    audits = auditing()
    audits.granted(0, 0, answer(1))
    (told,) = audits.next({0: 0}, [0], ())
    assert isinstance(told, Unsettled)
    assert "waits for another worker" in told.reason
    assert audits.next({0: 0}, [0], ()) == []
    assert not audits.is_done
    assert isinstance(audits.next({0: 0, 1: 1}, [0, 1], ())[0], AskAgain)


def test_one_worker_alone_is_not_audited_where_few_are() -> None:
    audits = auditing(0.999)
    audits.granted(0, 0, answer(1))
    assert audits.next({0: 0}, [0], ()) == []
    assert audits.is_done


def test_without_audits_nothing_is_remembered() -> None:
    audits = Auditing(None)
    audits.begin(0, NUM)
    assert audits.granted(0, 0, answer(1)) == []
    assert audits.is_done
