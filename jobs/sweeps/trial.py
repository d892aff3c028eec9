"""One trial, without Ray: computes the stages of a point on one fold with any executor, and scores the point.

A trial trains on neither the held-out fold nor the validation speakers and is scored on the latter; no stage opens a recording of the
held-out fold. Its stages are in the store under their content keys and are shared with other trials and with grids.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from jobs.control.controller import Change, Desired, Event, Report, run_local
from jobs.control.executor_protocol import NearbyExecutor
from jobs.experiment.config import Experiment, OutlierRule
from jobs.experiment.graph import Graph, Run, Slot, build_graph, canonical_json, seeds_of_slots, with_upstream
from jobs.experiment.launched import Corpus
from jobs.experiment.registry import Registry, SweepRegistry
from jobs.store.records import artifacts_present, read_json, read_result, write_json
from jobs.store.scores import confusion_of
from jobs.sweeps.records import DIGITS, FoldRecord, RunRecord, Sweep, folds_of
from jobs.sweeps.space import Point, apply, space_of, swept_method
from jobs.worker.task import load_registry

LOGGED_CHANGES = (Change.failed, Change.dropped, Change.held)


class TrialFailedError(Exception):
    """A fold cannot be evaluated. The message is one line."""


class TrialStoppedError(Exception):
    """The trial was asked to stop. Its running stages have written checkpoints, and the next launch resumes them."""


def fold_graph(
    experiment: Experiment,
    corpus: Corpus,
    point: Point,
    fold: str,
    validation: Sequence[str],
    registry: SweepRegistry,
    generations: Mapping[Slot, int] | None = None,
    base: Graph | None = None,
) -> Graph:
    """Every stage of a point on one fold. `generations` and `base` are as in `jobs.experiment.launched`."""
    methods = [swept_method(experiment).name]
    scored = SimpleNamespace(calls=functools.partial(registry.calls, validation={fold: validation}))  # as much as `build_graph` uses
    return build_graph(
        cast(Registry, scored),
        apply(experiment, point).recipe,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        methods=methods,
        folds=[fold],
        seeds=seeds_of_slots(methods, [fold], seeds=experiment.sweep.seeds, first_seed=experiment.first_seed, generations=generations),
        base=base,
    )


def evaluate_fold(
    sweep: Sweep,
    point: Point,
    fold: str,
    executor: NearbyExecutor,
    *,
    tell: Callable[[str], None] = lambda line: None,
    stopped: Callable[[], int] = lambda: 0,
    grace_seconds: float = 60.0,
) -> FoldRecord:
    """Compute the missing stages of a fold, and return the scores of the point on it.

    `tell` gets a line for every failed stage and every dropped run. `stopped` returns how often the trial was asked to stop: after the
    first request stages have `grace_seconds` for a checkpoint, after the second none. Raises TrialStoppedError in both cases, and
    TrialFailedError if the failure policy gave up a stage.
    """
    registry = cast(SweepRegistry, load_registry(sweep.place))
    desired = _desired(sweep, point, fold, registry)

    def log(event: Event) -> None:
        if event.change in LOGGED_CHANGES:
            tell(f"{event.node.name} {event.text}")

    report = run_local(desired, executor, grace_seconds=grace_seconds, on_event=log, stop_count=stopped)
    if not report.settled:
        raise TrialStoppedError(f"{point.label}: asked to stop in fold {fold}")
    if not report.complete:
        raise TrialFailedError(_failure(report))
    return _record(sweep, fold, report.graph, registry, tell)


def _desired(sweep: Sweep, point: Point, fold: str, registry: SweepRegistry) -> Desired:
    graph_of = functools.partial(fold_graph, sweep.experiment, sweep.corpus, point, fold, sweep.validation[fold], registry)
    graph = graph_of()
    policy = replace(sweep.experiment.policy, outliers=OutlierRule.none)  # low runs of a bad point are not outliers
    return Desired(
        graph, sweep.own_layout, policy, since=sweep.launched, refill=lambda generations: graph_of(generations=generations, base=graph)
    )


def _failure(report: Report) -> str:
    key, reason = next(iter(report.plan.reasons.items()), ("", "an upstream stage was given up"))
    return f"{report.graph.nodes[key].name}: {reason}" if key else reason


def _record(sweep: Sweep, fold: str, graph: Graph, registry: SweepRegistry, tell: Callable[[str], None]) -> FoldRecord:
    runs = tuple(_run_record(sweep, graph, run) for run in graph.runs)
    needed = with_upstream(graph, [run.key for run in graph.runs])
    computed = with_upstream(graph, [run.key for run in (*graph.runs, *graph.superseded)])  # diverged runs are part of the cost
    return FoldRecord(
        fold=fold,
        runs=runs,
        stages={key: graph.nodes[key].stage for key in computed},
        proxies=_proxies(sweep, fold, graph, needed, registry, tell),
        ua=sum(run.ua for run in runs) / len(runs),
    )


def _run_record(sweep: Sweep, graph: Graph, run: Run) -> RunRecord:
    node = graph.nodes[run.key]
    result = read_result(sweep.layout.stage(node.stage, run.key), run.key)
    if result is None:
        raise TrialFailedError(f"{node.name}: its result is gone; launch the sweep again")
    confusion = confusion_of(result)
    if confusion is None:
        raise TrialFailedError(f"{node.name}: its result has no confusion matrix, so it cannot be scored")
    return RunRecord(run.fold, run.slot, run.seed, run.key, confusion.ua, confusion.wa, confusion.macro_f1, result.diverged)


def _proxies(
    sweep: Sweep, fold: str, graph: Graph, keys: Sequence[str], registry: SweepRegistry, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Proxies from the results of the stages of a fold; those per cluster count are under `k`."""
    found: dict[str, Any] = {"k": {}}
    for key in keys:
        node = graph.nodes[key]
        result = read_result(sweep.layout.stage(node.stage, key), key)
        if result is None:  # results upstream of a finished stage may have been removed
            continue
        proxies = dict(registry.stage_proxies(node.stage, node.settings, result.metrics))
        for k, values in proxies.pop("k", {}).items():
            found["k"][k] = {**values, **_label_agreement(sweep, fold, key, node.stage, int(k), registry, tell)}
        found |= proxies
    return found


def _label_agreement(
    sweep: Sweep, fold: str, key: str, stage: str, k: int, registry: SweepRegistry, tell: Callable[[str], None]
) -> dict[str, Any]:
    """How the clusters agree with the labels. Cached in the folder of the sweep, as all sets that contain `k` share it."""
    file = sweep.folder.proxies / f"{key}.json"
    known = read_json(file)
    if known is not None:
        return known
    folder = sweep.layout.stage(stage, key)
    result = read_result(folder, key)
    if result is None or not artifacts_present(folder, result):
        return {}
    try:
        stated = registry.proxies(Path(sweep.corpus.folder), fold, sweep.validation[fold], {k: folder.attempt(result.attempt).output})
        found = dict(stated.get("k", {}).get(str(k), {}))
        write_json(file, found)
    except Exception as error:  # a trial does not fail because a proxy is missing
        tell(f"cluster k {k}, fold {fold}: its agreement with the labels is not known ({type(error).__name__}: {error})")
        return {}
    return found


def sweep_digest(experiment: Experiment, corpus: Corpus, validation: Mapping[str, tuple[str, ...]], registry: SweepRegistry) -> str:
    """Identity of a sweep: hash of its points, its search, its folds and the stages of a point.

    Resources are not included, so that a sweep can be resumed with other resources.
    """
    space, sweep = space_of(experiment), experiment.sweep
    folds = folds_of(experiment, corpus)
    first = Point(tuple(sorted(space.sets[0] if space.sets else space.pool)))
    stages = {fold: list(fold_graph(experiment, corpus, first, fold, validation[fold], registry).nodes) for fold in folds}
    value = {
        "space": asdict(space),
        "search": {
            "kind": sweep.search.name,
            "trials": sweep.trials,
            "seed": sweep.seed,
            "stopping": sweep.stopping.name,
            "grace_folds": sweep.grace_folds,
            "reduction": sweep.reduction,
        },
        "folds": list(folds),
        "stages": stages,
    }
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:DIGITS]
