"""Section `sweep` of an experiment: search space, search method, folds and seeds of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from jobs.experiment.graph import MAX_SLOTS

MAX_POINTS = 4096  # points of a grid, sets of a space, trials of a search; more is taken for a typing error
RANGE_KEYS = frozenset(("low", "high", "log"))
FORMER_KEYS = frozenset(("restarts", "resources"))  # in records of older versions: of the Slurm allocation that a sweep had


class Search(Enum):
    """How points are chosen."""

    grid = "grid"  # every combination
    random = "random"  # `trials` points, uniformly
    optuna = "optuna"  # `trials` points by optuna's tree-structured Parzen estimator


class Stopping(Enum):
    """Early stopping of trials."""

    asha = "asha"  # asynchronous successive halving by the mean validation score of the folds so far
    none = "none"  # every trial gets all folds


@dataclass
class SweepSettings:
    """A search over sets of cluster counts and over other settings of the recipe."""

    counts: list[int] = field(default_factory=list)  # the pool that sets are drawn from; not named: the counts of the recipe
    sizes: list[int] = field(default_factory=list)  # how many counts of the pool a set holds; empty: from one to all
    sets: list[Any] = field(default_factory=list)  # the sets themselves, each a list of counts, in place of `counts` and `sizes`
    settings: dict[str, Any] = field(default_factory=dict)  # key below `recipe.` -> choices, or {low, high, log}; null: not searched
    search: Search = Search.grid  # how points are chosen
    trials: int = 16  # of random and optuna
    seed: int = 0  # of the search
    seeds: int = 2  # runs per fold
    folds: list[str] = field(default_factory=list)  # held-out folds evaluated; empty: those of the experiment
    stopping: Stopping = Stopping.asha  # early stopping of trials
    grace_folds: int = 1  # computed for every trial before it can be stopped
    reduction: int = 2  # ASHA: one in so many trials continues; the next rung has so many times the folds
    at_once: int = 0  # points that optuna proposes together, before it sees their results; 0: 4


SWEEP_BOUNDS: Mapping[str, tuple[float, float]] = {  # key of the section -> minimum, maximum
    "trials": (1, MAX_POINTS),
    "seed": (0, 2**32 - 1),
    "seeds": (1, MAX_SLOTS),
    "grace_folds": (1, math.inf),
    "at_once": (0, math.inf),
    "reduction": (2, math.inf),
}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> choices or range of nested settings; a later entry for the same key replaces an earlier one."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and RANGE_KEYS.isdisjoint(value):
            found.update(flat(value, f"{name}."))
        else:
            found[name] = value
    return found


def merged(settings: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings updated by later ones: a range updates a range key by key, anything else replaces the earlier value."""
    found = dict(settings)
    for key, value in later.items():
        before = found.get(key)
        found[key] = {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return found
