"""Sweeps, records of trials and results that the tests of the report share. Nothing here is computed or stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.experiment.config import Cluster, Experiment
from jobs.experiment.launched import Corpus
from jobs.experiment.sweep_section import Search, SweepSettings
from jobs.store.layout import Layout
from jobs.store.records import Result
from jobs.sweeps.decisions import TrialState
from jobs.sweeps.records import Sweep
from jobs.sweeps.report.scores import FoldRecord, RunRecord, TrialRecord
from jobs.sweeps.space import Point
from tests.jobs.sweeps.fake_registry import REGISTRY, Recipe

FOLDS = ("1", "2", "3")
LAUNCHED = 1_700_000_000.0
NESTED = {"1": ("b",), "2": ("c",), "3": ("a",)}  # speaker a is tested in fold 1, and so on
FIXED = dict.fromkeys(FOLDS, ("v", "w"))
Uas = Mapping[str, Sequence[float]]  # fold -> UA by slot


def sweep(
    validation: Mapping[str, tuple[str, ...]] = NESTED, folds: Sequence[str] = FOLDS, root: Path = Path("/results"), **settings: Any
) -> Sweep:
    """At its end when the trials on record are: it asks for no more than one."""
    asked = SweepSettings(**{"search": Search.random, "trials": 1, "folds": list(folds), **settings})
    experiment = Experiment(name="exp", corpus="demo", recipe=Recipe(), sweep=asked)
    return Sweep(
        experiment=experiment,
        file="exp",
        corpus=Corpus("demo", "d1", tuple(folds), "/corpus"),
        layout=Layout(root, "exp"),
        validation=validation,
        launched=LAUNCHED,
        began=LAUNCHED,
        digest="0123456789ab",
        registry=REGISTRY,
        code=Path("/nowhere"),
    )


def on_slurm(found: Sweep) -> Sweep:
    return replace(found, experiment=replace(found.experiment, cluster=Cluster.slurm))


def trial(counts: Sequence[int], uas: Uas, state: TrialState = TrialState.complete, error: str = "", **settings: Any) -> TrialRecord:
    """A point whose fold F needs the stages `s-F`, `c-F-K` for each k, `p-F-SET`, and `f-F-SET-SLOT` for each run."""
    point = Point(tuple(counts), tuple((key.replace("__", "."), value) for key, value in settings.items()))
    folds = tuple(_fold(point, fold, values) for fold, values in uas.items())
    return TrialRecord(point.name, point, state, folds, error)


def _fold(point: Point, fold: str, values: Sequence[float]) -> FoldRecord:
    runs = tuple(RunRecord(fold, slot, 100 + slot, f"f-{fold}-{point.name}-{slot}", ua, ua + 1, ua - 1) for slot, ua in enumerate(values))
    stages = {f"s-{fold}": "states", **{f"c-{fold}-{k}": "cluster" for k in point.counts}, f"p-{fold}-{point.name}": "ptapt"}
    stages |= {run.key: "finetune" for run in runs}
    proxies = {
        "k": {str(k): {"purity": 1 - 1 / k, "nmi": 1 / k, "inertia": 1000 / k, "entropy_share": 0.5} for k in point.counts},
        "ptapt_loss": 2.0,
        "ptapt_loss_share": 0.5 + (FOLDS.index(fold) + 1) / 10 if fold in FOLDS else 0.5,
    }
    return FoldRecord(fold, runs, stages, proxies, sum(values) / len(values))


def results(trials: Sequence[TrialRecord], seconds: Mapping[str, float] | None = None, **provenance: Any) -> dict[str, Result]:
    """A result for every stage that the trials name: an hour each, or by stage; on one core, after the launch."""
    stages = {key: stage for record in trials for fold in record.folds for key, stage in fold.stages.items()}
    return {key: result(key, stage, (seconds or {}).get(stage, 3600.0), **provenance) for key, stage in stages.items()}


def result(key: str, stage: str, seconds: float, *, ended: float = LAUNCHED + 100, diverged: str = "", **provenance: Any) -> Result:
    told = {
        "seconds": seconds,
        "processes": 1,
        "threads": 1,
        "device": "cpu",
        "finished": datetime.fromtimestamp(ended, UTC).isoformat(timespec="seconds"),
        "commit": "0123456789abcdef",
        "packages": {"torch": "2.13.0"},
        **provenance,
    }
    return Result(key, stage, 1, key.split("-")[1], 0, "demo", "d1", {}, {}, 1, {}, told, diverged=diverged)


def some() -> tuple[TrialRecord, ...]:
    """Seven sets of three counts; the pair 16+64 is best, 64 alone hardly worse, the rest lower; two stopped early, one failed."""

    def uas(level: float, spread: float, folds: int = 3) -> dict[str, tuple[float, ...]]:
        return {fold: (level + 8 * place + spread, level + 8 * place - spread) for place, fold in enumerate(FOLDS[:folds])}

    return (
        trial([16], uas(50.0, 0.4)),
        trial([64], {"1": (57.1, 56.2), "2": (64.6, 65.9), "3": (73.9, 72.1)}),
        trial([256], uas(52.0, 1.1)),
        trial([16, 64], {"1": (57.6, 56.6), "2": (66.0, 64.8), "3": (73.1, 73.7)}),
        trial([16, 256], uas(49.0, 0.3, 1), TrialState.stopped),
        trial([64, 256], uas(51.0, 0.9, 2), TrialState.stopped),
        trial([16, 64, 256], {}, TrialState.failed, "ptapt fold 1: 100% of the loss is NaN_"),
    )
