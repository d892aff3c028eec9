"""Planning: properties that hold for every graph, every state of the files and every queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.control.executor_protocol import Limits
from jobs.control.facts import InFlight, Phase, Request, StageFacts, needed_keys
from jobs.control.plan import Plan, make_plan
from jobs.experiment.graph import Graph, Node, Run
from jobs.store.failures import FailureClass

MAX_FAILURES = 9
REASON = "ValueError: no such layer"
IN_FLIGHT = InFlight(Phase.queued, "7_1")
quick = settings(max_examples=50, deadline=None)


@dataclass(frozen=True)
class Situation:
    """Everything a plan is made of."""

    graph: Graph
    facts: Mapping[str, StageFacts]
    in_flight: Mapping[str, InFlight]
    limits: Limits
    packing: int

    def plan(self, facts: Mapping[str, StageFacts] | None = None, in_flight: Mapping[str, InFlight] | None = None) -> Plan:
        return make_plan(
            self.graph,
            self.facts if facts is None else facts,
            self.in_flight if in_flight is None else in_flight,
            runs_per_task={"a": self.packing, "b": self.packing},
            limits=self.limits,
            max_failures=MAX_FAILURES,
        )


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any acyclic graph of up to 14 stages of three names, also chains of the same stage; runs are any of its nodes."""
    size = draw(st.integers(1, 14))
    nodes: dict[str, Node] = {}
    for index in range(size):
        parents = draw(st.lists(st.sampled_from(sorted(nodes)), max_size=3, unique=True)) if nodes else []
        upstream = {f"role{number}": parent for number, parent in enumerate(parents)}
        stage, method, fold = draw(st.sampled_from("abc")), draw(st.sampled_from(["vft", "tapt"])), draw(st.sampled_from("12"))
        nodes[f"k{index:02}"] = Node(f"k{index:02}", stage, 1, {}, {}, upstream, fold, index, method)
    ends = draw(st.lists(st.sampled_from(sorted(nodes)), min_size=1, unique=True))
    runs = tuple(Run(nodes[key].method, nodes[key].fold, slot, slot, key) for slot, key in enumerate(ends))
    children = {key: tuple(other.key for other in nodes.values() if key in other.upstream.values()) for key in nodes}
    return Graph(nodes, runs, "fake", "d1", children)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """A graph with any state of its stages."""
    graph = draw(graphs())
    rarely = st.sampled_from([False, False, False, True])
    fact = st.builds(
        StageFacts,
        done=st.booleans(),
        failures=st.integers(0, 3),
        attempts=st.integers(0, 3),
        stopped=st.sampled_from(["", "", "", REASON]),
        error=st.just(REASON),
        failure=st.sampled_from([None, *FailureClass]),
        executed_by=st.sampled_from(["", "", "", "process 5 on host"]),
        diverged=st.sampled_from(["", "", "", "NaN at step 7"]),
        cancelled=rarely,
        request=st.builds(Request, relief=st.integers(0, 2), exclude=st.sampled_from([(), ("n1",)])),
        bad_nodes=st.sampled_from([(), ("n2",), ("n1", "n3")]),
    )
    facts = {key: draw(fact) for key in graph.nodes if draw(st.booleans())}
    phases = st.sampled_from([None, None, None, None, InFlight(Phase.running, "7_2"), IN_FLIGHT])
    in_flight = {key: flight for key in graph.nodes if (flight := draw(phases))}
    limits = Limits(array_size=draw(st.integers(0, 3)), queue_room=draw(st.integers(-1, 4)))
    return Situation(graph, facts, in_flight, limits, draw(st.integers(1, 3)))


def _places(plan: Plan) -> Counter[str]:
    keys = [*plan.reused, *plan.waiting, *plan.deferred, *plan.blocked, *plan.given_up, *plan.held_or_cancelled]
    return Counter(keys + [key for batch in plan.batches for key in batch.keys])


def _submitted(plan: Plan) -> list[str]:
    return [key for batch in plan.batches for key in batch.keys]


@quick
@given(situations())
def test_every_needed_stage_is_in_exactly_one_place(situation: Situation) -> None:
    """Nothing is forgotten, nothing is planned twice, and nothing unneeded appears."""
    places = _places(situation.plan())
    assert set(places) == set(needed_keys(situation.graph, situation.facts))
    assert set(places.values()) <= {1}


@quick
@given(situations())
def test_only_open_stages_are_submitted(situation: Situation) -> None:
    """No stage that is done, running, stopped, diverged, cancelled or in flight; no failed one once the budget is spent."""
    spent = sum(fact.failures for fact in situation.facts.values()) >= MAX_FAILURES
    for key in _submitted(situation.plan()):
        fact = situation.facts.get(key, StageFacts())
        assert not fact.done
        assert not any((fact.executed_by, fact.stopped, fact.diverged, fact.cancelled, spent and fact.failures))
        assert key not in situation.in_flight


@quick
@given(situations())
def test_upstream_is_done_or_in_flight_or_submitted_before(situation: Situation) -> None:
    """Every submitted stage can depend on something, and no task depends on a task of its own batch."""
    plan = situation.plan()
    standing = {key for key, fact in situation.facts.items() if fact.done} | (set(situation.in_flight) - set(plan.withdrawn))
    for batch in plan.batches:
        for key in batch.keys:
            assert set(situation.graph.nodes[key].upstream.values()) <= standing
        standing |= set(batch.keys)


@quick
@given(situations())
def test_limits_are_kept(situation: Situation) -> None:
    """No array is larger than allowed, no more tasks than there is room, no task packs more than asked or different upstream."""
    plan = situation.plan()
    sizes = [len(batch.tasks) for batch in plan.batches]
    if situation.limits.array_size:
        assert all(0 < size <= situation.limits.array_size for size in sizes)
    if situation.limits.queue_room:
        assert sum(sizes) <= max(0, situation.limits.queue_room)
    for batch in plan.batches:
        for task in batch.tasks:
            nodes = [situation.graph.nodes[key] for key in task.keys]
            assert 0 < len(nodes) <= situation.packing
            assert {(node.stage, node.method) for node in nodes} == {(batch.stage, batch.method)}
            assert len({(node.fold, frozenset(node.upstream.values())) for node in nodes}) == 1


@quick
@given(situations())
def test_a_batch_requests_what_each_of_its_stages_needs(situation: Situation) -> None:
    """One request per batch: that of all its stages, without the Slurm nodes that failed twice."""
    blamed = Counter(node for fact in situation.facts.values() for node in fact.bad_nodes)
    twice = {node for node, times in blamed.items() if times >= 2}
    for batch in situation.plan().batches:
        for key in batch.keys:
            own = situation.facts.get(key, StageFacts()).request
            assert (batch.request.relief, batch.request.memory_factor) == (own.relief, own.memory_factor)
            assert batch.request.exclude == tuple(sorted({*own.exclude, *twice}))


@quick
@given(situations())
def test_everything_queued_in_vain_is_withdrawn(situation: Situation) -> None:
    """All that is queued and not waited for is withdrawn, never what runs; every stage that is not submitted has a reason."""
    plan = situation.plan()
    queued = {key for key, flight in situation.in_flight.items() if flight.phase is Phase.queued}
    above = {parent for key in plan.waiting for parent in situation.graph.nodes[key].upstream.values()}
    assert queued - set(plan.waiting) - above <= set(plan.withdrawn) <= queued - set(plan.waiting)
    assert queued & {*plan.held_or_cancelled, *plan.given_up, *plan.blocked} <= set(plan.withdrawn)
    assert set(plan.reasons) == {*plan.held_or_cancelled, *plan.given_up}
    assert all(plan.reasons.values())


@quick
@given(situations())
def test_planning_again_after_submission_submits_only_what_was_deferred(situation: Situation) -> None:
    """With everything submitted in flight, a second plan repeats nothing; without limits it submits nothing."""
    first = situation.plan()
    kept = {key: flight for key, flight in situation.in_flight.items() if key not in first.withdrawn}
    in_flight = {**kept, **dict.fromkeys(_submitted(first), IN_FLIGHT)}
    second = situation.plan(in_flight=in_flight)
    assert set(_submitted(second)) <= set(first.deferred)
    if situation.limits.queue_room == 0:
        assert not second.batches


@quick
@given(situations())
def test_planning_is_a_function(situation: Situation) -> None:
    """The same situation gives the same plan."""
    assert situation.plan() == situation.plan()


@quick
@given(situations())
def test_without_failures_an_experiment_ends_complete(situation: Situation) -> None:
    """If every submitted stage succeeds, a bounded number of passes gives every run its result."""
    facts = {key: StageFacts(done=fact.done) for key, fact in situation.facts.items()}
    limits = Limits(situation.limits.array_size, max(0, situation.limits.queue_room))
    calm = Situation(situation.graph, facts, {}, limits, situation.packing)
    for _ in range(len(situation.graph.nodes) + 1):
        plan = calm.plan(facts=facts, in_flight={})
        if plan.complete:
            break
        facts.update({key: StageFacts(done=True) for key in _submitted(plan)})
    assert all(facts[run.key].done for run in situation.graph.runs)


@quick
@given(situations())
def test_blocked_means_something_upstream_is_given_up(situation: Situation) -> None:
    """A blocked stage has one upstream that is given up, held or cancelled; a submitted or deferred one has none."""
    plan = situation.plan()
    given_up = {*plan.given_up, *plan.held_or_cancelled}

    def above(key: str) -> set[str]:
        open_ = [key]
        found: set[str] = set()
        while open_:
            for parent in situation.graph.nodes[open_.pop()].upstream.values():
                fact = situation.facts.get(parent, StageFacts())
                if parent not in found and parent not in plan.waiting and (parent in given_up or not fact.done):
                    found.add(parent)
                    open_.append(parent)
        return found

    assert all(above(key) & given_up for key in plan.blocked)
    assert not any(above(key) & given_up for key in (*_submitted(plan), *plan.deferred))
