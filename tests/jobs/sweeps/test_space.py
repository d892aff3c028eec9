"""The space of a sweep: its sets and settings, drawing points, and the overrides of a point."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, load_experiment
from jobs.experiment.graph import build_graph
from jobs.experiment.sweep_section import SweepSettings
from jobs.sweeps.space import (
    Point,
    Range,
    Space,
    apply,
    decode,
    ends,
    grid_points,
    overrides_of,
    parameters,
    point_from_json,
    random_points,
    space_of,
    variations,
)
from ser_core.registry import REGISTRY
from ser_core.settings.recipe import Recipe

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
RATES = {"ptapt.learning_rate": [1e-4, 5e-4]}


def _experiment(**sweep: Any) -> Experiment:
    return Experiment(name="e", corpus="c", sweep=SweepSettings(**sweep), recipe=Recipe())


def _load(*overrides: str) -> Experiment:
    return load_experiment("emodb", overrides, configs=CONFIGS, recipe_schema=Recipe)


def _error(**sweep: Any) -> str:
    with pytest.raises(UsageError) as caught:
        grid_points(space_of(_experiment(**sweep)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sets_come_from_the_recipe_a_pool_or_a_list() -> None:
    """By default all sets of the recipe's counts; `sizes` selects sets of a pool; listed sets are used as they are."""
    assert [point.label for point in grid_points(space_of(_experiment()))] == [
        *("64", "512", "4096", "64+512", "64+4096", "512+4096"),
        "64+512+4096",
    ]
    space = space_of(_experiment(counts=[64, 16, 32], sizes=[3, 1]))
    assert (space.sets, space.pool, space.sizes) == (((16,), (32,), (64,), (16, 32, 64)), (16, 32, 64), (1, 3))
    space = space_of(_experiment(sets=[[64, 8], [32]]))
    assert (space.sets, space.pool, space.sizes) == (((8, 64), (32,)), (8, 32, 64), ())


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({"sets": [[]]}, "sweep.sets: an empty set"),
        ({"sets": [[16, 64, 16]]}, "sweep.sets: [16, 64, 16] names a number of clusters twice"),
        ({"sets": [[16, 64], [64, 16]]}, "sweep.sets: [16, 64] is there twice"),
        ({"sets": [[1, 16]]}, "sweep.sets: 1 is not a number of clusters"),
        ({"sets": [["many"]]}, "sweep.sets: 'many' is not a number of clusters"),
        ({"sets": [[True]]}, "sweep.sets: True is not a number of clusters"),
        ({"sets": [16, 64]}, "sweep.sets: 16 is not a set; write each as a list"),
        ({"sets": [[16]], "counts": [16]}, "name one or the other"),
        ({"sets": [[16]], "sizes": [1]}, "name one or the other"),
        ({"sets": [[k] for k in range(2, 5000)]}, "sweep.sets: 4998 sets, at most 4096"),
        ({"counts": [16, 16]}, "sweep.counts: [16, 16] names a number of clusters twice"),
        ({"counts": [0]}, "sweep.counts: 0 is not a number of clusters"),
        ({"counts": list(range(2, 15))}, "sweep.counts: 8191 sets, at most 4096"),
        ({"sizes": [0]}, "sweep.sizes: no set of 0 from 3 cluster counts [64, 512, 4096]; allowed: 1 to 3"),
        ({"sizes": [4]}, "sweep.sizes: no set of 4"),
        ({"sizes": [2, 2]}, "sweep.sizes: [2, 2] names a size twice"),
        ({"counts": list(range(2, 13)), "settings": {"ptapt.steps": [1, 2, 3]}}, "a grid of 6141 points, at most 4096"),
        ({"settings": {"ptapt.learning_rate": {"low": 1e-5, "high": 1e-3}}}, "a grid needs choices, for example [a, b]; ranges are for"),
        ({"settings": {"cluster.counts": [[16]]}}, "sweep.settings.cluster.counts: sets of cluster counts are set by sweep.counts"),
        ({"settings": {"ptapt.learning_rat": [1]}}, "did you mean 'sweep.settings.ptapt.learning_rate'?"),
        ({"settings": {"ptapt": [1]}}, "a section of the recipe"),
        ({"settings": {"ptapt.steps": 5}}, "5 is one value; give a list of choices, or a range {low: a, high: b, log: false}"),
        ({"settings": {"ptapt.steps": []}}, "no choices"),
        ({"settings": {"ptapt.steps": [[5]]}}, "[5] is not one value"),
        ({"settings": {"ptapt.steps": [2.5]}}, "could not be converted to Integer"),
        ({"settings": {"ptapt.steps": {"low": 5}}}, "a range has a number for `high`"),
        ({"settings": {"ptapt.steps": {"low": 5, "high": 9, "step": 2}}}, "a range has no key 'step'"),
        ({"settings": {"ptapt.steps": {"low": 5, "high": 5}}}, "low=5 is not below high=5"),
        ({"settings": {"ptapt.steps": {"low": 1, "high": 5, "log": "maybe"}}}, "ptapt.steps.log: 'maybe' is neither true nor false"),
        ({"settings": {"ptapt.learning_rate": {"low": 0, "high": 1, "log": True}}}, "a range with log: true begins above 0"),
        ({"settings": {"features.padding": {"low": "reference", "high": "independent"}}}, "a range is of numbers"),
    ],
)
def test_invalid_spaces_are_errors_in_one_line(sweep: dict[str, Any], expected: str) -> None:
    """Which key, what is wrong with it, what to do."""
    assert expected in _error(**sweep)


def test_equal_values_are_one_point() -> None:
    """`1e-4` may be text in YAML; counts have any order; enums are given by name or as members."""
    asked = {"ptapt": {"learning_rate": ["1e-4", 0.0001, 5e-4]}, "features.padding": ["reference"]}
    space = space_of(_experiment(sets=[[64, 16]], settings=asked))
    assert grid_points(space) == tuple(
        Point((16, 64), (("features.padding", "reference"), ("ptapt.learning_rate", rate))) for rate in (1e-4, 5e-4)
    )
    assert Point((64, 16), (("b", 1), ("a", 2))) == Point((16, 64), (("a", 2), ("b", 1)))


def test_a_choice_equal_to_the_default_is_kept() -> None:
    """A point has every searched key; a null key is not searched."""
    own = Recipe().ptapt.steps
    space = space_of(_experiment(sets=[[16]], settings={"ptapt.steps": [own], "ptapt.learning_rate": None}))
    assert grid_points(space) == (Point((16,), (("ptapt.steps", own),)),)


def test_labels_names_and_json() -> None:
    """For people, for files, for records."""
    point = Point((16, 64), (("ptapt.learning_rate", 0.0005),))
    assert (point.label, Point((16, 64)).label) == ("16+64, ptapt.learning_rate=0.0005", "16+64")
    assert Point((16, 64)).name == "k16-64"
    assert point.name.startswith("k16-64-")
    assert overrides_of(_experiment(), point) == ("recipe.cluster.counts=[16,64]", "recipe.ptapt.learning_rate=0.0005")
    assert point_from_json(json.loads(json.dumps(point.to_json()))) == point
    large = Point(tuple(range(1000, 1020)))
    assert len(large.name) < 64
    damaged: Any
    for damaged in ({}, {"counts": []}, {"counts": ["16"], "settings": {}}, {"counts": [16], "settings": 3}, None):
        with pytest.raises(ValueError, match="not a point"):
            point_from_json(damaged)


def test_names_of_points_differ() -> None:
    """Names are unique and need no quoting."""
    asked = {**RATES, "ptapt.steps": list(range(1, 200)), "features.padding": ["reference", "independent"]}
    points = grid_points(space_of(_experiment(sets=[[16], [16, 64]], settings=asked)))
    names = {point.name for point in points}
    assert len(names) == len(points) == 2 * 2 * 2 * 199
    assert all(shlex.quote(name) == name for name in names)


OVERRIDDEN = {
    "ptapt.learning_rate": ["1e-4", 0.003],
    "features.padding": ["reference"],
    "backbone.config.hidden_size": [96, 192],
    "backbone.revision": ["null", "main: 1", None],
}


@pytest.mark.slow
def test_a_point_equals_the_experiment_of_its_overrides() -> None:
    """The arguments survive a shell and give the same recipe and stages as `apply`; nothing else changes."""
    base = _load()
    experiment = replace(base, sweep=SweepSettings(sets=[[64, 16], [256]], settings=OVERRIDDEN))
    points = grid_points(space_of(experiment))
    assert len(points) == 2 * 2 * 2 * 3
    for point in points[::5]:
        swept = apply(experiment, point)
        ordinary = _load(*shlex.split(shlex.join(overrides_of(experiment, point))), "methods=[ptapt]")
        assert swept.recipe == ordinary.recipe
        assert _keys(swept) == _keys(ordinary)
        assert swept == replace(ordinary, sweep=experiment.sweep)
    assert experiment.recipe == base.recipe
    assert len({_keys(apply(experiment, point)) for point in points}) == 2 * 2 * 2  # without a checkpoint, its revision is of no account


def _keys(experiment: Experiment) -> frozenset[str]:
    graph = build_graph(
        REGISTRY,
        experiment.recipe,
        corpus="c",
        corpus_digest="d",
        methods=experiment.methods,
        folds=("1",),
        seeds={("ptapt", "1", 0): (0,)},
    )
    return frozenset(graph.nodes)


def test_random_points_are_distinct_and_even() -> None:
    """No point twice; sets and choices with equal frequency; all points if more are requested."""
    space = space_of(_experiment(counts=[8, 16, 32], settings=RATES))
    assert sorted(point.label for point in random_points(space, 99, seed=3)) == sorted(point.label for point in grid_points(space))
    drawn = [point for seed in range(700) for point in random_points(space, 2, seed)]
    assert all(first != second for first, second in zip(drawn[::2], drawn[1::2], strict=True))
    often = Counter(point.counts for point in drawn)
    assert set(often) == set(space.sets)
    assert all(math.isclose(number, 200, rel_tol=0.3) for number in often.values())


# A sweep that is restored by a newer version of the program must not search elsewhere.
PINNED = (
    "32, ptapt.learning_rate=2.003e-05, ptapt.steps=68",
    "8, ptapt.learning_rate=0.000118, ptapt.steps=42",
    "8, ptapt.learning_rate=0.0001035, ptapt.steps=13",
)


def test_random_points_are_reproducible() -> None:
    """In another process with another hash seed, and in every version of Python."""
    asked = {"ptapt.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}, "ptapt.steps": {"low": 10, "high": 99}}
    points = random_points(space_of(_experiment(counts=[8, 16, 32], settings=asked)), 3, seed=7)
    assert tuple(point.label for point in points) == PINNED
    program = (
        "from jobs.sweeps.space import *\nimport sys, json\n"
        "space = Space(((8,), (16,), (8, 16)), (8, 16), (1, 2), {'a': (1, 2)}, {'b': Range(0.0, 1.0)})\n"
        "print([point.label for point in random_points(space, 9, 5)])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": each}, cwd=CONFIGS.parent, check=True, capture_output=True
        ).stdout
        for each in ("1", "2")
    }
    assert len(said) == 1


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0, 1), st.booleans(), st.booleans())
def test_numbers_are_within_their_range(low: int, width: int, share: float, log: bool, whole: bool) -> None:
    """For any share, ends included; integers for integer ends; with few digits."""
    given = Range(low, low + width, log) if whole else Range(low / 7, (low + width) / 7, log)
    number = given.at(share)
    assert given.low <= number <= given.high
    assert isinstance(number, int) is whole
    assert given.fitted(number) == number
    assert math.isclose(given.at(0), given.low, rel_tol=1e-3)
    assert math.isclose(given.at(1), given.high, rel_tol=1e-3)


def test_a_range_is_even_in_its_number_or_its_logarithm() -> None:
    """Half of the way is the mean, or the geometric mean; whole numbers are equally likely, the last one too."""
    assert Range(0.0, 1.0).at(0.5) == 0.5
    assert Range(1e-5, 1e-3, log=True).at(0.5) == 1e-4
    assert Counter(Range(1, 4).at(step / 1000) for step in range(1000)) == {1: 250, 2: 250, 3: 250, 4: 250}
    assert Range(1.00001, 1.00002).at(0.5) == 1.000015


POOLS = st.sets(st.integers(2, 5000), min_size=1, max_size=6).map(sorted)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """With a pool or named sets, choices and ranges."""
    pool = draw(POOLS)
    sweep: dict[str, Any] = {"counts": pool}
    if draw(st.booleans()):
        sweep["sizes"] = sorted(draw(st.sets(st.integers(1, len(pool)), min_size=1)))
    elif draw(st.booleans()):
        sweep = {"sets": sorted(draw(st.sets(st.frozensets(st.sampled_from(pool), min_size=1), min_size=1, max_size=5)), key=sorted)}
        sweep["sets"] = [sorted(each) for each in sweep["sets"]]
    if draw(st.booleans()):
        sweep["settings"] = {"ptapt.learning_rate": {"low": 1e-5, "high": 1e-3, "log": draw(st.booleans())}, "finetune.epochs": [1, 2, 3]}
    return space_of(_experiment(**sweep))


def _value(asked: tuple[Any, ...] | Range) -> st.SearchStrategy[Any]:
    if isinstance(asked, Range):
        return st.integers(int(asked.low), int(asked.high)) if asked.whole else st.floats(asked.low, asked.high)
    return st.sampled_from(asked)


@settings(max_examples=60, deadline=None)
@given(st.data(), spaces())
def test_every_draw_of_the_parameters_is_a_point(data: st.DataObject, space: Space) -> None:
    """Of an allowed set, with allowed values; drawn in any order of the names."""
    asked = parameters(space)
    config = {name: data.draw(_value(values)) for name, values in asked.items()}
    point = decode(space, config)
    assert point.counts in space.sets
    given = dict(point.settings)
    assert set(given) == {*space.choices, *space.ranges}
    assert all(given[key] in values for key, values in space.choices.items())
    assert all(each.low <= given[key] <= each.high for key, each in space.ranges.items())
    assert decode(space, dict(reversed(config.items()))) == point


@settings(max_examples=60, deadline=None)
@given(spaces())
def test_every_point_can_be_drawn(space: Space) -> None:
    """For each set there are parameters that decode to it: weight 1 for its counts, 0 for the others."""
    asked = parameters(space)
    rest = {name: values[0] if isinstance(values, tuple) else values.low for name, values in asked.items()}
    for counts in space.sets:
        chosen = {"size": len(counts), "set": "+".join(map(str, counts)), **{f"weight.{k}": float(k in counts) for k in space.pool}}
        assert decode(space, {**rest, **{name: value for name, value in chosen.items() if name in asked}}).counts == counts


def test_of_equal_weights_the_smaller_count_comes_first() -> None:
    """A tie has one outcome, whatever the order of the names."""
    space = space_of(_experiment(counts=[8, 16, 32]))
    config: Mapping[str, Any] = {"weight.32": 0.5, "weight.16": 0.5, "weight.8": 0.5, "size": 2}
    assert decode(space, config).counts == (8, 16)
    assert decode(space, {**config, "weight.32": 0.6}).counts == (8, 32)


def test_parameters_name_each_count() -> None:
    """A size and a weight for each count of a pool; one choice among named sets, or where there is one set; settings by their keys."""
    assert parameters(space_of(_experiment(counts=[8, 16], settings=RATES))) == {
        "size": (1, 2),
        "weight.8": Range(0.0, 1.0),
        "weight.16": Range(0.0, 1.0),
        "recipe.ptapt.learning_rate": (1e-4, 5e-4),
    }
    assert list(parameters(space_of(_experiment(counts=[8, 16], sizes=[1])))) == ["weight.8", "weight.16"]
    assert parameters(space_of(_experiment(counts=[8, 16], sizes=[2]))) == {"set": ("8+16",)}
    assert parameters(space_of(_experiment(sets=[[8], [8, 16]]))) == {"set": ("8", "8+16")}


def test_ends_and_variations() -> None:
    """Every combination of choices and ends of ranges once; key by key, what differs in that key alone."""
    asked = {**RATES, "ptapt.steps": {"low": 1, "high": 9}}
    space = space_of(_experiment(counts=[8, 16], settings=asked))
    found = [dict(point.settings) for point in ends(space)]
    assert found == [{"ptapt.learning_rate": rate, "ptapt.steps": steps} for rate in (1e-4, 5e-4) for steps in (1, 9)]
    assert {point.counts for point in ends(space)} == {(8, 16)}
    varied = variations(space)
    assert [dict(point.settings) for point in varied["ptapt.steps"]] == [
        {"ptapt.learning_rate": 1e-4, "ptapt.steps": each} for each in (1, 9)
    ]
    assert [dict(point.settings)["ptapt.steps"] for point in varied["ptapt.learning_rate"]] == [1, 1]
