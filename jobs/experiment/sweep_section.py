"""Section `sweep` of an experiment: what is searched, how, on how much of the corpus, and with which machines. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from jobs.experiment.graph import MAX_SLOTS

MAX_POINTS = 4096  # of a grid, sets of a space, trials of a search: more is a slip of the pen
RANGE_KEYS = frozenset(("low", "high", "log"))


class Search(Enum):
    """How the points to try are chosen."""

    grid = "grid"  # every set with every choice
    random = "random"  # `trials` of them, drawn evenly
    optuna = "optuna"  # `trials` of them, each chosen by what the ones before have shown (tree-structured Parzen estimator)


class Stopping(Enum):
    """Whether trials that fall behind are given up."""

    asha = "asha"  # asynchronous successive halving on the mean validation UA of the folds done
    none = "none"


@dataclass
class SweepResources:
    """The Slurm allocation that a sweep asks for; all but `nodes` and `minutes` are those of each node."""

    nodes: int = 1
    cpus: int = 8
    gpus: int = 1
    memory_gb: float = 48.0
    minutes: int = 1440


@dataclass
class SweepSettings:
    """A search over the sets of cluster counts, and over other settings of the recipe."""

    counts: list[int] = field(default_factory=list)  # the pool that sets are drawn from; empty: the counts of the recipe
    sizes: list[int] = field(default_factory=list)  # how many counts of the pool a set holds; empty: from one to all
    sets: list[Any] = field(default_factory=list)  # the sets themselves, each a list of counts, in place of `counts` and `sizes`
    settings: dict[str, Any] = field(default_factory=dict)  # key below `recipe.` -> choices, or {low, high, log}; null: not searched
    search: Search = Search.grid
    trials: int = 16  # of random and optuna
    seed: int = 0  # of the search
    seeds: int = 2  # fine-tunings of a fold
    folds: list[str] = field(default_factory=list)  # held-out folds evaluated; empty: those of the experiment
    stopping: Stopping = Stopping.asha
    grace_folds: int = 1  # that every trial is given before it can be stopped
    reduction: int = 2  # of the trials that have come so far, one in so many goes on; the next look is after so many times the folds
    at_once: int = 0  # trials under way at the same time; 0: by what the machines hold
    restarts: int = 20  # further allocations of a sweep on Slurm, after its time limit
    resources: SweepResources = field(default_factory=SweepResources)


def sweep_bounds(sweep: SweepSettings) -> dict[str, tuple[float, float, float]]:
    """Key of the section -> its value, the least and the most it may be."""
    resources = sweep.resources
    return {
        "trials": (sweep.trials, 1, MAX_POINTS),
        "seed": (sweep.seed, 0, 2**32 - 1),
        "seeds": (sweep.seeds, 1, MAX_SLOTS),
        "grace_folds": (sweep.grace_folds, 1, math.inf),
        "reduction": (sweep.reduction, 2, math.inf),
        "at_once": (sweep.at_once, 0, math.inf),
        "restarts": (sweep.restarts, 0, math.inf),
        "resources.nodes": (resources.nodes, 1, math.inf),
        "resources.cpus": (resources.cpus, 1, math.inf),
        "resources.gpus": (resources.gpus, 0, math.inf),
        "resources.memory_gb": (resources.memory_gb, math.ulp(0.0), math.inf),
        "resources.minutes": (resources.minutes, 1, math.inf),
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> choices or range, however deep the keys were written; the later of two writings of one key counts."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and RANGE_KEYS.isdisjoint(value):
            found.update(flat(value, f"{name}."))
        else:
            found[name] = value
    return found


def merged(settings: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings with later ones over them: choices or a range take the place of what was there, a range changes a range key by key."""
    found = dict(settings)
    for key, value in later.items():
        before = found.get(key)
        found[key] = {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return found
