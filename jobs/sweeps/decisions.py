"""The state of every trial of a sweep, and what is to be computed next: replayed from the results of its stages, and stored nowhere.

Trials are evaluated in batches: all points of a grid or of a random search are one batch, Optuna proposes one after another. A batch goes
from rung to rung: every trial evaluates its folds up to the rung; when all have, or have failed, ASHA decides which of them continue. When
no trial of a batch has folds left, it has ended, and the next one is proposed. The same results give the same decisions, in whatever order
they arrived and however often the process that makes them was killed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from jobs.control.facts import StageFacts
from jobs.experiment.graph import Graph, Refill
from jobs.experiment.sweep_section import SweepSettings
from jobs.sweeps.records import Proposal, Sweep, read_proposals, write_proposals
from jobs.sweeps.search import Evaluated, propose, rungs, survivors
from jobs.sweeps.space import Point, listed_points
from jobs.sweeps.stages import SweepGraphs


class TrialState(Enum):
    """State of a trial."""

    running = "running"  # folds are missing
    complete = "complete"  # every fold is evaluated
    stopped = "stopped"  # by ASHA, before its last fold
    failed = "failed"
    interrupted = "interrupted"  # folds are missing, and no driver is running

    @property
    def text(self) -> str:
        """For messages and tables."""
        return {TrialState.running: "under way", TrialState.stopped: "stopped early"}.get(self, self.value)


@dataclass(frozen=True)
class Score:
    """Mean UA of the fine-tunings of a point on a fold, in percent, or why there will be none."""

    ua: float = 0.0
    error: str = ""


Scores = Mapping[tuple[str, str], Score]  # (name of a point, fold); without those that are not known yet
Batches = Callable[[Sequence[Sequence["Trial"]]], Sequence[Point]]  # trials of all earlier batches -> points of the next one; () for none


@dataclass(frozen=True)
class Trial:
    """One point, as far as it is evaluated."""

    point: Point
    state: TrialState
    wanted: int  # folds to evaluate, from the first
    scores: Mapping[str, float] = field(default_factory=dict)  # fold -> UA, in the order of the folds
    error: str = ""  # why it failed, one line

    @property
    def means(self) -> tuple[float, ...]:
        """The objective after each fold done."""
        return running_means(tuple(self.scores.values()))


def running_means(uas: Sequence[float]) -> tuple[float, ...]:
    """The mean of the first number, of the first two, and so on."""
    return tuple(sum(uas[:count]) / count for count in range(1, len(uas) + 1))


def decide(settings: SweepSettings, folds: Sequence[str], batches: Batches, scores: Scores) -> tuple[tuple[Trial, ...], ...]:
    """All trials so far, by batch. Only the last batch can have trials under way. Pure, if `batches` is."""
    found: list[tuple[Trial, ...]] = []
    while not (found and any(trial.state is TrialState.running for trial in found[-1])) and (points := batches(found)):
        found.append(_batch(points, settings, folds, scores, found))
    return tuple(found)


def _batch(
    points: Sequence[Point], settings: SweepSettings, folds: Sequence[str], scores: Scores, former: Sequence[Sequence[Trial]]
) -> tuple[Trial, ...]:
    wanted: dict[str, int] = {}
    stopped: set[str] = set()
    alive = [point.name for point in points]
    for rung in (*rungs(settings, len(folds)), len(folds)):
        wanted.update(dict.fromkeys(alive, rung))
        of_trial = {name: [scores.get((name, fold)) for fold in folds[:rung]] for name in alive}
        failed = {name for name, found in of_trial.items() if any(score is not None and score.error for score in found)}
        if any(None in found for name, found in of_trial.items() if name not in failed) or rung == len(folds):
            break
        means = {name: sum(s.ua for s in found if s) / rung for name, found in of_trial.items() if name not in failed}
        before = [trial.means[rung - 1] for batch in former for trial in batch if len(trial.means) >= rung]
        continued = survivors(means, before, rung, len(folds), settings)
        stopped.update(means.keys() - continued)
        alive = [name for name in alive if name in continued]
        if not alive:
            break
    return tuple(_trial(point, wanted[point.name], point.name in stopped, folds, scores) for point in points)


def _trial(point: Point, wanted: int, stopped: bool, folds: Sequence[str], scores: Scores) -> Trial:
    found = {fold: scores[point.name, fold] for fold in folds[:wanted] if (point.name, fold) in scores}
    error = next((score.error for score in found.values() if score.error), "")
    uas = {fold: score.ua for fold, score in found.items() if not score.error}
    state = TrialState.running
    if error:
        state = TrialState.failed
    elif stopped:
        state = TrialState.stopped
    elif len(uas) == len(folds):
        state = TrialState.complete
    return Trial(point, state, wanted, uas, error)


def scores_of(graph: Graph, facts: Mapping[str, StageFacts]) -> dict[tuple[str, str], Score]:
    """The scores that follow from the facts of the stages of all points. Pure."""
    keys: dict[tuple[str, str], list[str]] = {}
    for run in graph.runs:
        keys.setdefault((run.method, run.fold), []).append(run.key)
    errors: dict[str, str] = {}
    found: dict[tuple[str, str], Score] = {}
    for cell, of_cell in keys.items():
        error = next(filter(None, (_error(key, graph, facts, errors) for key in of_cell)), "")
        uas = [facts[key].ua for key in of_cell]
        if error:
            found[cell] = Score(error=error)
        elif all(facts[key].done for key in of_cell):
            found[cell] = Score(sum(ua for ua in uas if ua is not None) / len(uas))
    return found


def _error(key: str, graph: Graph, facts: Mapping[str, StageFacts], known: dict[str, str]) -> str:
    """Why a stage will have no result that counts; "" if it has one, or may get one."""
    if key not in known:
        fact, node = facts[key], graph.nodes[key]
        own = fact.stopped or fact.diverged  # a diverged run that still fills its slot has no reserve seed left
        if fact.done and not graph.children[key] and not own and fact.ua is None:
            own = "its result has no confusion matrix, so it cannot be scored"
        if own:
            known[key] = f"{node.name}: {own}"
        else:
            upstream = () if fact.done else node.upstream.values()
            known[key] = next(filter(None, (_error(parent, graph, facts, known) for parent in upstream)), "")
    return known[key]


class Decisions:
    """The decisions of one sweep. `read_only`: points that Optuna proposes are not recorded."""

    def __init__(self, sweep: Sweep, *, read_only: bool = False) -> None:
        self._sweep = sweep
        self._read_only = read_only
        self._graphs = SweepGraphs(sweep)
        self._listed = listed_points(sweep.experiment)
        self._proposed = list(read_proposals(sweep))
        self._decided: tuple[Scores, tuple[Trial, ...]] = ({}, self._replay({}))

    @property
    def trials(self) -> tuple[Trial, ...]:
        """As of the last results seen, in the order of evaluation."""
        return self._decided[1]

    @property
    def refill(self) -> Refill:
        """The graph of everything wanted so far, for slots of these generations."""
        return functools.partial(self._graphs.graph, [(trial.point, trial.wanted) for trial in self.trials])

    def extend(self, graph: Graph, facts: Mapping[str, StageFacts]) -> Refill | None:
        """Decide by the results of a graph; None if they call for no more folds than it has."""
        scores = scores_of(graph, facts)
        if scores != self._decided[0]:
            self._decided = (scores, self._replay(scores))
        present = {(run.method, run.fold) for run in graph.runs}
        more = any((trial.point.name, fold) not in present for trial in self.trials for fold in self._sweep.folds[: trial.wanted])
        return self.refill if more else None

    def _replay(self, scores: Scores) -> tuple[Trial, ...]:
        batches = decide(self._sweep.experiment.sweep, self._sweep.folds, self._points, scores)
        return tuple(trial for batch in batches for trial in batch)

    def _points(self, former: Sequence[Sequence[Trial]]) -> Sequence[Point]:
        number = len(former)
        if self._listed is not None:
            return () if number else self._listed
        if number == len(self._proposed):
            results = [[_evaluated(trial) for trial in batch] for batch in former]
            batch: tuple[Proposal, ...] = propose(self._sweep.space, self._sweep.experiment.sweep, self._proposed, results)
            if not batch:
                return ()
            self._proposed.append(batch)
            if not self._read_only:
                write_proposals(self._sweep, self._proposed)
        return [each.point for each in self._proposed[number]]


def _evaluated(trial: Trial) -> Evaluated:
    return Evaluated(() if trial.state is TrialState.failed else trial.means, trial.state is TrialState.complete)
