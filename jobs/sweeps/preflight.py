"""Checks of a sweep before anything is written or started, and its preview: points, folds, and stages to compute (`--dry-run`)."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.control.controller import read_facts
from jobs.control.estimates import Source, sibling_seconds
from jobs.control.facts import StageFacts
from jobs.errors import UsageError
from jobs.experiment.config import Experiment, resources_of
from jobs.experiment.graph import Graph, Node
from jobs.experiment.launched import Corpus
from jobs.experiment.layers import nearest
from jobs.experiment.registry import SweepRegistry
from jobs.experiment.sweep_section import MAX_POINTS, Search
from jobs.store.layout import Layout, shared_path
from jobs.store.scores import score_of
from jobs.sweeps.records import Sweep, folds_of
from jobs.sweeps.report.costs import Hours
from jobs.sweeps.search import rungs
from jobs.sweeps.space import (
    SECTION,
    Point,
    Space,
    apply,
    ends,
    grid_points,
    listed_points,
    random_points,
    recipe_of_sweep,
    space_of,
    swept_method,
    variations,
)
from jobs.sweeps.stages import point_graph
from jobs.text import counted

SHOWN = 64  # points listed one by one
INSTALL = "pip install -c constraints.txt -e '.[sweep]'"
RAY = ("ray", "fsspec", "pandas", "pyarrow", "requests")  # Ray Tune needs the last four
OPTUNA = ("optuna",)
SEARCHES = {Search.grid: "every one of them", Search.random: "drawn at random", Search.optuna: "chosen by Optuna as it goes"}


def check_sweep(experiment: Experiment, space: Space, registry: SweepRegistry, corpus: Corpus) -> dict[str, tuple[str, ...]]:
    """The folds that a sweep evaluates, each with its validation speakers.

    Raises UsageError, or the registry's own error, in one line for settings that no trial can be run with, for cluster counts above the
    number of frames, for folds without validation speakers, and if Ray or Optuna is not installed.
    """
    _check_paths(space, swept_method(experiment).path_keys)
    if not score_of(registry).higher_is_better:
        raise UsageError(f"sweep: the highest validation score is searched, but lower {score_of(registry).label} is better")
    folds = _checked_folds(experiment, corpus)
    if experiment.sweep.search is Search.grid:
        grid_points(space)
    for point in itertools.islice(ends(space), MAX_POINTS):
        registry.check(apply(experiment, point).recipe)
    validation = {fold: registry.validation_speakers(Path(corpus.folder), fold) for fold in folds}

    def stages(point: Point) -> Mapping[str, Node]:
        return point_graph(experiment, corpus, point, folds[:1], validation, registry).nodes

    _check_settings(space, experiment, stages)
    _check_sizes(space, experiment, registry, corpus, validation, stages)
    require_ray(experiment.sweep.search)
    return validation


def recipes_with(experiment: Experiment, keys: Sequence[str]) -> tuple[Any, ...]:
    """A recipe for each combination of the values that these settings have in a sweep; other settings have the value of one point."""
    space = space_of(experiment)
    searched = {key: space.choices[key] for key in keys if key in space.choices}
    first = dict(next(ends(space)).settings)
    points = (
        Point(space.pool, tuple({**first, **dict(zip(searched, each, strict=True))}.items()))
        for each in itertools.product(*searched.values())
    )
    return tuple(apply(experiment, point).recipe for point in points)


def require_ray(search: Search) -> None:
    """UsageError that names the extra to install if Ray Tune, or Optuna for a search with it, is missing. Imports neither."""
    wanted = (*RAY, *(OPTUNA if search is Search.optuna else ()))
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"sweep: not installed: {', '.join(missing)}; sweeps need the extra `sweep`: {INSTALL}")


def _checked_folds(experiment: Experiment, corpus: Corpus) -> Sequence[str]:
    key, folds = "sweep.folds" if experiment.sweep.folds else "folds", folds_of(experiment, corpus)
    for fold in folds:
        if fold not in corpus.folds:
            known = nearest(fold, corpus.folds) or f"; known are {', '.join(corpus.folds)}"
            raise UsageError(f"{key}: corpus {corpus.name} has no fold {fold!r}{known}")
    if len(set(folds)) != len(folds):
        raise UsageError(f"{key}: {', '.join(folds)}: name each once")
    return folds


def _check_paths(space: Space, path_keys: Sequence[str]) -> None:
    """Local files and folders must be given by absolute paths, as stages run in other folders and on other machines."""
    for key, values in space.choices.items():
        for value in values:
            path = Path(value) if isinstance(value, str) and key.rpartition(".")[2] in path_keys else None
            if path is not None and not path.is_absolute() and path.expanduser().exists():
                raise UsageError(f"{SECTION}.{key}: {value}: name it by its absolute path, {shared_path(path.expanduser())}")


def _check_settings(space: Space, experiment: Experiment, stages: Callable[[Point], Mapping[str, Node]]) -> None:
    """Every searched key must change the content key of some stage; otherwise all its values would be the same runs."""
    for key, points in variations(space).items():
        if len(points) == 1:  # compare a single choice with the recipe's own value
            points = (*points, Point(space.pool, tuple(each for each in points[0].settings if each[0] != key)))
        recipes = [apply(experiment, point).recipe for point in points]
        differ = any(recipe != recipes[0] for recipe in recipes)
        if differ and len({frozenset(stages(point)) for point in points}) == 1:
            method = swept_method(experiment).name
            raise UsageError(f"{SECTION}.{key}: no stage of {method} depends on it, so that there is nothing to search")


def _check_sizes(
    space: Space,
    experiment: Experiment,
    registry: SweepRegistry,
    corpus: Corpus,
    validation: Mapping[str, Sequence[str]],
    stages: Callable[[Point], Mapping[str, Node]],
) -> None:
    """No cluster count may exceed the number of training frames of any fold, which may depend on settings, and no batch its utterances."""
    method = swept_method(experiment)

    def divided(point: Point) -> frozenset[str]:
        """Keys of the stages whose frames are clustered. Points with the same keys have the same frames."""
        return frozenset(key for node in stages(point).values() if node.stage == method.counts_stage for key in node.upstream.values())

    points = (next(ends(space)), *itertools.chain.from_iterable(variations(space).values()))
    for point in {divided(point): point for point in points}.values():
        recipe = apply(experiment, point).recipe
        frames = {fold: registry.training_frames(Path(corpus.folder), recipe, fold, speakers) for fold, speakers in validation.items()}
        fold = min(frames, key=frames.__getitem__)
        most = max(space.pool)
        if most > frames[fold]:
            raise UsageError(
                f"sweep: k={most} is above the number of training frames, {frames[fold]} in fold {fold!r}; "
                f"name smaller counts (sweep.counts, sweep.sets or recipe.{method.counts})"
            )
    for point in dict.fromkeys(points):
        registry.check_corpus(Path(corpus.folder), [(method.name, apply(experiment, point).recipe)], validation)


@dataclass(frozen=True)
class StageCount:
    """The stages of one name that all points need, and the device time of those not finished if no point is stopped early."""

    stage: str
    needed: int
    finished: int
    cost: Hours
    source: Source

    @property
    def missing(self) -> int:
        return self.needed - self.finished


@dataclass(frozen=True)
class Preview:
    """The points of a sweep, and the stages that they need."""

    points: tuple[Point, ...]
    example: bool  # the search chooses its points from results; these are random points in their place
    stages: tuple[StageCount, ...]  # in the order of computing

    @property
    def cost(self) -> Hours:
        return sum((each.cost for each in self.stages), Hours())


def preview(sweep: Sweep) -> Preview:
    """Reads results, writes nothing."""
    asked, points = sweep.experiment.sweep, listed_points(sweep.experiment)
    shown = random_points(sweep.space, asked.trials, asked.seed) if points is None else points
    nodes: dict[str, Node] = {}
    for point in shown:
        nodes |= point_graph(sweep.experiment, sweep.corpus, point, sweep.folds, sweep.validation, sweep.registry).nodes
    return Preview(shown, points is None, _counts(sweep.experiment, sweep.corpus, sweep.layout, nodes))


def preview_lines(sweep: Sweep, found: Preview) -> list[str]:
    """For a terminal or a pipe."""
    asked, points = sweep.experiment.sweep, counted(len(found.points), "point")
    lines = [f"{sweep.layout.experiment}: sweep {sweep.digest}: {points}, {SEARCHES[asked.search]}; {_stopping(sweep)}"]
    lines.extend(recipe_of_sweep(sweep.experiment, sweep.code))
    if not found.example:
        lines.extend(f"  {point.label}" for point in found.points[:SHOWN])
        lines.extend([f"  and {len(found.points) - SHOWN} more"] if len(found.points) > SHOWN else [])
    lines.append(
        f"{counted(len(sweep.folds), 'fold')}, {counted(asked.seeds, 'fine-tuning')} each; no stage opens a recording of the held-out fold"
    )
    lines.extend(f"  fold {fold} held out: scored on {', '.join(sweep.validation[fold])}" for fold in sweep.folds)
    lines.append(
        "stages" + (f", counted for {counted(len(found.points), 'point')} drawn at random in place of Optuna's" if found.example else "")
    )
    for each in found.stages:
        cost = f": {each.cost.text} ({each.source.value})" if each.missing else ""
        lines.append(f"  {each.stage}: {each.needed} needed, {each.finished} there, {each.missing} to compute{cost}")
    lines.append(f"in all {counted(sum(each.missing for each in found.stages), 'stage')} to compute, at most about {found.cost.text}")
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
    resources, finished = resources_of(experiment, stage), sum(fact.done for fact in facts)
    seconds = resources.minutes * 60.0 if measured is None else measured
    hours = seconds * (len(facts) - finished) / 3600
    source = Source.requested if measured is None else Source.siblings
    return StageCount(stage, len(facts), finished, Hours(resources.gpus, resources.cpus) * hours, source)


def _stopping(sweep: Sweep) -> str:
    asked, of_asha = sweep.experiment.sweep, rungs(sweep.experiment.sweep, len(sweep.folds))
    if not of_asha:
        return "none is stopped early"
    when = " and ".join(filter(None, (", ".join(map(str, of_asha[:-1])), str(of_asha[-1]))))
    return f"after {when} of {counted(len(sweep.folds), 'fold')} one point in {asked.reduction} continues (ASHA)"
