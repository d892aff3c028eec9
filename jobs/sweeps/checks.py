"""What can be told of a sweep before anything is written or started: one line for what cannot be searched."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.config import nearest, resources_of
from jobs.errors import UsageError
from jobs.graph import Node, build_graph
from jobs.sweeps.settings import MAX_POINTS, Search
from jobs.sweeps.space import COUNTS, METHOD, Point, apply, ends, grid_points, variations
from jobs.sweeps.values import SECTION

if TYPE_CHECKING:
    from jobs.config import Experiment
    from jobs.experiment import Corpus
    from jobs.stages import SweepRegistry
    from jobs.sweeps.space import Space

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
