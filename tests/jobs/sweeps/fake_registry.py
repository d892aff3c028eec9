"""A registry for tests of sweeps: P-TAPT's stages with numbers in place of speech, and an accuracy that is a known function of the point.

`Recipe` has the keys that a sweep asks for. Every start of a stage leaves a line in the corpus folder's `starts/STAGE-KEY`, every end in
`ends/`, every step in `steps/`; proxies in `proxies/K-FOLD`. A behaviour is asked for by `failing`, under `STAGE SET FOLD` (of `states`
the set is `-`, of `cluster` the one count), with `*` for any set or fold: those of tests.jobs.fake_registry, and

    steps:N:SECONDS     N steps with a checkpoint after each; goes on after the last one
    diverge-once        the run with the first seed of the slot has not learnt
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Unpack

from jobs.commands.sweep import SweepSession, launch, session_of
from jobs.control.controller import Report, desired_of, run_local
from jobs.experiment.config import Experiment, Policy, StageResources, resources_of
from jobs.experiment.graph import MAX_SLOTS
from jobs.experiment.launched import Corpus
from jobs.experiment.registry import StageArguments
from jobs.experiment.sweep_section import SweepSettings
from jobs.local.executor import LocalExecutor
from jobs.store.layout import Layout
from jobs.sweeps.decisions import Trial
from jobs.sweeps.records import Sweep, load_sweep, store_sweep
from jobs.sweeps.report.scores import TrialRecord
from jobs.sweeps.report.write import records_of
from jobs.sweeps.stages import sweep_digest
from jobs.worker.machine import Capacity
from jobs.worker.task import Workplace
from ser_core.sweep import P_TAPT, SweptMethod, stage_proxies
from tests.jobs.fake_registry import FakeCall, FakeStopError, _behave, _note, make_corpus, read_digest

NAME = "tests.jobs.sweeps.fake_registry:REGISTRY"
DIGEST_OF = "tests.jobs.sweeps.fake_registry:read_digest"
REPOSITORY = Path(__file__).resolve().parents[3]
FOLDS = ("1", "2", "3")
PEAK = 64  # the number of clusters that is best


@dataclass
class Cluster:
    counts: list[int] = field(default_factory=lambda: [16, 64, 256])
    iterations: int = 20


@dataclass
class Ptapt:
    steps: int = 10
    learning_rate: float = 1e-3


@dataclass
class Recipe:
    cluster: Cluster = field(default_factory=Cluster)
    ptapt: Ptapt = field(default_factory=Ptapt)
    failing: dict[str, str] = field(default_factory=dict)  # no part of the identity
    seconds: float = 0.0  # likewise: that every stage takes
    swept: ClassVar[SweptMethod] = P_TAPT


@dataclass(frozen=True)
class SweepRun:
    """What `compute` has done."""

    session: SweepSession
    report: Report

    @property
    def trials(self) -> dict[str, Trial]:
        return {trial.point.name: trial for trial in self.session.decisions.trials}

    @property
    def records(self) -> dict[str, TrialRecord]:
        found = records_of(self.session.sweep, self.report.graph, self.session.decisions.trials)[0]
        return {record.trial: record for record in found}


class FakeSweepRegistry:
    """States without a set, k-means by count, P-TAPT by set, fine-tuning by set and seed."""

    methods = ("vft", "tapt", "ptapt")
    measurements = ()
    teams = ("states", "tapt", "ptapt", "finetune")

    def check(self, recipe: Recipe) -> None:
        """Everything is within its range."""

    def calls(self, method: str, recipe: Recipe, validation: Mapping[str, Sequence[str]] | None = None) -> Callable[[str, int], FakeCall]:
        return lambda fold, seed: self.call(recipe, fold=fold, seed=seed, validation=validation[fold] if validation else ())

    def call(self, recipe: Recipe, *, fold: str, seed: int, validation: Sequence[str] = ()) -> FakeCall:
        counts = sorted(recipe.cluster.counts)
        tested: dict[str, Any] = {"validation": sorted(validation)} if validation else {}

        def stage(name: str, label: str, seed: int, settings: dict[str, Any], **upstream: FakeCall) -> FakeCall:
            asked = (f"{name} {found} {at}" for found in (label, "*") for at in (fold, "*"))
            behaviour = next((recipe.failing[key] for key in asked if key in recipe.failing), "")
            runtime = {"behaviour": behaviour, "seconds": recipe.seconds}
            return FakeCall(name, {**settings, **tested}, fold, seed, runtime, upstream)

        states = stage("states", "-", 0, {})
        clusters = {
            f"clusters.{k}": stage("cluster", str(k), 0, {"k": k, "iterations": recipe.cluster.iterations}, states=states) for k in counts
        }
        label = "+".join(map(str, counts))
        own = {"counts": counts, "steps": recipe.ptapt.steps, "learning_rate": recipe.ptapt.learning_rate}
        return stage("finetune", label, seed, {}, backbone=stage("ptapt", label, 0, own, **clusters))

    def validation_speakers(self, corpus: Path, fold: str) -> tuple[str, ...]:
        folds = read_folds(corpus)
        return (f"speaker of {folds[(folds.index(fold) + 1) % len(folds)]}",)

    def check_corpus(self, corpus: Path, methods: Sequence[tuple[str, Recipe]], folds: Mapping[str, Sequence[str]]) -> None:
        return None

    def training_frames(self, corpus: Path, recipe: Recipe, fold: str, validation: Sequence[str] = ()) -> int:
        return 1000

    def proxies(self, corpus: Path, fold: str, validation: Sequence[str], clusters: Mapping[int, Path]) -> Mapping[str, Any]:
        for k, folder in clusters.items():
            if json.loads((folder / "artifact.json").read_text())["k"] != k:
                raise ValueError(f"{folder} is not of {k} clusters")
            _note(corpus / "proxies" / f"{k}-{fold}")
        return {"k": {str(k): {"purity": 1 - 1 / k, "nmi": 1 / k} for k in clusters}}

    def stage_proxies(self, stage: str, settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        return stage_proxies(stage, settings, metrics)

    def run(self, stage: str, **arguments: Unpack[StageArguments]) -> Mapping[str, Any]:
        """Hand on what is known of the point, or behave as the recipe says."""
        settings, runtime, corpus, fold, seed = (
            arguments["settings"],
            arguments["runtime"],
            arguments["corpus"],
            arguments["fold"],
            arguments["seed"],
        )
        output, checkpoint, should_stop = arguments["output"], arguments["checkpoint"], arguments["should_stop"]
        name = f"{stage}-{output.parents[2].name}"
        begun = _note(corpus / "starts" / name)
        behaviour = str(runtime["behaviour"])
        _behave(behaviour, begun, arguments["relief"], checkpoint, should_stop)
        if behaviour.startswith("steps:"):
            _steps(behaviour, corpus / "steps" / name, checkpoint, should_stop)
        time.sleep(runtime["seconds"])
        known: dict[str, Any] = {"counts": [], "learning_rate": 1e-3}
        for folder in arguments["upstream"].values():
            known |= json.loads((folder / "artifact.json").read_text())
        known |= settings
        (output / "artifact.json").write_text(json.dumps(known))
        _note(corpus / "ends" / name)
        if stage == "cluster":
            k = int(settings["k"])
            metrics = {"k": k, "frames": 1000, "inertia": 1000.0 / k, "entropy": math.log(k) / 2, "empty_clusters": 1}
            return {"metrics": metrics}
        if stage == "ptapt":
            return {"metrics": {"training_loss": 0.5 * sum(map(math.log, settings["counts"])), "steps": settings["steps"]}}
        if stage != "finetune":
            return {"metrics": {}}
        right = round(10 * ua_of(known["counts"], fold, seed, known["learning_rate"]))
        lost = behaviour == "diverge-once" and seed < MAX_SLOTS
        return {
            "metrics": {},
            "confusion": [[right, 1000 - right], [1000 - right, right]],
            "classes": ["angry", "sad"],
            "diverged": "training loss 0.693 is still at the class prior, 0.693" if lost else "",
        }


REGISTRY = FakeSweepRegistry()


def ua_of(counts: Sequence[int], fold: str, seed: int, learning_rate: float = 1e-3) -> float:
    """What the fine-tuning of a point reaches, in percent: best near `PEAK` clusters, better with more of them, alike in every fold."""
    away = sum(abs(math.log2(k / PEAK)) for k in counts) / len(counts)
    return round(60 - 5 * away + 2 * len(counts) - 3 * abs(math.log10(learning_rate / 1e-3)) + int(fold) + (seed % 2) / 2, 1)


def read_folds(corpus: Path) -> tuple[str, ...]:
    """The folds of a fake corpus."""
    return tuple(json.loads((corpus / "folds.json").read_text()))


def counted(corpus: Path, what: str = "starts") -> dict[str, int]:
    """`STAGE-KEY` -> how often a stage has started (`starts`), ended well (`ends`), or made a step (`steps`)."""
    folder = corpus / what
    return {path.name: len(path.read_text().splitlines()) for path in folder.iterdir()} if folder.is_dir() else {}


def make_sweep(
    folder: Path,
    sweep: SweepSettings | None = None,
    recipe: Recipe | None = None,
    *,
    folds: Sequence[str] = FOLDS,
    first_seed: int = 0,
    policy: Policy | None = None,
) -> Sweep:
    """A sweep below `folder`, stored, of stages that take one core each."""
    corpus_folder = make_corpus(folder / "corpus")
    (corpus_folder / "folds.json").write_text(json.dumps(list(folds)))
    corpus = Corpus("fake", "d1", tuple(folds), str(corpus_folder))
    experiment = Experiment(
        name="exp",
        corpus="fake",
        methods=["ptapt"],
        first_seed=first_seed,
        policy=policy or Policy(),
        resources={"default": StageResources(cpus=1, gpus=0, memory_gb=0.1, minutes=1)},
        sweep=sweep or SweepSettings(),
        recipe=recipe or Recipe(),
    )
    launched = time.time()
    validation = {fold: REGISTRY.validation_speakers(corpus_folder, fold) for fold in folds}
    made = Sweep(
        experiment=experiment,
        file="exp",
        corpus=corpus,
        layout=Layout(folder / "results", "exp"),
        validation=validation,
        launched=launched,
        began=launched,
        digest=sweep_digest(experiment, corpus, validation, REGISTRY),
        registry=REGISTRY,
        code=REPOSITORY,
    )
    store_sweep(made)
    return made


def place_of(sweep: Sweep) -> Workplace:
    """Where its stages are computed."""
    root, corpus = str(sweep.layout.root), sweep.corpus
    return Workplace(NAME, root, sweep.own_layout.experiment, corpus.name, corpus.folder, corpus.digest, DIGEST_OF, launched=sweep.launched)


def load(sweep: Sweep) -> Sweep:
    """The sweep as it is on record."""
    return load_sweep(sweep.layout, sweep.digest, REGISTRY, Recipe, REPOSITORY)


def launched_now(sweep: Sweep) -> Sweep:
    """The same sweep as another launch has it."""
    return replace(sweep, launched=time.time())


def launch_here(sweep: Sweep) -> tuple[bool, SweepSession]:
    """Launch a sweep as the command does, on this machine."""
    session = session_of(launched_now(sweep), place_of(sweep), REPOSITORY, preload=["tests.jobs.fake_registry:preload"], new=True)
    return launch(session, wait=False), session


def compute(sweep: Sweep, *, stop_count: Callable[[], int] | None = None, tell: Callable[[str], None] = lambda line: None) -> SweepRun:
    """Compute what is wanted of a sweep here, on two cores."""
    session = session_of(sweep, place_of(sweep), REPOSITORY)
    resources = partial(resources_of, sweep.experiment)
    with LocalExecutor(session.place, sweep.own_layout, resources, Capacity(2, (), 8.0), ["tests.jobs.fake_registry:preload"]) as executor:
        desired = desired_of(session.launched)
        report = run_local(desired, executor, grace_seconds=20, on_event=lambda event: tell(event.line), stop_count=stop_count)
    return SweepRun(session, report)


def _steps(behaviour: str, notes: Path, checkpoint: Path, should_stop: Callable[[], bool]) -> None:
    """Work in steps, from where the last checkpoint was written."""
    _, steps, seconds = behaviour.split(":")
    state = checkpoint / "state.json"
    for step in range(json.loads(state.read_text())["step"] if state.exists() else 0, int(steps)):
        time.sleep(float(seconds))
        _note(notes)
        partial = state.with_suffix(".new")
        partial.write_text(json.dumps({"step": step + 1}))
        partial.replace(state)
        if should_stop():
            raise FakeStopError(f"asked to stop at step {step + 1}")


__all__ = ["read_digest"]  # named by DIGEST_OF
