"""The entries of a table from the graph of an experiment, its results and judgements. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Run
from jobs.statistics import percent
from jobs.store.records import Result
from jobs.store.scores import Score, confusion_of
from jobs.tables.sizes import size_of
from jobs.tables.summary import Entry, Scores, Status

if TYPE_CHECKING:
    from jobs.control.rounds import Judgements


def entries_of(
    graph: Graph, results: Mapping[str, Result], states: Mapping[str, str], judgements: Judgements | None = None
) -> tuple[Entry, ...]:
    """One entry per run of a graph that has a score; the dropped runs of a slot come before its current one.

    `results` maps stage keys to results; `states` maps the keys of runs without a result to a value of `Status` (absent: pending).
    A dropped run is diverged if its result is marked so or missing, else an outlier. `judgements`: the verdicts on the runs.
    Raises UsageError for a result without usable scores.
    """
    dropped: dict[tuple[str, str, int], list[Run]] = {}
    for run in graph.superseded:
        dropped.setdefault((run.method, run.fold, run.slot), []).append(run)
    verdicts, unresolved = (judgements.verdicts, judgements.unresolved) if judgements is not None else ({}, {})
    found: list[Entry] = []
    for run in (run for run in graph.runs if run.method not in graph.measurements):
        before = sorted(dropped.get((run.method, run.fold, run.slot), ()), key=lambda each: each.generation)
        for each in (*before, run):
            finished = Status.accepted if each is run else Status.outlier
            missing = Status(states.get(run.key, Status.pending.value)) if each is run else Status.diverged
            entry = _entry(graph.corpus, each, results.get(each.key), finished, missing, graph.score)
            verdict = verdicts.get((each.method, each.fold, each.slot, each.generation))
            found.append(replace(entry, verdict=verdict, unreplaced=each is run and run.slot_id in unresolved))
    return tuple(found)


def _entry(corpus: str, run: Run, result: Result | None, finished: Status, missing: Status, score: Score) -> Entry:
    """A run whose status is `finished` with a result, `missing` without one, and diverged if its result is marked so."""
    scores: Scores | None = None
    try:
        scores = None if result is None else _scores(run, result, score)
    except UsageError:
        if result is None or not result.diverged:  # a diverged run may have no scores
            raise
    status = missing if result is None else Status.diverged if result.diverged else finished
    size = None if result is None else size_of(result.metrics)
    return Entry(corpus, run.method, run.fold, run.slot, run.seed, scores, status, size=size)


def _scores(run: Run, result: Result, score: Score) -> Scores:
    """From the confusion matrix, exactly, where there is one; else from `metrics`. Those beside the score are left out where missing."""
    confusion, value = confusion_of(result), score.of(result)
    if value is None:
        between = " between 0 and 1" if score.unit == "%" else ""
        raise UsageError(
            f"result of run {run.name} ({result.stage}/{result.key}) has no confusion matrix and no {score.name}{between} in its metrics: "
            f"its metrics are {', '.join(sorted(result.metrics)) or 'none'}; if the code of the stage has to return another one, "
            "increase the version of the stage, else delete its result.json, and launch again"
        )
    if confusion is not None:
        return Scores(value, confusion.wa, confusion.macro_f1)
    return Scores(value, *(_percentage(result.metrics.get(name)) for name in ("wa", "macro_f1")))


def _percentage(share: object) -> float | None:
    return percent(share) if isinstance(share, int | float) and 0 <= share <= 1 else None  # false for NaN
