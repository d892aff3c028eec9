from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, OutlierRule, Policy, SlurmSite
from jobs.experiment.graph import Graph
from jobs.experiment.launched import Corpus, launch, relaunch, reopen, require_same_corpus, store
from jobs.experiment.recipes import Variant
from jobs.store.layout import Layout
from jobs.store.records import read_json, write_json
from tests.jobs.fake_registry import REGISTRY


def test_an_experiment_without_methods_is_refused(tmp_path: Path) -> None:
    """It would have no run, and so be complete at once."""
    experiment = Experiment(name="exp", corpus="fake")
    with pytest.raises(UsageError, match="methods: name at least one of"):
        launch(experiment, Corpus("fake", "d1", ("1",), str(tmp_path)), REGISTRY, Layout(tmp_path, "exp"))


def test_a_measurement_has_one_run_whatever_folds_and_seeds_there_are(tmp_path: Path) -> None:
    """Beside the runs of a method; one more fold, other seeds or another name need no other stage. A variant may measure too."""
    corpus, layout = Corpus("fake", "d1", ("1", "2"), str(tmp_path)), Layout(tmp_path, "exp")

    def launched(**changes: Any) -> Graph:
        return launch(Experiment(name="exp", corpus="fake", recipe={}, **changes), corpus, REGISTRY, layout).graph

    alone = launched(methods=["length"])
    assert [run.name for run in alone.runs] == ["length/all/0"]
    beside = launched(methods=["vft", "length", "again"], variants={"again": Variant("length", recipe={"work": 3})}, seeds=3, first_seed=7)
    assert [run.name for run in beside.runs][-3:] == ["vft/2/2", "length/all/0", "again/all/0"]
    assert beside.measurements == {"length", "again"}
    assert beside.runs[-2].key == alone.runs[0].key != beside.runs[-1].key
    assert len(beside.nodes) == 2 * 3 + 2
    with pytest.raises(UsageError, match=r"variants\.length: is the name of a method"):
        launched(methods=["vft"], variants={"length": Variant("vft", recipe={})})


class Readable:
    """Read by the fake registry as a mapping."""

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


@dataclass
class Recipe(Readable):
    """The settings of the stages."""

    epochs: int = 1
    former: int = 3


@dataclass
class LaterRecipe(Readable):
    """The same in a later version: one setting is added."""

    epochs: int = 1
    former: int = 3
    added: int = 7


@dataclass
class OtherRecipe(Readable):
    """The same in a version without one of the settings."""

    epochs: int = 1


TYPED = ("grid", "file", "name=exp", "seeds=2", "--results", "/project/my results")


def stored(folder: Path) -> Layout:
    """An experiment with two seeds and a setting that is not the default, launched and stored."""
    layout = Layout(folder / "results", "exp")
    experiment = Experiment(name="exp", corpus="fake", methods=["vft"], seeds=2, recipe=Recipe(epochs=5))
    store(launch(experiment, Corpus("fake", "d1", ("1",), str(folder)), REGISTRY, layout, "file", TYPED))
    return layout


def test_a_relaunch_has_the_stored_config(tmp_path: Path) -> None:
    """Settings, corpus and words of the last launch, with a later time; stored, it is the last launch."""
    layout = stored(tmp_path)
    first, again = reopen(layout, REGISTRY, Recipe), relaunch(layout, REGISTRY, Recipe)
    assert (again.experiment, again.corpus, again.config, again.typed) == (first.experiment, first.corpus, "file", TYPED)
    assert list(again.graph.nodes) == list(first.graph.nodes)
    assert again.since > first.since
    store(again)
    assert reopen(layout, REGISTRY, Recipe).since == again.since


def test_after_an_upgrade_a_relaunch_has_the_stored_config(tmp_path: Path) -> None:
    """A setting that was added has its default, other stages are no obstacle; a setting that is gone is, and the launch is named."""
    layout = stored(tmp_path)
    write_json(layout.experiment_file, {**(read_json(layout.experiment_file) or {}), "stages": "of other code"})
    assert reopen(layout, REGISTRY, LaterRecipe).changed
    again = relaunch(layout, REGISTRY, LaterRecipe)
    assert again.experiment.recipe == LaterRecipe(epochs=5, added=7)
    assert not again.changed
    launch_again = "`python launch.py grid file name=exp seeds=2 --results '/project/my results'` launches"
    with pytest.raises(UsageError, match=r"recipe\.former: written by another version") as caught:
        relaunch(layout, REGISTRY, OtherRecipe)
    assert launch_again in str(caught.value)


def test_a_record_without_the_words_of_its_launch_is_read(tmp_path: Path) -> None:
    """It was stored before they were recorded."""
    layout = stored(tmp_path)
    values: dict[str, Any] = read_json(layout.experiment_file) or {}
    write_json(layout.experiment_file, {key: value for key, value in values.items() if key != "typed"})
    assert relaunch(layout, REGISTRY, Recipe).typed == ()


@pytest.mark.parametrize(("stored_rule", "expected"), [("pooled", "common"), ("cell", "cell"), ("none", "none")])
def test_an_old_experiment_keeps_the_rule_of_its_launch(stored_rule: str, expected: str, tmp_path: Path) -> None:
    """`pooled` of a record from before each fold had its own scale is the rule that is now called `common`, also after a relaunch."""
    layout = stored(tmp_path)
    values: dict[str, Any] = read_json(layout.experiment_file) or {}
    del values["pooled"]
    values["config"]["policy"]["outliers"] = stored_rule
    write_json(layout.experiment_file, values)
    assert reopen(layout, REGISTRY, Recipe).experiment.policy.outliers.value == expected
    again = relaunch(layout, REGISTRY, Recipe)
    store(again)
    assert reopen(layout, REGISTRY, Recipe).experiment == again.experiment
    assert again.experiment.policy.outliers.value == expected


def test_the_default_rule_is_stored_with_its_version(tmp_path: Path) -> None:
    """What is launched now is judged by the present rule when it is read again."""
    assert reopen(stored(tmp_path), REGISTRY, Recipe).experiment.policy.outliers is OutlierRule.pooled


def test_a_corpus_that_was_prepared_again_is_refused(tmp_path: Path) -> None:
    """Stored settings with other recordings would be another experiment."""
    again = relaunch(stored(tmp_path), REGISTRY, Recipe)
    require_same_corpus(again, "d1", "`grid`")
    with pytest.raises(
        UsageError, match=r"corpus fake .* was prepared again since the launch \(digest d2, at the launch d1\): `grid` launches"
    ):
        require_same_corpus(again, "d2", "`grid`")


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, 0o644),
        ({"policy": Policy(webhook="https://example.org/s3cret")}, 0o600),
        ({"slurm": SlurmSite(environment={"TOKEN": "s3cret"})}, 0o600),
    ],
)
def test_settings_that_may_hold_secrets_are_readable_by_their_user_only(changes: dict[str, Any], mode: int, tmp_path: Path) -> None:
    """A launch again with or without them changes the mode."""
    layout = Layout(tmp_path, "exp")
    for before in ({}, {"policy": Policy(webhook="https://example.org/other")}):
        for given in (before, changes):
            experiment = Experiment(name="exp", corpus="fake", methods=["vft"], seeds=1, recipe={}, **given)
            store(launch(experiment, Corpus("fake", "d1", ("1",), str(tmp_path)), REGISTRY, layout))
        assert layout.experiment_file.stat().st_mode & 0o777 == mode
