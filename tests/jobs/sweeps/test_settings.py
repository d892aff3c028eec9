"""The section `sweep` of an experiment: defaults, ranges, dotted and nested keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, load_experiment
from jobs.experiment.stored_config import resolved_values, restore_experiment
from jobs.experiment.sweep_section import Search, Stopping, SweepSettings, flat, merged
from tests.jobs.sweeps.fake_registry import Recipe


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    for folder in ("experiment", "site"):
        (tmp_path / folder).mkdir()
    (tmp_path / "site" / "default.yaml").write_text("{}\n")
    (tmp_path / "experiment" / "small.yaml").write_text(
        "corpus: demo\nsweep:\n  sizes: [1]\n  settings:\n    ptapt.learning_rate: [1e-4, 5e-4]\n    ptapt: {steps: [1, 2]}\n"
    )
    return tmp_path


def _load(configs: Path, *overrides: str) -> Experiment:
    return load_experiment("small", overrides, configs=configs, recipe_schema=Recipe, methods=("vft", "tapt", "ptapt"))


def test_defaults_and_layers(configs: Path) -> None:
    """Defaults of the schema; names of enums; an override replaces the value of the file."""
    sweep = _load(configs, "sweep.search=random", "sweep.stopping=none", "sweep.sizes=[2]").sweep
    assert (sweep.search, sweep.stopping, sweep.sizes) == (Search.random, Stopping.none, [2])
    assert (sweep.seeds, sweep.trials, sweep.counts, sweep.sets) == (2, 16, [], [])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sweep.settings.ptapt.learning_rate=[0.1]", [0.1]),
        ("sweep.settings={ptapt.learning_rate: [0.1]}", [0.1]),
        ("sweep.settings.ptapt={learning_rate: [0.1]}", [0.1]),
        ("sweep.settings.ptapt.learning_rate={low: 1, high: 2}", {"low": 1, "high": 2}),
        ("sweep.settings.ptapt.learning_rate=null", None),
        ('sweep.settings.ptapt.learning_rate=["${recipe.ptapt.learning_rate}"]', [1e-3]),
    ],
)
def test_overrides_match_nested_and_dotted_keys(configs: Path, override: str, expected: object) -> None:
    """Dotted or nested: one key, whose last writing counts, list or range; keys beside it stay."""
    assert _load(configs, override).sweep.settings == {"ptapt.learning_rate": expected, "ptapt.steps": [1, 2]}


def test_a_range_is_changed_key_by_key(configs: Path) -> None:
    """One end of it by an override; choices take the place of all of it."""
    file = configs / "experiment" / "small.yaml"
    file.write_text("corpus: demo\nsweep: {settings: {ptapt: {steps: {low: 1, high: 9}}}}\n")
    assert _load(configs, "sweep.settings.ptapt.steps.high=5").sweep.settings == {"ptapt.steps": {"low": 1, "high": 5}}
    assert _load(configs, "sweep.settings.ptapt.steps=[5]").sweep.settings == {"ptapt.steps": [5]}


@pytest.mark.parametrize(
    ("stated", "overrides", "expected"),
    [
        ("counts: [2, 4], sizes: [1]", ["sweep.sets=[[2],[2,8]]"], ([], [], [[2], [2, 8]])),
        ("counts: [2, 4], sizes: [1]", ["sweep.sets=[]", "sweep.sizes=[2]"], ([2, 4], [2], [])),
        ("sets: [[2]]", ["sweep.counts=[2,4]"], ([2, 4], [], [])),
        ("sets: [[2]]", ["sweep.sizes=[1]"], ([], [1], [])),
        ("sets: [[2]]", ["sweep.counts=[2,4]", "sweep.sets=[[8]]"], ([2, 4], [], [[8]])),
        ("counts: '${recipe.cluster.counts}'", ["sweep.sets=[[2]]"], ([], [], [[2]])),
    ],
)
def test_listed_sets_and_a_pool_replace_each_other(configs: Path, stated: str, overrides: list[str], expected: tuple[object, ...]) -> None:
    """An override replaces the sets of the file; both in one place are kept, and refused later."""
    (configs / "experiment" / "small.yaml").write_text(f"corpus: demo\nsweep: {{{stated}}}\n")
    sweep = _load(configs, *overrides).sweep
    assert (sweep.counts, sweep.sizes, sweep.sets) == expected


def test_nested_keys_are_flattened() -> None:
    """A mapping with a key of a range is a range, any other a section; the later of two equal keys counts."""
    settings = {"a.b": [1], "a": {"c": {"low": 1, "high": 2}, "d": {"e.f": [2]}}, "g": None, "empty": {}}
    assert flat(settings) == {"a.b": [1], "a.c": {"low": 1, "high": 2}, "a.d.e.f": [2], "g": None}
    assert flat({"a.b": [1], "a": {"b": [2]}}) == {"a.b": [2]}
    assert merged({"a": {"low": 1, "high": 2}, "b": [1]}, {"a": {"high": 3}, "b": {"low": 1}}) == {
        "a": {"low": 1, "high": 3},
        "b": {"low": 1},
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sweep.search=bayes", "sweep.search in KEY=VALUE: Invalid value 'bayes', expected one of [grid, random, optuna]"),
        ("sweep.stopping=median", "expected one of [asha, none]"),
        ("sweep.serch=grid", "unknown key 'sweep.serch' in KEY=VALUE: did you mean 'sweep.search'?"),
        ("sweep.trials=0", "sweep.trials out of range: 0; allowed: 1 or more, at most 4096"),
        ("sweep.seeds=0", "sweep.seeds out of range: 0; allowed: 1 or more, at most 1000"),
        ("sweep.seed=-1", "sweep.seed out of range"),
        ("sweep.grace_folds=0", "sweep.grace_folds out of range"),
        ("sweep.reduction=1", "sweep.reduction out of range: 1; allowed: 2 or more"),
        ("sweep.at_once=-1", "sweep.at_once out of range"),
        ("sweep.restarts=20", "unknown key 'sweep.restarts' in KEY=VALUE"),
        ("sweep.resources.nodes=2", "unknown key 'sweep.resources' in KEY=VALUE"),
        ("sweep.counts=[a]", "sweep.counts[0] in KEY=VALUE"),
        ("sweep.counts={a: 16}", "KEY=VALUE: expected a list in brackets"),
        ("sweep=null", "sweep in KEY=VALUE"),
        ("sweep=[1]", "KEY=VALUE"),
        ("sweep.settings=[1]", "sweep.settings: write keys of the recipe"),
        ("sweep.settings=null", "sweep.settings: write keys of the recipe"),
    ],
)
def test_a_wrong_value_is_one_line(configs: Path, override: str, expected: str) -> None:
    """Which key, what is wrong, what is allowed."""
    with pytest.raises(UsageError) as caught:
        _load(configs, override)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stored_experiment_keeps_its_sweep(configs: Path) -> None:
    """Sets, choices and ranges come back as they were launched."""
    experiment = _load(configs, "sweep.sets=[[2],[2,4]]", "sweep.settings.ptapt.learning_rate={low: 1, high: 2, log: true}")
    assert restore_experiment(json.loads(json.dumps(resolved_values(experiment))), recipe_schema=Recipe) == experiment


def test_experiments_of_versions_in_which_a_sweep_had_an_allocation_are_read(configs: Path) -> None:
    """The keys of the allocation are left out; any other unknown key is still refused."""
    experiment = _load(configs)
    values = json.loads(json.dumps(resolved_values(experiment)))
    former = {**values["sweep"], "restarts": 20, "resources": {"nodes": 1, "cpus": 8, "gpus": 1, "memory_gb": 48.0, "minutes": 1440}}
    assert restore_experiment({**values, "sweep": former}, recipe_schema=Recipe) == experiment
    with pytest.raises(UsageError, match="launch `grid` again"):
        restore_experiment({**values, "sweep": {**former, "other": 1}}, recipe_schema=Recipe)


def test_experiments_without_a_sweep_section_are_read(configs: Path) -> None:
    """A stored configuration without the section, or without a key of it, has the defaults."""
    experiment = _load(configs)
    values = resolved_values(experiment)
    del values["sweep"]
    restored = restore_experiment(json.loads(json.dumps(values)), recipe_schema=Recipe)
    assert restored.sweep == SweepSettings()
    assert (restored.corpus, restored.recipe) == (experiment.corpus, experiment.recipe)
    assert restore_experiment({**values, "sweep": {}}, recipe_schema=Recipe) == restored
