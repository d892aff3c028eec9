"""The stages of a sweep: the graph of a point, the graph of all points that are wanted, and the identity of the sweep. Pure.

A trial trains on neither the held-out fold nor the validation speakers and is scored on the latter; no stage opens a recording of the
held-out fold. Its stages are in the store under their content keys and are shared with other trials and with grids.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import cast

from jobs.experiment.config import Experiment
from jobs.experiment.graph import Graph, Slot, build_graph, canonical_json, seeds_of_slots, united
from jobs.experiment.launched import Corpus
from jobs.experiment.registry import Registry, SweepRegistry
from jobs.sweeps.records import Sweep, folds_of, read_proposals
from jobs.sweeps.space import Point, apply, listed_points, space_of, swept_method

DIGITS = 12  # of the digest that names a sweep
Wanted = Sequence[tuple[Point, int]]  # points, each with how many of the folds, from the first, are to be evaluated


def point_graph(
    experiment: Experiment,
    corpus: Corpus,
    point: Point,
    folds: Sequence[str],
    validation: Mapping[str, Sequence[str]],
    registry: SweepRegistry,
    generations: Mapping[Slot, int] | None = None,
    base: Graph | None = None,
) -> Graph:
    """Every stage of a point on some folds. `generations` and `base` are as in `jobs.experiment.launched`."""
    methods = [swept_method(experiment).name]
    scored = SimpleNamespace(calls=functools.partial(registry.calls, validation=validation))  # as much as `build_graph` uses
    return build_graph(
        cast(Registry, scored),
        apply(experiment, point).recipe,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        methods=methods,
        folds=folds,
        seeds=seeds_of_slots(methods, folds, seeds=experiment.sweep.seeds, first_seed=experiment.first_seed, generations=generations),
        base=base,
    )


class SweepGraphs:
    """Graphs of the points of one sweep; those without reserve seeds are kept."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._kept: dict[tuple[Point, int], Graph] = {}

    def graph(self, wanted: Wanted, generations: Mapping[Slot, int] | None = None) -> Graph:
        """The graph of all points, each stage once. A run is called POINT/FOLD/SLOT, by the name of its point."""
        method = swept_method(self._sweep.experiment).name
        of_point: dict[str, dict[Slot, int]] = {}
        for (name, fold, slot), generation in (generations or {}).items():
            of_point.setdefault(name, {})[method, fold, slot] = generation
        return united({point.name: self._of(point, count, of_point.get(point.name)) for point, count in wanted})

    def _of(self, point: Point, count: int, generations: Mapping[Slot, int] | None) -> Graph:
        sweep = self._sweep
        build = functools.partial(point_graph, sweep.experiment, sweep.corpus, point, sweep.folds[:count], sweep.validation, sweep.registry)
        if (point, count) not in self._kept:
            self._kept[point, count] = build()
        plain = self._kept[point, count]
        return build(generations, plain) if generations else plain


def sweep_digest(experiment: Experiment, corpus: Corpus, validation: Mapping[str, tuple[str, ...]], registry: SweepRegistry) -> str:
    """Identity of a sweep: hash of its points, its search, its folds and the stages of a point.

    Resources are not included, so that a sweep can be resumed with other resources.
    """
    space, sweep = space_of(experiment), experiment.sweep
    folds = folds_of(experiment, corpus)
    first = Point(tuple(sorted(space.sets[0] if space.sets else space.pool)))
    stages = {fold: list(point_graph(experiment, corpus, first, [fold], validation, registry).nodes) for fold in folds}
    value = {
        "space": asdict(space),
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


def every_stage(sweep: Sweep) -> Graph:
    """Every stage that the points of a sweep may have, on all folds, whatever its search decides: those proposed so far, if it proposes."""
    listed = listed_points(sweep.experiment)
    points = listed if listed is not None else [each.point for batch in read_proposals(sweep) for each in batch]
    if not points:
        return Graph({}, (), sweep.corpus.name, sweep.corpus.digest, {})
    return SweepGraphs(sweep).graph([(point, len(sweep.folds)) for point in dict.fromkeys(points)])
