"""A launcher in a process of its own, for tests that interrupt or kill it: FOLDER RECIPE-JSON GRACE."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jobs.commands.session import Session
from jobs.control.controller import Desired, Report, run_local
from jobs.experiment.config import Experiment, OutlierRule, Policy, Resources, StageResources
from jobs.experiment.graph import Graph, Slot
from jobs.experiment.launched import Corpus, launch
from jobs.local.executor import LocalExecutor
from jobs.store.layout import Layout
from jobs.worker.machine import Capacity
from jobs.worker.task import Workplace
from tests.jobs import fake_registry

RESOURCES = Resources(cpus=1, gpus=0, memory_gb=0.1, minutes=1)


def workplace(folder: Path) -> Workplace:
    """A corpus and a store below `folder`."""
    corpus = fake_registry.make_corpus(folder / "corpus")
    return Workplace(fake_registry.NAME, str(folder / "results"), "exp", "fake", str(corpus), "d1", fake_registry.DIGEST_OF)


def desired(folder: Path, recipe: dict[str, object], policy: Policy | None = None) -> Desired:
    """The 20 stages of three methods, two folds, two seeds, launched now."""
    refill = functools.partial(_refill, recipe)
    return Desired(refill({}), Layout(folder / "results", "exp"), policy or Policy(), since=time.time(), refill=refill)


def _refill(recipe: dict[str, object], generations: Mapping[Slot, int]) -> Graph:
    return fake_registry.make_graph(recipe, generations=generations)


def executor(folder: Path, cpus: int = 2) -> LocalExecutor:
    """Two cores, one per task."""
    capacity, preload = Capacity(cpus, (), 8.0), ["tests.jobs.fake_registry:preload"]
    return LocalExecutor(workplace(folder), Layout(folder / "results", "exp"), lambda stage: RESOURCES, capacity, preload)


def new_session(folder: Path, *, seeds: int = 1, recipe: dict[str, object] | None = None, methods: Sequence[str] = ("vft",)) -> Session:
    """A launch of an experiment on this machine, on one fold, as the commands open it."""
    place, layout = workplace(folder), Layout(folder / "results", "exp")
    resources = StageResources(cpus=1, gpus=0, memory_gb=0.1, minutes=1)
    experiment = Experiment(
        name="exp",
        corpus="fake",
        methods=list(methods),
        seeds=seeds,
        recipe=recipe or {},
        resources={"default": resources},
        policy=Policy(outliers=OutlierRule.none),
    )
    found = launch(experiment, Corpus("fake", "d1", ("1",), place.corpus_folder), fake_registry.REGISTRY, layout)
    root = Path(__file__).parents[2]
    return Session(found, replace(place, launched=found.since), root, root / "configs" / "published.yaml", new=True)


def main(folder: Path, recipe: dict[str, object], grace: float) -> Report:
    """Run to the end, telling every event."""
    with executor(folder) as local:
        return run_local(
            desired(folder, recipe),
            local,
            grace_seconds=grace,
            on_event=lambda event: print(event.line, flush=True),  # noqa: T201
            on_stop=lambda running: print(f"stopping {running}", flush=True),  # noqa: T201
        )


if __name__ == "__main__":
    report = main(Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3]))
    sys.exit(0 if report.complete else 130 if report.interrupted else 3)
