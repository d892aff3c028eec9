"""Rounds of judgement: the same results give the same decisions, in every process and for any order of the runs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.control import rounds as rounds_module
from jobs.control.facts import StageFacts
from jobs.control.outliers import judge
from jobs.control.rounds import Judgements, replay
from jobs.experiment.config import OutlierRule, Policy
from jobs.experiment.graph import MAX_SLOTS, Graph, Run, Slot, seeds_of, seeds_of_slots
from tests.jobs.fake_registry import make_graph

GOOD = (62.0, 62.5, 63.0, 63.5, 64.0)
LOW = 25.0
POLICY = Policy()
Trial = tuple[str, str, int, int]  # method, fold, slot, generation
Outcome = float | str | None  # UA in percent, why it diverged, or not in
quick = settings(max_examples=60, deadline=None)


class World:
    """What every run that could ever be made comes out as, and an experiment that makes those it is told to make."""

    def __init__(
        self, results: Mapping[Trial, Outcome], *, methods: Sequence[str] = ("vft",), folds: Sequence[str] = ("1", "2"), seeds: int = 5
    ) -> None:
        self.results, self.methods, self.folds, self.seeds = results, tuple(methods), tuple(folds), seeds

    def graph(self, generations: Mapping[Slot, int] | None = None) -> Graph:
        return make_graph(methods=self.methods, folds=self.folds, seeds=self.seeds, generations=generations)

    def outcome(self, run: Run) -> Outcome:
        return self.results.get((run.method, run.fold, run.slot, run.generation), GOOD[run.seed % 5])

    def facts(self, graph: Graph) -> dict[str, StageFacts]:
        return {run.key: fact(self.outcome(run)) for run in (*graph.superseded, *graph.runs)}

    def settle(self, policy: Policy = POLICY) -> tuple[Graph, Judgements]:
        """Make every run that is asked for, until no other is."""
        graph = self.graph()
        for _ in range(200):
            judgements = replay(graph, self.facts(graph), policy)
            present = {(run.method, run.fold, run.slot): run.generation for run in graph.runs if run.generation}
            if judgements.generations == present:
                return graph, judgements
            graph = self.graph(judgements.generations)
        raise AssertionError("new runs are asked for without end")


def fact(outcome: Outcome) -> StageFacts:
    if isinstance(outcome, str):
        return StageFacts(diverged=outcome, attempts=1)
    return StageFacts(done=outcome is not None, ua=outcome)


def slots_dropped(judgements: Judgements) -> list[tuple[str, int, int, int]]:
    return [(each.fold, each.slot, each.generation, each.round) for each in judgements.dropped]


def test_good_runs_stay() -> None:
    """One round, no outlier, a verdict for every slot."""
    graph, judgements = World({}).settle()
    assert not graph.superseded
    assert judgements.dropped == ()
    assert judgements.unresolved == {}
    assert [len(verdicts) for verdicts in judgements.rounds["vft"]] == [10]


def test_an_outlier_is_dropped_with_a_reason_and_replaced_by_the_reserve_seed() -> None:
    """The second round finds no outlier; the dropped run stays recorded, with its seed and distance."""
    graph, judgements = World({("vft", "2", 3, 0): LOW}).settle()
    (dropped,) = judgements.dropped
    assert (dropped.method, dropped.fold, dropped.slot, dropped.generation, dropped.seed, dropped.round) == ("vft", "2", 3, 0, 3, 1)
    assert dropped.reason.startswith("UA 25.0 lies ")
    assert judgements.generations == {("vft", "2", 3): 1}
    (old,) = graph.superseded
    assert judgements.dropping(old) == dropped
    assert next(run.seed for run in graph.runs if (run.fold, run.slot) == ("2", 3)) == 3 + MAX_SLOTS
    assert len(judgements.rounds["vft"]) == 2


def test_a_method_is_judged_when_all_its_slots_have_results() -> None:
    """Another method does not wait for it."""
    world = World({("vft", "1", 0, 0): None, ("vft", "2", 1, 0): LOW, ("tapt", "2", 1, 0): LOW}, methods=("vft", "tapt"))
    _, judgements = world.settle()
    assert judgements.rounds["vft"] == ()
    assert judgements.generations == {("tapt", "2", 1): 1}


def test_a_diverged_run_is_replaced_at_once() -> None:
    """Before any judgement, as often as there are seeds; then the runs that fill the slots are judged."""
    graph = World({}).graph()
    facts = {graph.runs[0].key: fact("NaN at step 7")}
    assert replay(graph, facts, POLICY).generations == {("vft", "1", 0): 1}
    results: dict[Trial, Outcome] = {("vft", "1", 0, generation): "NaN" for generation in range(2)}
    graph, judgements = World(results).settle()
    assert slots_dropped(judgements) == [("1", 0, 0, 0), ("1", 0, 1, 0)]
    assert judgements.generations == {("vft", "1", 0): 2}
    assert {run.generation for run in graph.superseded} == {0, 1}
    assert [len(verdicts) for verdicts in judgements.rounds["vft"]] == [10]


def test_a_slot_that_diverges_with_every_seed_stays_empty() -> None:
    """The last seed is not dropped, the slot stays empty, and the method is not judged."""
    results: dict[Trial, Outcome] = {("vft", "1", 0, generation): "NaN" for generation in range(POLICY.max_seeds)}
    _, judgements = World(results).settle()
    assert judgements.generations == {("vft", "1", 0): POLICY.max_seeds - 1}
    assert len(judgements.dropped) == POLICY.max_seeds - 1
    assert judgements.rounds["vft"] == ()


def test_a_round_is_judged_once_however_often_it_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays with the results of the next seeds, as a first pass makes them, judge the rounds before from memory."""
    judged: list[int] = []

    def counted(*arguments: object) -> object:
        judged.append(1)
        return judge(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rounds_module, "judge", counted)
    for cached in (rounds_module._replayed, rounds_module._judged):
        cached.cache_clear()
    _, judgements = World({("vft", "2", 3, 0): LOW, ("vft", "2", 3, 1): LOW - 1}).settle()
    assert len(judgements.rounds["vft"]) == len(judged) == 3


def test_an_outlier_after_the_last_round_is_unresolved() -> None:
    """Three rounds drop three runs of a slot that is always low; the fourth is kept and reported, and does not count as a round."""
    results: dict[Trial, Outcome] = {("vft", "1", 0, generation): LOW for generation in range(9)}
    _, judgements = World(results, seeds=9).settle()
    assert slots_dropped(judgements) == [("1", 0, 0, 1), ("1", 0, 1, 2), ("1", 0, 2, 3)]
    assert len(judgements.rounds["vft"]) == POLICY.rounds
    (slot,) = judgements.unresolved
    verdict = judgements.unresolved[slot]
    assert slot == ("vft", "1", 0)
    assert (verdict.generation, verdict.ua, verdict.out) == (3, LOW, True)


def test_an_outlier_without_a_seed_left_is_unresolved() -> None:
    """It fills its slot, is judged, and stays."""
    _, judgements = World({("vft", "1", 0, 0): LOW}).settle(Policy(max_seeds=1))
    assert judgements.dropped == ()
    assert set(judgements.unresolved) == {("vft", "1", 0)}


def test_the_rule_none_drops_only_diverged_runs() -> None:
    """Low runs stay, and are not reported as unresolved."""
    world = World({("vft", "1", 0, 0): LOW, ("vft", "1", 1, 0): "NaN"})
    _, judgements = world.settle(Policy(outliers=OutlierRule.none))
    assert slots_dropped(judgements) == [("1", 1, 0, 0)]
    assert judgements.unresolved == {}


def test_dropped_runs_still_count_for_centre_and_scale() -> None:
    """Centre and scale of the second round come from every run that filled a slot, not from one that never did."""
    world = World({("vft", "1", 0, 0): LOW})
    _, judgements = world.settle()
    second = judgements.rounds["vft"][1]
    assert {verdict.generation for verdict in second if (verdict.fold, verdict.slot) == ("1", 0)} == {1}
    further = world.graph({("vft", "1", 0): 2, ("vft", "1", 1): 1})
    assert replay(further, world.facts(further), POLICY).rounds == judgements.rounds


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Any results: good ones, low ones, high ones, diverged ones, some that are not in."""
    methods, folds, seeds = ("vft", "tapt"), ("1", "2"), draw(st.integers(1, 5))
    outcome = st.one_of(
        st.sampled_from([None, LOW, LOW, 95.0, "NaN", "stuck at the prior", 0.0, 100.0]),
        st.floats(40.0, 80.0).map(lambda value: round(value, 2)),
    )
    trials = [(method, fold, slot, generation) for method in methods for fold in folds for slot in range(seeds) for generation in range(7)]
    chosen = draw(st.lists(st.sampled_from(trials), max_size=25, unique=True))
    return World({trial: draw(outcome) for trial in chosen}, methods=methods, folds=folds, seeds=seeds)


policies = st.builds(
    Policy,
    outliers=st.sampled_from(list(OutlierRule)),
    sigmas=st.sampled_from([1.0, 2.0]),
    rounds=st.integers(1, 3),
    max_seeds=st.integers(1, 6),
)


@quick
@given(worlds(), policies, st.randoms(use_true_random=False))
def test_neither_the_order_of_runs_nor_unused_reserve_runs_matter(world: World, policy: Policy, shuffle: random.Random) -> None:
    """Replayed twice, with runs in another order, and from a graph that already has all reserve runs: the same decisions."""
    graph, judgements = world.settle(policy)
    facts = world.facts(graph)
    assert replay(graph, facts, policy) == judgements
    runs, superseded = list(graph.runs), list(graph.superseded)
    shuffle.shuffle(runs)
    shuffle.shuffle(superseded)
    shuffled = replay(replace(graph, runs=tuple(runs), superseded=tuple(superseded)), facts, policy)
    assert set(shuffled.dropped) == set(judgements.dropped)
    assert replace(shuffled, dropped=()) == replace(judgements, dropped=())
    full = world.graph({(method, fold, slot): 6 for method in world.methods for fold in world.folds for slot in range(world.seeds)})
    assert replay(full, world.facts(full), policy) == judgements


@quick
@given(worlds(), policies)
def test_decisions_stay_within_their_limits(world: World, policy: Policy) -> None:
    """No slot gets more seeds than allowed, no method more rounds; every dropped run filled its slot and has a reason."""
    graph, judgements = world.settle(policy)
    assert all(0 < generation < policy.max_seeds for generation in judgements.generations.values())
    assert all(len(rounds) <= policy.rounds for rounds in judgements.rounds.values())
    assert len(judgements.dropped) == sum(judgements.generations.values()) == len(graph.superseded)
    for run in graph.superseded:
        dropped = judgements.dropping(run)
        assert dropped is not None
        assert dropped.seed == run.seed
        assert dropped.reason
        assert (dropped.round == 0) == isinstance(world.outcome(run), str)
    assert not any(judgements.dropping(run) for run in graph.runs)
    last = {run.method: run for run in graph.runs}
    for method, fold, slot in judgements.unresolved:
        assert method in last
        run = next(run for run in graph.runs if (run.method, run.fold, run.slot) == (method, fold, slot))
        assert isinstance(world.outcome(run), float)


@quick
@given(worlds(), policies)
def test_more_results_never_undo_a_decision(world: World, policy: Policy) -> None:
    """An earlier pass, over a graph without the reserve runs, makes a part of the final decisions."""
    _, final = world.settle(policy)
    first = world.graph()
    early = replay(first, world.facts(first), policy)
    assert set(early.dropped) <= set(final.dropped)
    for method, rounds in early.rounds.items():
        assert final.rounds[method][: len(rounds)] == rounds


@quick
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, MAX_SLOTS - 1), st.integers(0, 20)), min_size=2, unique=True))
def test_no_two_slots_ever_share_a_seed(first_seed: int, trials: list[tuple[int, int]]) -> None:
    """Whatever their generations; and a slot's seeds are its own in every method and fold."""
    seeds = [seeds_of(slot, generation, first_seed=first_seed)[-1] for slot, generation in trials]
    assert len(set(seeds)) == len(seeds)


def test_seeds_of_slots_follow_the_generations() -> None:
    """All seeds that a slot has had, the last one filling it."""
    found = seeds_of_slots(("vft",), ("1",), seeds=2, first_seed=5, generations={("vft", "1", 1): 2})
    assert found == {("vft", "1", 0): (5,), ("vft", "1", 1): (6, 6 + MAX_SLOTS, 6 + 2 * MAX_SLOTS)}


@pytest.mark.parametrize("rule", list(OutlierRule))
def test_rounds_apply_the_outlier_rule(rule: OutlierRule) -> None:
    """A round gives the verdicts of jobs.control.outliers on the same runs."""
    from jobs.control.outliers import FinishedRun

    world = World({("vft", "1", 0, 0): 40.0}, seeds=8)
    graph = world.graph()
    judgements = replay(graph, world.facts(graph), Policy(outliers=rule))
    attempts = [FinishedRun(run.fold, run.slot, 0, run.seed, float(world.outcome(run) or 0.0)) for run in graph.runs]
    expected = judge(rule, attempts, frozenset((run.fold, run.slot, 0) for run in graph.runs), 2.0)
    assert judgements.rounds["vft"] == (expected.verdicts,)
