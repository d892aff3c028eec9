"""The experiment that a command line asks for: its words, its settings, and the checks before a launch that need no corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.config import Cluster, Experiment, load_experiment
from jobs.experiment.registry import Registry


@dataclass(frozen=True)
class Code:
    """What defines experiments: the registry of stages, and the files of settings."""

    registry: Registry
    check: Callable[[Any], None]  # raises for a recipe that cannot be computed
    stages: tuple[str, ...]  # names of all stages
    recipe_schema: type[Any]
    configs: Path  # folder
    published: Path  # file of the published results


@dataclass(frozen=True)
class Words:
    """The words of `COMMAND [EXPERIMENT] [KEY=VALUE ...] [--cluster CLUSTER]`."""

    file: str  # name of the experiment's file in configs/experiment/
    overrides: tuple[str, ...]
    cluster: Cluster | None = None  # None: not given as an option


def words_of(command: str, arguments: Sequence[str], cluster: str | None, default: str) -> Words:
    """The words of a command line. `default`: experiment if none is named. UsageError for two experiments or an unknown cluster."""
    named = [text for text in arguments if "=" not in text]
    if len(named) > 1:
        raise UsageError(f"{command}: one experiment at a time (got {', '.join(named)}); settings are given as KEY=VALUE")
    if cluster is not None and cluster not in Cluster.__members__:
        raise UsageError(f"--cluster {cluster}: known are {', '.join(Cluster.__members__)}")
    overrides = tuple(text for text in arguments if "=" in text)
    return Words(named[0] if named else default, overrides, Cluster[cluster] if cluster else None)


def read_experiment(words: Words, code: Code) -> Experiment:
    """The experiment of a command line, checked as far as that needs no corpus."""
    experiment = load_experiment(
        words.file,
        words.overrides,
        configs=code.configs,
        recipe_schema=code.recipe_schema,
        stages=code.stages,
        teams=code.registry.teams,
        methods=code.registry.methods,
    )
    if words.cluster is not None:
        experiment = replace(experiment, cluster=words.cluster)
    check_experiment(experiment, code)
    return experiment


def check_experiment(experiment: Experiment, code: Code) -> None:
    """UsageError for settings that would only fail after everything is computed, or in every job."""
    from jobs.commands.notify import check_notify
    from jobs.control.outliers import check_rule
    from jobs.tables.published import load_published

    load_published(code.published, experiment.table)
    for recipe in (experiment.recipe, *experiment.recipes.values()):
        code.check(recipe)
    check_rule(experiment.policy.outliers, experiment.seeds, experiment.policy.sigmas)
    check_notify(experiment.policy)
