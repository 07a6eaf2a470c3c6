"""When Ray's GCS is asked again, and what counts as its being away."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RpcError

from actors.cluster_nodes import asking
from actors.outages import Outage, insist
from elastic.core.errors import ClusterError


class Away:
    """A GCS that raises so many times, and a clock that only waiting moves."""

    def __init__(self, num_failures: int) -> None:
        self.left, self.now_s = num_failures, 100.0
        self.asked_s: list[float] = []

    def ask(self) -> str:
        self.asked_s.append(self.now_s)
        if self.left > 0:
            self.left -= 1
            raise ClusterError("away")
        return "here"

    def sleep(self, wait_s: float) -> None:
        self.now_s += wait_s


def test_it_is_asked_less_and_less_often_until_it_answers() -> None:
    away = Away(9)
    assert insist(away.ask, clock=lambda: away.now_s, sleep=away.sleep) == "here"
    waits_s = [
        after - before for before, after in zip(away.asked_s, away.asked_s[1:], strict=False)
    ]
    assert waits_s == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])


def test_patience_ends() -> None:
    away = Away(10**9)
    with pytest.raises(ClusterError, match="away"):
        insist(away.ask, patience_s=20.0, clock=lambda: away.now_s, sleep=away.sleep)
    assert 20.0 <= away.now_s - 100.0 < 26.0


def test_an_outage_is_new_once_and_over_at_the_first_answer() -> None:
    outage = Outage()
    assert outage.may_ask(0.0)
    assert [outage.goes_on(now_s) for now_s in (1.0, 2.0)] == [True, False]
    assert not outage.may_ask(2.19)
    assert outage.may_ask(2.21)
    outage.ends()
    assert outage.may_ask(0.0)
    assert outage.goes_on(3.0)


@pytest.mark.parametrize(
    "error",
    [
        RpcError("failed to connect to all addresses\nand more", rpc_code=14),
        GetTimeoutError("There was timeout in getting the actor handle"),
        ConnectionResetError("reset by peer"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_whatever_ray_raises_is_one_error(error: Exception) -> None:
    with pytest.raises(ClusterError) as caught, asking():
        raise error
    first = str(error).partition("\n")[0]
    assert str(caught.value) == f"Ray's GCS does not answer: {type(error).__name__}: {first}"


def test_the_death_of_an_actor_is_not_the_absence_of_the_gcs() -> None:
    with pytest.raises(ActorDiedError), asking():
        raise ActorDiedError
