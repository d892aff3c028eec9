"""One trial, without Ray: the stages that a point needs on a held-out fold, computed by any executor, and what came of them.

A trial trains on neither the held-out fold nor the validation speakers, and is scored on these speakers; the held-out fold is not opened.
Everything it computes lies in the store under its content key, so what another trial, or a grid, has computed is not computed again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack, cast

from jobs.control.controller import Change, Desired, Event, Report, run_local
from jobs.control.executor_protocol import NearbyExecutor
from jobs.experiment.config import Experiment, OutlierRule
from jobs.experiment.graph import Graph, Run, Slot, build_graph, canonical_json, seeds_of_slots
from jobs.experiment.launched import Corpus
from jobs.experiment.registry import Registry, StageArguments, StageCall, SweepRegistry
from jobs.store.records import artifacts_present, read_json, read_result, write_json
from jobs.store.scores import confusion_of
from jobs.sweeps.records import DIGITS, FoldRecord, RunRecord, Sweep
from jobs.sweeps.space import METHOD, Point, Range, Space, apply, space_of
from jobs.worker.task import load_registry

CLUSTER = "k"  # the setting that tells a stage that clusters, and with how many clusters
COUNTS = "counts"  # the setting that tells the stage that predicts the clusters of several
LOSS = "training_loss"  # among its metrics: summed over the numbers of clusters
WORTH_A_LINE = (Change.failed, Change.dropped, Change.held)


class TrialFailedError(Exception):
    """A fold that cannot be evaluated: one line."""


class TrialStoppedError(Exception):
    """Asked to stop: what was under way has left checkpoints, and the next launch goes on."""


@dataclass(frozen=True)
class KeptOut:
    """A registry whose runs are scored on validation speakers."""

    registry: SweepRegistry
    validation: Mapping[str, Sequence[str]]  # by fold

    @property
    def methods(self) -> tuple[str, ...]:
        return self.registry.methods

    @property
    def teams(self) -> tuple[str, ...]:
        return self.registry.teams

    def calls(self, method: str, recipe: Any) -> Callable[[str, int], StageCall]:
        return self.registry.calls(method, recipe, validation=self.validation)

    def run(self, stage: str, **arguments: Unpack[StageArguments]) -> Mapping[str, Any]:
        return self.registry.run(stage, **arguments)


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
    """Every stage that a point needs on a fold. `generations` and `base`: as for a grid (jobs.experiment.launched)."""
    seeds = seeds_of_slots([METHOD], [fold], seeds=experiment.sweep.seeds, first_seed=experiment.first_seed, generations=generations)
    return build_graph(
        cast(Registry, KeptOut(registry, {fold: validation})),
        apply(experiment, point).recipe,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        methods=[METHOD],
        folds=[fold],
        seeds=seeds,
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
    """Compute what is missing of a fold, and what it says of the point.

    `tell` is given a line for every stage that fails, and every run that is dropped. `stopped` says how often the trial was asked to stop:
    once, and stages are given `grace_seconds` for a checkpoint; twice, and they are not. Raises TrialStoppedError then, and
    TrialFailedError where the policy has given up a stage.
    """
    registry = cast(SweepRegistry, load_registry(sweep.place))
    desired = _desired(sweep, point, fold, registry)

    def say(event: Event) -> None:
        if event.change in WORTH_A_LINE:
            tell(f"{event.node.name} {event.text}")

    report = run_local(desired, executor, grace_seconds=grace_seconds, on_event=say, stop_count=stopped)
    if not report.settled:
        raise TrialStoppedError(f"{point.label}: asked to stop in fold {fold}")
    if not report.complete:
        raise TrialFailedError(_why_given_up(report))
    return _record(sweep, fold, report.graph, registry, tell)


def _desired(sweep: Sweep, point: Point, fold: str, registry: SweepRegistry) -> Desired:
    graph_of = functools.partial(fold_graph, sweep.experiment, sweep.corpus, point, fold, sweep.validation[fold], registry)
    graph = graph_of()
    policy = replace(sweep.experiment.policy, outliers=OutlierRule.none)  # the worst runs of a bad point are no outliers
    return Desired(
        graph, sweep.own_layout, policy, since=sweep.launched, refill=lambda generations: graph_of(generations=generations, base=graph)
    )


def _why_given_up(report: Report) -> str:
    key, reason = next(iter(report.plan.reasons.items()), ("", "a stage it needs was given up"))
    return f"{report.graph.nodes[key].name}: {reason}" if key else reason


def _record(sweep: Sweep, fold: str, graph: Graph, registry: SweepRegistry, tell: Callable[[str], None]) -> FoldRecord:
    runs = tuple(_run_record(sweep, graph, run) for run in graph.runs)
    needed = _upstream_of(graph, [run.key for run in graph.runs])
    computed = _upstream_of(graph, [run.key for run in (*graph.runs, *graph.superseded)])  # runs that diverged cost something too
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


def _upstream_of(graph: Graph, keys: Sequence[str]) -> tuple[str, ...]:
    """Keys, and those of everything upstream of them, in the order of the graph."""
    found: set[str] = set()
    left = list(keys)
    while left:
        key = left.pop()
        if key not in found:
            found.add(key)
            left.extend(graph.nodes[key].upstream.values())
    return tuple(key for key in graph.nodes if key in found)


def _proxies(
    sweep: Sweep, fold: str, graph: Graph, keys: Sequence[str], registry: SweepRegistry, tell: Callable[[str], None]
) -> dict[str, Any]:
    """What can be seen of a point before its fine-tuning: of the clusters of every number, and of how well they were predicted."""
    found: dict[str, Any] = {"k": {}}
    for key in keys:
        node = graph.nodes[key]
        result = read_result(sweep.layout.stage(node.stage, key), key)
        if result is None:  # what lies upstream of a finished stage may have been removed
            continue
        if CLUSTER in node.settings:
            k = int(node.settings[CLUSTER])
            found["k"][str(k)] = {**_of_clusters(result.metrics, k), **_against_labels(sweep, fold, key, node.stage, k, registry, tell)}
        elif COUNTS in node.settings and LOSS in result.metrics:
            loss, guessed = float(result.metrics[LOSS]), sum(math.log(k) for k in node.settings[COUNTS])
            found |= {"ptapt_loss": loss, "ptapt_loss_share": loss / guessed if guessed else 0.0}  # 1: no better than a uniform guess
    return found


def _of_clusters(metrics: Mapping[str, Any], k: int) -> dict[str, float]:
    found: dict[str, float] = {}
    if metrics.get("frames") and "inertia" in metrics:
        found["inertia"] = float(metrics["inertia"]) / float(metrics["frames"])  # a frame
    if "entropy" in metrics:
        found |= {"entropy": float(metrics["entropy"]), "entropy_share": float(metrics["entropy"]) / math.log(k)}
    if "empty_clusters" in metrics:
        found["empty_clusters"] = int(metrics["empty_clusters"])
    return found


def _against_labels(
    sweep: Sweep, fold: str, key: str, stage: str, k: int, registry: SweepRegistry, tell: Callable[[str], None]
) -> dict[str, Any]:
    """What the clusters have to do with the emotions. The same for every set that holds this number: kept beside the sweep."""
    file = sweep.folder.proxies / f"{key}.json"
    known = read_json(file)
    if known is not None:
        return known
    folder = sweep.layout.stage(stage, key)
    result = read_result(folder, key)
    if result is None or not artifacts_present(folder, result):
        return {}
    output = folder.attempt(result.attempt).output
    try:
        stated = registry.proxies(Path(sweep.corpus.folder), fold, sweep.validation[fold], {k: output})
        found = dict(stated.get(CLUSTER, {}).get(str(k), {}))
        write_json(file, found)
    except Exception as error:  # nothing is decided by a proxy: a trial does not fail for want of one
        tell(f"cluster k {k}, fold {fold}: its purity and mutual information are not known ({type(error).__name__}: {error})")
        return {}
    return found


def sweep_digest(experiment: Experiment, corpus: Corpus, validation: Mapping[str, tuple[str, ...]], registry: Any) -> str:
    """Name of a sweep: of the points it may try, how they are found and judged, and every stage of a point.

    Not of where and on what it runs: the same sweep goes on with other resources.
    """
    space, sweep = space_of(experiment), experiment.sweep
    folds = tuple(sweep.folds or experiment.folds or corpus.folds)
    first = Point(tuple(sorted(space.sets[0] if space.sets else space.pool)))
    stages = {fold: list(fold_graph(experiment, corpus, first, fold, validation[fold], registry).nodes) for fold in folds}
    value = {
        "space": _plain(space),
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


def _plain(value: Any) -> Any:
    """JSON value of a space."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Range | Space):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return value
