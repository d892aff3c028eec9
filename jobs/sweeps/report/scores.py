"""Trials with their runs, stages and proxies, read from results. Proxies that have to be computed are kept in the folder of the sweep."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Run
from jobs.store.records import Result, artifacts_present, read_json, write_json
from jobs.store.scores import confusion_of
from jobs.sweeps.decisions import Trial, TrialState, running_means
from jobs.sweeps.records import Sweep
from jobs.sweeps.space import Point

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """One fine-tuning and its scores on the validation speakers, in percent."""

    fold: str
    slot: int
    seed: int
    key: str
    ua: float
    wa: float | None = None  # None: no confusion matrix
    macro_f1: float | None = None


@dataclass(frozen=True)
class FoldRecord:
    """One evaluated fold of a trial."""

    fold: str
    runs: tuple[RunRecord, ...]
    stages: Mapping[str, str]  # key -> name, of all stages of the point on this fold
    proxies: Mapping[str, Any]  # known before fine-tuning; those per cluster count under "k": {"16": {...}}
    ua: float  # mean of the runs


@dataclass(frozen=True)
class TrialRecord:
    """One point and its evaluated folds. `trial` is the name of the point."""

    trial: str
    point: Point
    state: TrialState
    folds: tuple[FoldRecord, ...] = ()
    error: str = ""  # why it failed, one line

    @property
    def ua(self) -> float | None:
        """The objective: mean over the evaluated folds; None before the first."""
        return running_means([fold.ua for fold in self.folds])[-1] if self.folds else None


def trial_records(sweep: Sweep, graph: Graph, trials: Sequence[Trial], results: Mapping[str, Result]) -> tuple[TrialRecord, ...]:
    """The trials with what their results report. `results`: by key, of all finished stages of the graph."""
    filling, every = _by_fold(graph.runs), _by_fold((*graph.runs, *graph.superseded))
    found = []
    for trial in trials:
        cells = [(trial.point.name, fold) for fold in trial.scores]
        folds = [_fold(sweep, graph, filling[cell], every[cell], results) for cell in cells if cell in filling]
        found.append(TrialRecord(trial.point.name, trial.point, trial.state, tuple(filter(None, folds)), trial.error))
    return tuple(found)


def _by_fold(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """(name of a point, fold) -> its runs."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.method, run.fold), []).append(run)
    return found


def _fold(sweep: Sweep, graph: Graph, runs: Sequence[Run], every: Sequence[Run], results: Mapping[str, Result]) -> FoldRecord | None:
    """None if a result was removed since. `every`: also the runs that diverged, which are part of the cost."""
    scored = [_run_record(run, results[run.key]) for run in runs if run.key in results]
    if len(scored) < len(runs):
        return None
    fold, needed = runs[0].fold, _with_upstream(graph, runs)
    return FoldRecord(
        fold=fold,
        runs=tuple(scored),
        stages={key: graph.nodes[key].stage for key in _with_upstream(graph, every)},
        proxies=_proxies(sweep, fold, graph, [key for key in needed if key in results], results),
        ua=sum(run.ua for run in scored) / len(scored),
    )


def _with_upstream(graph: Graph, runs: Iterable[Run]) -> Sequence[str]:
    """Keys of the stages of runs; looks only at these, not at the whole graph."""
    found, stack = dict[str, None](), [run.key for run in runs]
    while stack:
        key = stack.pop()
        if key not in found:
            found[key] = None
            stack.extend(graph.nodes[key].upstream.values())
    return tuple(found)


def _run_record(run: Run, result: Result) -> RunRecord:
    confusion = confusion_of(result)
    if confusion is None:
        raise UsageError(f"{result.stage}/{result.key}: its result has no confusion matrix: delete its result.json and launch again")
    return RunRecord(run.fold, run.slot, run.seed, run.key, confusion.ua, confusion.wa, confusion.macro_f1)


def _proxies(sweep: Sweep, fold: str, graph: Graph, keys: Iterable[str], results: Mapping[str, Result]) -> dict[str, Any]:
    """Proxies from the results of the stages of a fold; those per cluster count are under `k`."""
    found: dict[str, Any] = {"k": {}}
    for key in keys:
        node, result = graph.nodes[key], results[key]
        proxies = dict(sweep.registry.stage_proxies(node.stage, node.settings, result.metrics))
        for k, values in proxies.pop("k", {}).items():
            found["k"][k] = {**values, **_label_agreement(sweep, fold, result, int(k))}
        found |= proxies
    return found


def _label_agreement(sweep: Sweep, fold: str, result: Result, k: int) -> dict[str, Any]:
    """How the clusters agree with the labels; all sets that contain `k` share it."""
    file, folder = sweep.proxies / f"{result.key}.json", sweep.layout.stage(result.stage, result.key)
    known = read_json(file)
    if known is not None:
        return known
    if not artifacts_present(folder, result):
        return {}
    try:
        artifacts = {k: folder.attempt(result.attempt).output}
        stated = sweep.registry.proxies(Path(sweep.corpus.folder), fold, sweep.validation[fold], artifacts)
        found = dict(stated.get("k", {}).get(str(k), {}))
        write_json(file, found)
    except Exception as error:  # a report does not fail because a proxy is missing
        _log.warning("cluster k %s, fold %s: its agreement with the labels is not known (%s: %s)", k, fold, type(error).__name__, error)
        return {}
    return found
