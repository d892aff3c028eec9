"""What can be told of a sweep before anything is written or started: one line for what cannot be searched."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.control.controller import read_facts
from jobs.control.estimates import Source, sibling_seconds
from jobs.control.facts import StageFacts
from jobs.errors import UsageError
from jobs.experiment.config import Experiment, nearest, resources_of
from jobs.experiment.graph import Graph, Node, build_graph
from jobs.experiment.launched import Corpus
from jobs.experiment.registry import SweepRegistry
from jobs.experiment.sweep_section import MAX_POINTS, Search, Stopping
from jobs.store.layout import Layout
from jobs.sweeps.records import Sweep
from jobs.sweeps.space import COUNTS, METHOD, SECTION, Point, Space, apply, ends, grid_points, random_points, variations
from jobs.sweeps.trial import fold_graph

SHOWN = 64  # points listed one by one
CHECKPOINT = "checkpoint"  # last part of the keys that may name a file or folder
CLUSTER = "cluster"  # the stage that divides the frames of its upstream stage
INSTALL = "pip install -c constraints.txt -e '.[sweep]'"
RAY = ("ray", "fsspec", "pandas", "pyarrow", "requests")  # without the last four, Ray has no Tune
OPTUNA = ("optuna",)


def check_sweep(experiment: Experiment, space: Space, registry: SweepRegistry, corpus: Corpus) -> dict[str, tuple[str, ...]]:
    """The folds that a sweep evaluates, each with its validation speakers.

    Raises UsageError, or the registry's own error, in one line for settings that no trial could be run with, for cluster counts above the
    number of frames, where nobody is left for validation, and where Ray or Optuna is not installed.
    """
    _check_paths(space)
    folds = _folds(experiment, corpus)
    if experiment.sweep.search is Search.grid:
        grid_points(space)
    for point in itertools.islice(ends(space), MAX_POINTS):
        registry.check(apply(experiment, point).recipe)
    validation = {fold: registry.validation_speakers(Path(corpus.folder), fold) for fold in folds}
    stages = functools.partial(_stages, experiment, registry, corpus, folds[0])
    _check_resources(experiment, stages(next(ends(space))))
    _check_settings(space, experiment, stages)
    _check_counts(space, experiment, registry, corpus, validation, stages)
    require_ray(experiment.sweep.search)
    return validation


def require_ray(search: Search) -> None:
    """UsageError that names the extra to install where Ray Tune, or Optuna for a search with it, is missing. Nothing is imported."""
    wanted = (*RAY, *(OPTUNA if search is Search.optuna else ()))
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"sweep: not installed: {', '.join(missing)}; sweeps need the extra `sweep`: {INSTALL}")


def _stages(experiment: Experiment, registry: SweepRegistry, corpus: Corpus, fold: str, point: Point) -> Mapping[str, Node]:
    """The stages of a point in one fold, by key."""
    return build_graph(
        registry,
        apply(experiment, point).recipe,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        methods=(METHOD,),
        folds=(fold,),
        seeds={(METHOD, fold, 0): (0,)},
    ).nodes


def _folds(experiment: Experiment, corpus: Corpus) -> Sequence[str]:
    key = "sweep.folds" if experiment.sweep.folds else "folds"
    folds = experiment.sweep.folds or experiment.folds or corpus.folds
    for fold in folds:
        if fold not in corpus.folds:
            known = nearest(fold, corpus.folds) or f"; known are {', '.join(corpus.folds)}"
            raise UsageError(f"{key}: corpus {corpus.name} has no fold {fold!r}{known}")
    if len(set(folds)) != len(folds):
        raise UsageError(f"{key}: {', '.join(folds)}: name each once")
    return folds


def _check_paths(space: Space) -> None:
    """Stages are computed in other folders, on Slurm on other machines: what lies here must be named so that it is found from there."""
    for key, values in space.choices.items():
        for value in values:
            path = Path(value) if isinstance(value, str) and key.rpartition(".")[2] == CHECKPOINT else None
            if path is not None and not path.is_absolute() and path.expanduser().exists():
                raise UsageError(f"{SECTION}.{key}: {value}: name it by its absolute path, {path.expanduser().resolve()}")


def _check_resources(experiment: Experiment, nodes: Mapping[str, Node]) -> None:
    for stage in sorted({node.stage for node in nodes.values()}):
        if (asked := resources_of(experiment, stage).nodes) > 1:
            raise UsageError(f"resources.{stage}.nodes={asked}: in a sweep a stage is computed on one node; set resources.{stage}.nodes=1")


def _check_settings(space: Space, experiment: Experiment, stages: Callable[[Point], Mapping[str, Node]]) -> None:
    """Every key that is searched must be one that stages of P-TAPT are known by: all its values would mean the same runs otherwise."""
    for key, points in variations(space).items():
        if len(points) == 1:  # beside the only choice there is what the recipe says of itself
            points = (*points, Point(space.pool, tuple(each for each in points[0].settings if each[0] != key)))
        recipes = [apply(experiment, point).recipe for point in points]
        differ = any(recipe != recipes[0] for recipe in recipes)
        if differ and len({frozenset(stages(point)) for point in points}) == 1:
            raise UsageError(f"{SECTION}.{key}: no stage of {METHOD} depends on it, so that there is nothing to search")


def _check_counts(
    space: Space,
    experiment: Experiment,
    registry: SweepRegistry,
    corpus: Corpus,
    validation: Mapping[str, Sequence[str]],
    stages: Callable[[Point], Mapping[str, Node]],
) -> None:
    """No set may ask for more clusters than there are frames to divide, in any fold; settings may change how many there are."""

    def divided(point: Point) -> frozenset[str]:
        """The stages whose frames are divided into clusters: where they are the same, so are their frames."""
        return frozenset(key for node in stages(point).values() if node.stage == CLUSTER for key in node.upstream.values())

    points = (next(ends(space)), *itertools.chain.from_iterable(variations(space).values()))
    for point in {divided(point): point for point in points}.values():
        recipe = apply(experiment, point).recipe
        frames = {fold: registry.training_frames(Path(corpus.folder), recipe, fold, speakers) for fold, speakers in validation.items()}
        fold = min(frames, key=frames.__getitem__)
        most = max(space.pool)
        if most > frames[fold]:
            raise UsageError(
                f"sweep: k={most} is above the number of training frames, {frames[fold]} in fold {fold!r}; "
                f"name smaller counts (sweep.counts, sweep.sets or recipe.{COUNTS})"
            )


@dataclass(frozen=True)
class StageCount:
    """Stages of one name, and what those that are not there would take if every point were evaluated to its end."""

    stage: str
    needed: int
    there: int
    gpu_hours: float
    cpu_hours: float
    source: Source

    @property
    def missing(self) -> int:
        return self.needed - self.there


@dataclass(frozen=True)
class Preview:
    """What a sweep would try and need."""

    points: tuple[Point, ...]
    stand_in: bool  # the search chooses as it goes, and these were drawn at random in place of its points
    stages: tuple[StageCount, ...]  # in the order of computing

    @property
    def gpu_hours(self) -> float:
        return sum(each.gpu_hours for each in self.stages)

    @property
    def cpu_hours(self) -> float:
        return sum(each.cpu_hours for each in self.stages)


def points_of(experiment: Experiment, space: Space) -> tuple[Point, ...]:
    """The points that a sweep tries; of a search that chooses as it goes, as many drawn at random."""
    if experiment.sweep.search is Search.grid:
        return grid_points(space)
    return random_points(space, experiment.sweep.trials, experiment.sweep.seed)


def preview(sweep: Sweep, registry: SweepRegistry) -> Preview:
    """Reads results, writes nothing."""
    points = points_of(sweep.experiment, sweep.space)
    nodes: dict[str, Node] = {}
    for point in points:
        for fold in sweep.folds:
            nodes |= fold_graph(sweep.experiment, sweep.corpus, point, fold, sweep.validation[fold], registry).nodes
    return Preview(points, sweep.experiment.sweep.search is Search.optuna, _counts(sweep.experiment, sweep.corpus, sweep.layout, nodes))


def preview_lines(sweep: Sweep, found: Preview) -> list[str]:
    """For a terminal or a pipe."""
    asked, lines = sweep.experiment.sweep, []
    kind = {Search.grid: "every one of them", Search.random: "drawn at random", Search.optuna: "chosen by Optuna as it goes"}[asked.search]
    lines.append(f"{sweep.layout.experiment}: sweep {sweep.digest}: {_many(len(found.points), 'point')}, {kind}; {_stopping(sweep)}")
    if not found.stand_in:
        lines.extend(f"  {point.label}" for point in found.points[:SHOWN])
        lines.extend([f"  and {len(found.points) - SHOWN} more"] if len(found.points) > SHOWN else [])
    lines.append(
        f"{_many(len(sweep.folds), 'fold')}, {_many(asked.seeds, 'fine-tuning')} each; no stage opens a recording of the held-out fold"
    )
    lines.extend(f"  fold {fold} held out: scored on {', '.join(sweep.validation[fold])}" for fold in sweep.folds)
    lines.append("stages" + (f", counted for {len(found.points)} points drawn at random in place of Optuna's" if found.stand_in else ""))
    for each in found.stages:
        cost = f": {_hours(each.gpu_hours, each.cpu_hours)} ({each.source.value})" if each.missing else ""
        lines.append(f"  {each.stage}: {each.needed} needed, {each.there} there, {each.missing} to compute{cost}")
    lines.append(
        f"in all {sum(each.missing for each in found.stages)} stages to compute, at most about {_hours(found.gpu_hours, found.cpu_hours)}"
    )
    return lines


def _counts(experiment: Experiment, corpus: Corpus, layout: Layout, nodes: Mapping[str, Node]) -> tuple[StageCount, ...]:
    graph = Graph(nodes, (), corpus.name, corpus.digest, dict.fromkeys(nodes, ()))
    facts = read_facts(graph, layout)
    seconds = sibling_seconds(graph, facts)
    by_stage: dict[str, list[StageFacts]] = {}
    for key, node in nodes.items():
        by_stage.setdefault(node.stage, []).append(facts[key])
    return tuple(_count(experiment, stage, found, seconds.get((stage, ""))) for stage, found in by_stage.items())


def _count(experiment: Experiment, stage: str, facts: Sequence[StageFacts], measured: float | None) -> StageCount:
    given, there = resources_of(experiment, stage), sum(fact.done for fact in facts)
    seconds = given.minutes * 60.0 if measured is None else measured
    hours = seconds * (len(facts) - there) / 3600
    source = Source.requested if measured is None else Source.siblings
    return StageCount(stage, len(facts), there, hours * given.gpus, hours * given.cpus, source)


def _stopping(sweep: Sweep) -> str:
    asked = sweep.experiment.sweep
    if asked.stopping is Stopping.none or len(sweep.folds) <= asked.grace_folds:
        return "none is stopped early"
    rungs = [asked.grace_folds]
    while rungs[-1] * asked.reduction < len(sweep.folds):
        rungs.append(rungs[-1] * asked.reduction)
    when = " and ".join(filter(None, (", ".join(map(str, rungs[:-1])), str(rungs[-1]))))
    return f"after {when} of {len(sweep.folds)} folds one point in {asked.reduction} goes on (ASHA)"


def _hours(gpu: float, cpu: float) -> str:
    return f"{gpu:.1f} GPU-hours and {cpu:.1f} CPU-hours"


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
