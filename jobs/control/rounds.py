"""Rounds of judgement, replayed from results: which seed fills every slot, what was dropped and why. Pure.

A slot whose run diverged gets its next seed at once. When every slot of a method has a run that did not, the rule judges them (round 1);
slots of runs that are out get their next seeds, and when those are in, the rule judges again, at most `rounds` times. Nothing of this is
stored: the same results give the same decisions, whoever asks, so two controllers agree and no file can be lost that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from jobs.control.facts import NodeFacts
from jobs.control.outliers import Attempt, Verdict, judge, verdict_in_words
from jobs.experiment.config import OutlierRule, Policy
from jobs.experiment.graph import Graph, Run, Slot


@dataclass(frozen=True, slots=True)
class Tried:
    """What is known of one run that fills a slot, or did."""

    seed: int
    ua: float | None = None  # percent; None: not in
    diverged: str = ""


@dataclass(frozen=True)
class Dropped:
    """A run that counts no more."""

    method: str
    fold: str
    slot: int
    generation: int
    seed: int
    reason: str
    round: int  # 0: diverged, before any judgement


@dataclass(frozen=True)
class Judgements:
    """Everything that was decided on one experiment."""

    generations: Mapping[Slot, int] = field(default_factory=dict)  # of slots beyond their first seed
    dropped: tuple[Dropped, ...] = ()
    rounds: Mapping[str, tuple[tuple[Verdict, ...], ...]] = field(default_factory=dict)  # method -> round -> a verdict per slot
    unresolved: Mapping[Slot, Verdict] = field(default_factory=dict)  # what is out after the last round, or without a seed left

    def dropping(self, run: Run) -> Dropped | None:
        """Why a run was dropped; None if it was not."""
        name = (run.method, run.fold, run.slot, run.generation)
        return next((each for each in self.dropped if (each.method, each.fold, each.slot, each.generation) == name), None)


def replay(graph: Graph, facts: Mapping[str, NodeFacts], policy: Policy) -> Judgements:
    """The decisions that the results of a graph's runs, present and superseded, lead to, whatever the order of the runs.

    A slot may be given a seed whose run the graph does not hold yet: build it anew with `generations` and replay.
    """
    tried: dict[str, dict[tuple[str, int], dict[int, Tried]]] = {run.method: {} for run in graph.runs}
    for run in (*graph.superseded, *graph.runs):
        fact = facts.get(run.key) or NodeFacts()
        known = Tried(run.seed, fact.ua if fact.done and not fact.diverged else None, fact.diverged)
        tried[run.method].setdefault((run.fold, run.slot), {})[run.generation] = known
    generations: dict[Slot, int] = {}
    dropped: list[Dropped] = []
    rounds: dict[str, tuple[tuple[Verdict, ...], ...]] = {}
    unresolved: dict[Slot, Verdict] = {}
    for method, slots in tried.items():
        trials = tuple((slot, tuple(known.items())) for slot, known in sorted(slots.items()))
        replayed = _replayed(method, trials, policy.outliers, policy.sigmas, policy.rounds, policy.max_seeds)
        generations.update({(method, *slot): number for slot, number in replayed.now.items() if number})
        dropped.extend(replayed.dropped)
        rounds[method] = tuple(replayed.rounds)
        unresolved.update({(method, verdict.fold, verdict.slot): verdict for verdict in replayed.unresolved})
    return Judgements(generations, tuple(dropped), rounds, unresolved)


@lru_cache(maxsize=16)
def _replayed(
    method: str,
    trials: tuple[tuple[tuple[str, int], tuple[tuple[int, Tried], ...]], ...],
    outliers: OutlierRule,
    sigmas: float,
    rounds: int,
    max_seeds: int,
) -> MethodReplay:
    """The replay of one method; without a new result since the last look it is not judged again."""
    policy = Policy(outliers=outliers, sigmas=sigmas, rounds=rounds, max_seeds=max_seeds)
    replayed = MethodReplay(method, {slot: dict(known) for slot, known in trials}, policy)
    replayed.run()
    return replayed


class MethodReplay:
    """The replay of one method. `seeds`: how many each slot may try (None: `max_seeds` of the policy)."""

    def __init__(
        self,
        method: str,
        tried: Mapping[tuple[str, int], Mapping[int, Tried]],
        policy: Policy,
        seeds: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        self._method = method
        self._tried = tried
        self._policy = policy
        self._seeds = dict.fromkeys(tried, policy.max_seeds) if seeds is None else seeds
        self.now = dict.fromkeys(tried, 0)
        self.dropped: list[Dropped] = []
        self.rounds: list[tuple[Verdict, ...]] = []
        self.unresolved: tuple[Verdict, ...] = ()
        self._attempts = [
            Attempt(fold, slot, generation, known.seed, known.ua)
            for (fold, slot), generations in tried.items()
            for generation, known in sorted(generations.items())
            if known.ua is not None
        ]

    def run(self) -> None:
        for number in range(1, self._policy.rounds + 1):
            if not self._past_diverged():
                return
            verdicts = self._judge()
            self.rounds.append(verdicts)
            out, moved = [verdict for verdict in verdicts if verdict.out], False
            for verdict in out:
                reason = verdict_in_words(self._policy.outliers, verdict)
                moved = self._next((verdict.fold, verdict.slot), reason, number) or moved
            if not moved:
                self.unresolved = tuple(out)
                return
        if self._past_diverged():
            self.unresolved = tuple(verdict for verdict in self._judge() if verdict.out)

    def _past_diverged(self) -> bool:
        """Give slots whose run diverged their next seed; whether every slot has a run that is in."""
        complete = True
        for slot, generations in self._tried.items():
            while (known := generations.get(self.now[slot])) is not None and known.diverged:
                if not self._next(slot, known.diverged, 0):
                    break
            known = generations.get(self.now[slot])
            complete = complete and known is not None and known.ua is not None
        return complete

    def _judge(self) -> tuple[Verdict, ...]:
        """What the rule says of the runs that fill the slots, by all that have filled one so far."""
        attempts = [each for each in self._attempts if each.generation <= self.now[each.fold, each.slot]]
        current = frozenset((fold, slot, generation) for (fold, slot), generation in self.now.items())
        return judge(self._policy.outliers, attempts, current, self._policy.sigmas).verdicts

    def _next(self, slot: tuple[str, int], reason: str, number: int) -> bool:
        """Drop the run that fills a slot and turn to the next seed; False if there is none left."""
        generation = self.now[slot]
        if generation + 1 >= self._seeds[slot]:
            return False
        seed = self._tried[slot][generation].seed
        self.dropped.append(Dropped(self._method, slot[0], slot[1], generation, seed, reason, number))
        self.now[slot] = generation + 1
        return True
