"""Rounds of judgement, replayed from results: which seed fills every slot, which runs were dropped and why. Pure.

A slot whose run diverged gets its next seed at once. When every slot of a method has a run that did not diverge, the outlier rule judges
them (round 1); slots of outliers get their next seeds, and when those have results, the rule judges again, at most `rounds` times.
Decisions are not stored: the same results give the same decisions, so two controllers agree and no record of them can be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from jobs.control.facts import StageFacts
from jobs.control.outliers import FinishedRun, RunId, Verdict, judge, verdict_in_words
from jobs.experiment.config import OutlierRule, Policy
from jobs.experiment.graph import Graph, Run, Slot
from jobs.store.scores import UNWEIGHTED


@dataclass(frozen=True, slots=True)
class SeedResult:
    """The result of one seed of a slot, so far."""

    seed: int
    ua: float | None = None  # percent; None: no result yet
    diverged: str = ""


@dataclass(frozen=True)
class DroppedRun:
    """A run that no longer counts."""

    method: str
    fold: str
    slot: int
    generation: int
    seed: int
    reason: str
    round: int  # 0: diverged, before any judgement


@dataclass(frozen=True)
class Judgements:
    """All decisions on the runs of one experiment."""

    generations: Mapping[Slot, int] = field(default_factory=dict)  # of slots past their first seed
    dropped: tuple[DroppedRun, ...] = ()
    rounds: Mapping[str, tuple[tuple[Verdict, ...], ...]] = field(default_factory=dict)  # method -> round -> a verdict per slot
    unresolved: Mapping[Slot, Verdict] = field(default_factory=dict)  # outliers after the last round, or without a seed left
    verdicts: Mapping[tuple[str, str, int, int], Verdict] = field(default_factory=dict)  # the last one on each run, by method and RunId

    def dropping(self, run: Run) -> DroppedRun | None:
        """Why a run was dropped; None if it was not."""
        name = (run.method, run.fold, run.slot, run.generation)
        return next((each for each in self.dropped if (each.method, each.fold, each.slot, each.generation) == name), None)


def replay(graph: Graph, facts: Mapping[str, StageFacts], policy: Policy) -> Judgements:
    """The decisions that follow from the results of a graph's runs, present and superseded, in any order.

    A slot may get a seed whose run is not in the graph yet: rebuild the graph with `generations` and replay.
    """
    results: dict[str, dict[tuple[str, int], dict[int, SeedResult]]] = {run.method: {} for run in graph.runs}
    for run in (*graph.superseded, *graph.runs):
        fact = facts.get(run.key) or StageFacts()
        known = SeedResult(run.seed, fact.ua if fact.done and not fact.diverged else None, fact.diverged)
        results[run.method].setdefault((run.fold, run.slot), {})[run.generation] = known
    generations: dict[Slot, int] = {}
    dropped: list[DroppedRun] = []
    rounds: dict[str, tuple[tuple[Verdict, ...], ...]] = {}
    unresolved: dict[Slot, Verdict] = {}
    verdicts: dict[tuple[str, str, int, int], Verdict] = {}
    for method, of_slots in results.items():
        frozen = tuple((slot, tuple(known.items())) for slot, known in sorted(of_slots.items()))
        replayed = _replayed(method, frozen, policy.outliers, policy.sigmas, policy.rounds, policy.max_seeds, graph.score.label)
        generations.update({(method, *slot): number for slot, number in replayed.generations.items() if number})
        dropped.extend(replayed.dropped)
        rounds[method] = tuple(replayed.rounds)
        unresolved.update({(method, verdict.fold, verdict.slot): verdict for verdict in replayed.unresolved})
        verdicts.update({(method, *run_id): verdict for run_id, verdict in replayed.verdicts.items()})
    return Judgements(generations, tuple(dropped), rounds, unresolved, verdicts)


@lru_cache(maxsize=16)
def _replayed(
    method: str,
    results: tuple[tuple[tuple[str, int], tuple[tuple[int, SeedResult], ...]], ...],
    outliers: OutlierRule,
    sigmas: float,
    rounds: int,
    max_seeds: int,
    label: str,
) -> MethodReplay:
    """The replay of one method; cached, so that it is not judged again without a new result."""
    policy = Policy(outliers=outliers, sigmas=sigmas, rounds=rounds, max_seeds=max_seeds)
    replayed = MethodReplay(method, {slot: dict(known) for slot, known in results}, policy, label=label)
    replayed.run()
    return replayed


@lru_cache(maxsize=64)
def _judged(rule: OutlierRule, runs: tuple[FinishedRun, ...], current: frozenset[RunId], sigmas: float) -> tuple[Verdict, ...]:
    """The verdicts of one round; cached, as a replay with the next seeds repeats the rounds before."""
    return judge(rule, runs, current, sigmas).verdicts


class MethodReplay:
    """The replay of one method. `seeds`: how many each slot may try (None: `max_seeds` of the policy). `label`: of the score."""

    def __init__(
        self,
        method: str,
        results: Mapping[tuple[str, int], Mapping[int, SeedResult]],
        policy: Policy,
        seeds: Mapping[tuple[str, int], int] | None = None,
        label: str = UNWEIGHTED.label,
    ) -> None:
        self._label = label
        self._method = method
        self._results = results
        self._policy = policy
        self._seeds = dict.fromkeys(results, policy.max_seeds) if seeds is None else seeds
        self.generations = dict.fromkeys(results, 0)  # that fill the slots now
        self.dropped: list[DroppedRun] = []
        self.rounds: list[tuple[Verdict, ...]] = []
        self.unresolved: tuple[Verdict, ...] = ()
        self.verdicts: dict[RunId, Verdict] = {}  # the last one on each run
        self._unchecked = list(results)  # slots whose run may have diverged or have no result yet
        self._finished = [
            FinishedRun(fold, slot, generation, known.seed, known.ua)
            for (fold, slot), generations in results.items()
            for generation, known in (sorted(generations.items()) if len(generations) > 1 else generations.items())
            if known.ua is not None
        ]

    def run(self) -> None:
        for number in range(1, self._policy.rounds + 1):
            if not self._skip_diverged():
                return
            verdicts = self._judge()
            self.rounds.append(verdicts)
            out, replaced = [verdict for verdict in verdicts if verdict.out], False
            for verdict in out:
                slot = (verdict.fold, verdict.slot)
                if self._drop(slot, verdict_in_words(self._policy.outliers, verdict, self._label), number):
                    self._unchecked.append(slot)
                    replaced = True
            if not replaced:
                self.unresolved = tuple(out)
                return
        if self._skip_diverged():
            self.unresolved = tuple(verdict for verdict in self._judge() if verdict.out)

    def _skip_diverged(self) -> bool:
        """Give slots whose run diverged their next seed; returns whether every slot has a result that counts."""
        incomplete = []
        for slot in self._unchecked:
            generations = self._results[slot]
            while (known := generations.get(self.generations[slot])) is not None and known.diverged:
                if not self._drop(slot, known.diverged, 0):
                    break
            known = generations.get(self.generations[slot])
            if known is None or known.ua is None:
                incomplete.append(slot)
        self._unchecked = incomplete
        return not incomplete

    def _judge(self) -> tuple[Verdict, ...]:
        """Verdicts on the runs that fill the slots, with centre and scale from all runs that have filled one so far."""
        runs = tuple(each for each in self._finished if each.generation <= self.generations[each.fold, each.slot])
        current = frozenset((fold, slot, generation) for (fold, slot), generation in self.generations.items())
        verdicts = _judged(self._policy.outliers, runs, current, self._policy.sigmas)
        self.verdicts.update({(verdict.fold, verdict.slot, verdict.generation): verdict for verdict in verdicts})
        return verdicts

    def _drop(self, slot: tuple[str, int], reason: str, number: int) -> bool:
        """Drop the run that fills a slot and select the next seed; False if there is none left."""
        generation = self.generations[slot]
        if generation + 1 >= self._seeds[slot]:
            return False
        seed = self._results[slot][generation].seed
        self.dropped.append(DroppedRun(self._method, slot[0], slot[1], generation, seed, reason, number))
        self.generations[slot] = generation + 1
        return True
