"""Deliberately broken protocols: each breaks one rule, and the simulator must notice.

Subclasses of the real classes, so that the product holds no switch for any of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from elastic.core.fixed_point import Sums
from elastic.core.protocol import aggregator as agg
from elastic.core.protocol import events as ev
from elastic.core.protocol import worker as wrk
from elastic.core.protocol.coding import Coding
from elastic.core.protocol.coordinator import Action, Coordinator, StartWorker, View
from elastic.core.protocol.joining import Observers, Observing
from elastic.core.protocol.keeping import Keeping
from elastic.core.protocol.messages import (
    Combine,
    Commit,
    Hello,
    Key,
    Lease,
    Manifest,
    Membership,
)
from elastic.core.protocol.node import Node, NodeAction, Role
from elastic.core.protocol.orders import Holds
from elastic.core.simulator.build import Build, RecordedAggregator, RecordedWorker
from elastic.core.simulator.faults import Fault, Schedule, random_schedule
from policies.auditing import Lie
from policies.coding.simulation import Coded


class NoFence(RecordedAggregator):
    """A worker whose slot was unlinked is welcomed as if it were new."""

    def _greet(self, hello: Hello, now_s: float) -> list[ev.Action]:
        return super()._greet(replace(hello, has_slot=False), now_s)


class StaleAttemptAccepted(RecordedAggregator):
    """An answer to an earlier attempt of the step counts for this one."""

    def _asked(self, worker: int, peer: agg._Peer, commit: Commit, now_s: float) -> list[ev.Action]:
        if commit.lease.key.step == self.state.step:
            commit = replace(commit, lease=replace(commit.lease, key=self.state.key))
        return super()._asked(worker, peer, commit, now_s)


class StaleStepAccepted(RecordedAggregator):
    """An answer to an earlier step counts for this one."""

    def _asked(self, worker: int, peer: agg._Peer, commit: Commit, now_s: float) -> list[ev.Action]:
        if commit.lease.combine is Combine.SUM:
            commit = replace(commit, lease=replace(commit.lease, key=self.state.key))
        return super()._asked(worker, peer, commit, now_s)


class GrantTwice(RecordedAggregator):
    """A micro-batch that was granted to one worker is granted to another too."""

    def _refusal(
        self, worker: int, commit: Commit, mine: tuple[int, ...], manifest: Manifest
    ) -> str:
        refusal = super()._refusal(worker, commit, mine, manifest)
        return "" if refusal.startswith("granted") else refusal


class RepeatedQuestionGrantedAgain(RecordedAggregator):
    """A question that was answered before is taken as a new one."""

    def _asked(self, worker: int, peer: agg._Peer, commit: Commit, now_s: float) -> list[ev.Action]:
        manifest = self._manifests[worker]
        again = set(commit.lease.micro_batches) <= set(manifest.micro_batches)
        if again and commit.lease.key == self.state.key == manifest.key:
            return self._grant(worker, commit, manifest)
        return super()._asked(worker, peer, commit, now_s)


class ManifestBeforeRow(RecordedAggregator):
    """The grant is valid before the row it needs is written."""

    def _grant(self, worker: int, commit: Commit, manifest: Manifest) -> list[ev.Action]:
        actions = super()._grant(worker, commit, manifest)
        return sorted(actions, key=lambda action: isinstance(action, ev.SaveRow))


class DoneBeforeManifest(RecordedAggregator):
    """Others are told to abandon a micro-batch before it counts."""

    def _grant(self, worker: int, commit: Commit, manifest: Manifest) -> list[ev.Action]:
        actions = super()._grant(worker, commit, manifest)
        return sorted(actions, key=lambda action: not isinstance(action, ev.MarkDone))


class FlipBeforeSum(RecordedAggregator):
    """The commit record says the next step before its version is complete."""

    def _complete(self) -> list[ev.Action]:
        actions = super()._complete()
        if not isinstance(actions[-1], ev.Update):
            return actions
        return [*self._commit(0.0), *actions]

    def _react(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        return [] if isinstance(event, ev.Updated) else super()._react(event, now_s)


class CountByWorker(RecordedAggregator):
    """A step is complete when every member has answered, whatever micro-batches are missing."""

    def _advance(self) -> list[ev.Action]:
        actions = super()._advance()
        answered = set(self._granted_to.values())
        members = set(self.membership.members)
        if not actions and members and members <= answered:
            return self._complete()
        return actions


class NotANumberCounts(RecordedAggregator):
    """A NaN is not recomputed: the first one is the model's own."""

    def _is_own(self, micro_batch: int) -> bool:
        return True


class SameWorkerTriesAgain(RecordedAggregator):
    """A NaN may be recomputed where it came from."""

    def _may_try(self, worker: int, micro_batch: int) -> bool:
        return True


class TrainingSharesTheKeyOfTheEvaluation(RecordedAggregator):
    """What an evaluation had granted is not told from the training of the same step."""

    def _begin(self, state: agg.State) -> None:
        if state.evaluated > self.state.evaluated:
            state = replace(state, attempt=state.attempt - 1)
        super()._begin(state)


class EvaluationCountsByWorker(RecordedAggregator):
    """An evaluation is over when every member has answered."""

    @property
    def _num_wanted(self) -> int:
        wanted = super()._num_wanted
        return min(wanted, len(self.membership.members)) if self._evaluates else wanted


class AbsentAreForgotten(RecordedAggregator):
    """Members that do not come back after a takeover are waited for."""

    def _absent(self, now_s: float) -> list[agg.WorkerProgress]:
        return []


class ManifestBeforeHalf(RecordedWorker):
    """The worker asks before it has written its half."""

    def _computed(self, words: wrk.Words) -> list[wrk.Action]:
        current, outcomes = self._current, self._outcomes
        actions = super()._computed(words)
        if not (actions and isinstance(actions[0], wrk.Encode)):
            return actions
        assert current is not None
        num_base = len(self._base(current).micro_batches)
        early = Commit(current, actions[0].half, num_base, outcomes)
        return [wrk.Send(early), *actions]


class WritesTheLiveHalf(RecordedWorker):
    """The sum is written in place, over what counts."""

    def _computed(self, words: wrk.Words) -> list[wrk.Action]:
        actions = super()._computed(words)
        return [
            replace(one, half=one.base)
            if isinstance(one, wrk.Encode) and one.base is not None
            else one
            for one in actions
        ]


class DoesNotWaitForTheAnswer(RecordedWorker):
    """The next sum is begun while it is unknown which half is live."""

    def _computed(self, words: wrk.Words) -> list[wrk.Action]:
        self._asked = None
        return super()._computed(words)


class WelcomeCountsTwice(RecordedWorker):
    """A grant that the welcome told of already is added again: every later question is wrong."""

    def _granted(self, lease: Lease, half: int) -> None:
        self._live = self._base(lease).added(lease, half)


class NumbersAreUsedAgain(Coordinator):
    """A restarted coordinator trusts the membership alone for the next worker's number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fresh:
            self._membership = Membership()

    def decide(self, view: View) -> list[Action]:
        if self.fresh:
            return super().decide(view)
        first = self.membership.next_worker
        if view.report is not None:
            first = max(first, view.report.membership.next_worker)
        actions = super().decide(view)
        started = [one.worker for one in actions if isinstance(one, StartWorker)]
        too_high = min(started, default=first) - first
        return [
            StartWorker(one.worker - too_high) if isinstance(one, StartWorker) else one
            for one in actions
        ]


class UnauditedCounts(RecordedAggregator):
    """A step does not wait for its audits."""

    def _advance(self) -> list[ev.Action]:
        if len(self._outcomes) == self._num_wanted:
            self._auditing._open.clear()
        return super()._advance()


class LiarsKeepTheRest(RecordedAggregator):
    """Only what is known to be a lie is computed again, though it is in a sum with others."""

    def _empty(self, worker: int) -> list[ev.Action]:
        return []


class AuditorsAreBelieved(RecordedAggregator):
    """An answer that differs from the one that counts is a lie, whoever gave it first."""

    def _audited(self, worker: int, commit: Commit) -> list[ev.Action]:
        (outcome,) = commit.outcomes
        counts = self._auditing._answers.get(outcome.micro_batch, {})
        actions = super()._audited(worker, commit)
        if len({one.digest for one in counts.values()}) > 1:
            first = next(iter(counts))
            actions += self._quarantine([Lie(first, outcome.micro_batch, 1, 1, self.state.step)])
        return actions


class CommitsEarly(RecordedAggregator):
    """A step is committed once the lead's own version is complete."""

    def _updated_on(self, updated: ev.Updated) -> list[ev.Action]:
        self._updated |= set(self.membership.nodes)
        return super()._updated_on(updated)


class _Codes(RecordedAggregator):
    """An aggregator with another `Coding`."""

    kind: type[Coding] = Coding

    def __init__(
        self, rules: agg.Rules, recovered: agg.Recovered, node: int, seen: Counter[str]
    ) -> None:
        super().__init__(rules, recovered, node, seen)
        policy = rules.scheduling
        if isinstance(policy, Coded):
            self._coding = self.kind(policy, rules.num_micro_batches)


class EndsTooEarly(_Codes):
    """One worker more than the code withstands is not waited for."""

    class kind(Coding):  # noqa: N801 - the one that `_Codes` makes
        @property
        def is_complete(self) -> bool:
            return len(self._incomplete) <= self._num_stragglers + 1

        def lost(self, queues: object) -> str:
            return ""


class HalfASumCounts(_Codes):
    """Whoever has answered something is taken to have answered everything."""

    class kind(Coding):  # noqa: N801
        def granted(self, worker: int, lease: Lease) -> None:
            self._left[worker].clear()


class PlacesMixedUp(_Codes):
    """The decoder numbers workers in another order than the shares did."""

    class kind(Coding):  # noqa: N801
        def share(self, key: Key, paces: Mapping[int, float]) -> dict[int, tuple[Lease, ...]]:
            shares = super().share(key, paces)
            last = len(self._places) - 1
            self._places = {worker: last - place for worker, place in self._places.items()}
            return shares


class CoefficientsOfAnotherStep(_Codes):
    """What one step was coded with decodes the next one, whoever takes part by then."""

    class kind(Coding):  # noqa: N801
        before: tuple[int, ...] = ()

        def decoding(self) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
            slots, coefficients = super().decoding()
            old, self.before = self.before, coefficients
            return slots, old if len(old) == len(slots) else coefficients


class WaitsForLostSums(_Codes):
    """Nobody sees that too many sums of the code will never come."""

    class kind(Coding):  # noqa: N801
        def lost(self, queues: object) -> str:
            return ""


class CodedTakenForPlain(RecordedAggregator):
    """The halves are added up, though what lies there is coded."""

    def _decode(self, limits_C: Sums, weight: float) -> list[ev.Action]:
        return [
            replace(one, coefficients=()) if isinstance(one, ev.Update) else one
            for one in super()._decode(limits_C, weight)
        ]


class CodedAttemptGoesOn(RecordedAggregator):
    """What does not fit the code is leased anew under the same key."""

    def _uncoded(self, reason: str) -> list[ev.Action]:
        self._begin(self.state, uncoded=True)
        return [ev.SaveState(self.state)]


class KeepsLostGrants(RecordedAggregator):
    """What was granted on a node that is lost is taken to count all the same."""

    def _take_back(self, node: int, manifests: Mapping[int, Manifest]) -> list[ev.Action]:
        return []


class WaitsForTheLost(RecordedAggregator):
    """A round that a node was lost in is not given up."""

    def _give_up(self) -> list[ev.Action]:
        return []


class LeasesBeforeItKnows(Node):
    """Two homes: a new lead goes by its own memory, whatever was granted on other nodes."""

    def _lead_if_known(self, now_s: float) -> list[NodeAction]:
        if self.role is not Role.GATHERING:
            return []
        for one in self.membership.nodes:
            self._holds.setdefault(one, Holds(0, self._memory.state, 0, {}))
        return super()._lead_if_known(now_s)


class Eager(Observers):
    def ready(self, step: int) -> tuple[int, ...]:
        return self.nodes


class ReadyBeforeItIs(RecordedAggregator):
    """A joining node may be a member as soon as it takes part in rounds."""

    def __init__(
        self, rules: agg.Rules, recovered: agg.Recovered, node: int, seen: Counter[str]
    ) -> None:
        super().__init__(rules, recovered, node, seen)
        self._observers = Eager()


class WaitsForTheJoining(RecordedAggregator):
    """A step is committed once it is complete on nodes that join, too."""

    def _updated_on(self, updated: ev.Updated) -> list[ev.Action]:
        if not set(self._observers.nodes) <= self._updated:
            self._updated.add(updated.node)
            return []
        return super()._updated_on(updated)


class Believing(Observing):
    """Takes a version for complete that may have been lost on its way."""

    def _save(self, state: agg.State) -> list[ev.Action]:
        self.step = state.step
        return super()._save(state)


class BelievesWhatItHears(Node):
    """A joining node takes every commit record for its own, whatever it has received."""

    def _observe(self, order: ev.Action) -> list[NodeAction]:
        if self._observing is None:
            self._observing = Believing(self.node)
        return super()._observe(order)


class Trusting(Keeping):
    def there(self, node: int, kept: Iterable[int]) -> str:
        return super().there(node, range(self._num_chunks))


class TrustsEveryMember(RecordedAggregator):
    """A member is taken to keep the state of every chunk, whatever it says."""

    def __init__(
        self, rules: agg.Rules, recovered: agg.Recovered, node: int, seen: Counter[str]
    ) -> None:
        super().__init__(rules, replace(recovered, kept={}), node, seen)
        self._keeping = Trusting(rules.replicas, rules.num_chunks)
        every = range(rules.num_chunks)
        nodes = self.membership.nodes
        self._keeping.begin(dict.fromkeys(nodes, every), nodes, self.membership.departing)


class ComesBackAsItWas(Coordinator):
    """A node that was lost may be a member again, with what its memory holds."""

    def _change(self, membership: Membership) -> None:
        super()._change(replace(membership, former=()))


@dataclass(frozen=True, slots=True)
class Mutation:
    """A broken protocol, and within how many seeds it must be noticed."""

    name: str
    build: Build
    faults: tuple[Fault, ...] = ()
    num_seeds: int = 200
    is_coded: bool = False

    def schedule(self, seed: int) -> Schedule:
        """A random schedule; of the faults that the mutation is sensitive to, if it is rare."""
        if self.is_coded:
            return coded(seed, *self.faults)
        return directed(seed, *self.faults) if self.faults else random_schedule(seed)


def coded(seed: int, *faults: Fault) -> Schedule:
    """A random job whose sums are coded, for one worker that straggles."""
    schedule = directed(seed, *faults)
    num_workers = max(4, schedule.num_workers)
    return replace(schedule, code=("c_code", "crc")[seed % 2], copies=2, num_workers=num_workers)


def directed(seed: int, *faults: Fault) -> Schedule:
    """A random job of 12 steps that is struck by these faults alone; on 3 nodes if they are.

    Of 100 steps if a node joins: it may not do so for ever.
    """
    num_steps = 100 if any(fault.do == "join_node" for fault in faults) else 12
    schedule = replace(random_schedule(seed), faults=faults, num_steps=num_steps, standby=True)
    if any(fault.do == "lying_worker" for fault in faults):
        num_workers = max(4, schedule.num_workers)
        schedule = replace(schedule, audited=1.0, num_workers=num_workers, code="")
    strikes_nodes = any(fault.do.endswith("_node") for fault in faults)
    if strikes_nodes:
        return replace(schedule, num_nodes=3, code="")
    return replace(schedule, num_nodes=1)


def _aggregator(kind: type[RecordedAggregator], *faults: Fault) -> Mutation:
    return Mutation(kind.__name__, Build(aggregator=kind), faults)


def _coding(kind: type[RecordedAggregator], *faults: Fault) -> Mutation:
    return Mutation(kind.__name__, Build(aggregator=kind), faults, is_coded=True)


def _node(kind: type[Node], *faults: Fault) -> Mutation:
    return Mutation(kind.__name__, Build(node=kind), faults, num_seeds=400)


def _worker(kind: type[RecordedWorker], *faults: Fault) -> Mutation:
    return Mutation(kind.__name__, Build(worker=kind), faults)


UNHEARD = (  # taken to hang, dismissed, its slot dropped; it comes back to a successor
    Fault(do="stop_worker", step=1, point=("Compute", "during"), for_s=0.45),
    Fault(do="slow_kill", step=1, for_s=3.0),
    Fault(do="kill_aggregator", step=1, offset_s=0.02, point=("DropSlot", "after")),
)
JOIN = Fault(do="join_node", step=1)
FREEZE_JOINING = Fault(do="freeze_node", step=1, offset_s=0.8, target=-1)
DURING_THE_COPY = tuple(  # or a little before or after it
    Fault(do="kill_node", step=1, offset_s=offset_s, point=("Update", "during"))
    for offset_s in (0.75, 1.0)
)
KILL_NODE = Fault(do="kill_node", step=2, offset_s=0.05)
CUT_AT_THE_START = (  # later it would have to receive a whole version first
    Fault(do="stop_worker", step=0, point=("Compute", "during"), for_s=2.5),
    Fault(do="stop_worker", step=0, point=("Compute", "during"), target=1, for_s=2.5),
    Fault(do="cut_node", step=0, point=("SaveManifest", "after"), for_s=0.9),
)
TWO_COORDINATORS = (  # both replace the workers that die
    Fault(do="split_coordinator", step=1, for_s=3.0),
    *(
        Fault(do="kill_worker", step=1, offset_s=0.05 + 0.1 * target, target=target)
        for target in range(3)
    ),
    KILL_NODE,
)
DELAYS = Fault(do="delay_messages", step=1, factor=0.03, for_s=9.0)
LIAR = Fault(do="lying_worker", step=1, factor=0.2)
KILL_TWO = tuple(
    Fault(do="kill_worker", step=step, point=("Compute", "during"), target=target)
    for step in (3, 6, 9)
    for target in (0, 1)
)
ALL_STOPPED = tuple(Fault(do="stop_worker", step=2, target=target) for target in range(8))


MUTATIONS = (
    Mutation("ActsWithoutTheLock", Build(needs_lock=False)),
    _aggregator(NoFence, *UNHEARD),
    _aggregator(StaleAttemptAccepted, DELAYS),
    _aggregator(StaleStepAccepted),
    _aggregator(GrantTwice),
    _aggregator(RepeatedQuestionGrantedAgain),
    _aggregator(ManifestBeforeRow),
    _aggregator(DoneBeforeManifest),
    _aggregator(FlipBeforeSum),
    _aggregator(CountByWorker),
    _aggregator(NotANumberCounts),
    _aggregator(SameWorkerTriesAgain),
    _aggregator(TrainingSharesTheKeyOfTheEvaluation),
    _aggregator(EvaluationCountsByWorker),
    _aggregator(
        AbsentAreForgotten, *ALL_STOPPED, Fault(do="kill_aggregator", step=2, offset_s=0.001)
    ),
    _worker(ManifestBeforeHalf),
    _worker(WritesTheLiveHalf),
    _worker(DoesNotWaitForTheAnswer),
    _worker(
        WelcomeCountsTwice,
        *(
            Fault(do="kill_aggregator", step=step, point=("SaveManifest", "after"))
            for step in (1, 3, 5)
        ),
    ),
    _aggregator(UnauditedCounts, LIAR),
    _aggregator(LiarsKeepTheRest, LIAR),
    _aggregator(AuditorsAreBelieved, LIAR),
    _coding(EndsTooEarly),
    _coding(HalfASumCounts),
    _coding(PlacesMixedUp),
    _coding(CoefficientsOfAnotherStep),
    _coding(WaitsForLostSums, *KILL_TWO),
    _coding(CodedTakenForPlain),
    _coding(CodedAttemptGoesOn, *KILL_TWO),
    _aggregator(CommitsEarly, KILL_NODE),
    _aggregator(KeepsLostGrants, KILL_NODE),
    _aggregator(WaitsForTheLost, KILL_NODE),
    _aggregator(ReadyBeforeItIs, JOIN),
    _aggregator(WaitsForTheJoining, JOIN, FREEZE_JOINING),
    _node(BelievesWhatItHears, JOIN, *DURING_THE_COPY),
    _aggregator(TrustsEveryMember, JOIN, *DURING_THE_COPY),
    _node(LeasesBeforeItKnows),
    Mutation("ComesBackAsItWas", Build(coordinator=ComesBackAsItWas), CUT_AT_THE_START),
    Mutation("GenerationWithoutPutIfAbsent", Build(needs_generations=False), TWO_COORDINATORS),
    Mutation(
        "NumbersAreUsedAgain",
        Build(coordinator=NumbersAreUsedAgain),
        (Fault(do="kill_coordinator", step=0, point=("StartWorker", "after")),),
    ),
)
