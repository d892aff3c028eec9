"""Presets and variants of a recipe that is none of speech: layers, departures, sentences, storage, and the graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, load_experiment
from jobs.experiment.launched import Corpus, launch
from jobs.experiment.recipes import (
    MethodRecipe,
    comparable,
    comparison_sentences,
    departures,
    method_recipes,
    recipe_sentences,
    training_sentences,
)
from jobs.experiment.stored_config import resolved_values, restore_experiment
from jobs.store.layout import Layout
from tests.jobs.fake_registry import FakeCall, FakeRegistry


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass
class Training:
    epochs: int = 15
    colour: Colour = Colour.red
    options: dict[str, Any] = field(default_factory=dict)
    stripes: list[Colour] = field(default_factory=list)


@dataclass
class Painting:
    not_of_preset: ClassVar[tuple[str, ...]] = ("preset", "speed")

    preset: str = "plain"
    training: Training = field(default_factory=Training)
    rate: float = 1e-4
    speed: int = 1


class PaintRegistry(FakeRegistry):
    """Stages of the fake registry whose settings are the recipe's."""

    def calls(self, method: str, recipe: Painting) -> Callable[[str, int], FakeCall]:
        settings = {"epochs": recipe.training.epochs, "colour": recipe.training.colour.name}
        return lambda fold, seed: FakeCall("finetune", settings, fold, seed)


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    files = {
        "site/default.yaml": "{}",
        "recipe/plain.yaml": "training: {colour: red}",
        "recipe/bright.yaml": "training: {colour: blue}\nrate: 0.1",
        "experiment/walls.yaml": (
            "corpus: demo\nmethods: [vft, long, blue]\nseeds: 2\nrecipe: {training: {epochs: 3}}\n"
            "variants:\n"
            "  long: {method: vft, label: Long V-FT, recipe: {training: {epochs: 9}}}\n"
            "  blue: {method: tapt, recipe: {preset: bright, rate: 0.2}}\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def walls(configs: Path, *overrides: str) -> Experiment:
    return load_experiment("walls", list(overrides), configs=configs, recipe_schema=Painting)


def test_layers_of_a_variant(configs: Path) -> None:
    """Preset, experiment, overrides, then the variant's own settings; a variant may name another preset."""
    chosen = walls(configs, "recipe.training.options={a: 1}")
    long, blue = (chosen.variants[name].recipe for name in ("long", "blue"))
    assert (long.preset, long.training.epochs, long.training.colour, long.rate) == ("plain", 9, Colour.red, 1e-4)
    assert (blue.preset, blue.training.epochs, blue.training.colour, blue.rate) == ("bright", 3, Colour.blue, 0.2)
    assert long.training.options == blue.training.options == {"a": 1}
    assert chosen.recipe.training.epochs == 3
    assert walls(configs, "recipe.preset=bright").variants["long"].recipe.rate == 0.1
    assert restore_experiment(json.loads(json.dumps(resolved_values(chosen))), recipe_schema=Painting) == chosen


def test_every_departure_is_named(configs: Path) -> None:
    """Settings that differ from the preset, whatever layer they come from; not those that the schema excludes."""
    found = method_recipes(walls(configs, "recipe.speed=4").recipes, configs)
    assert found == (
        MethodRecipe("vft", "plain", ("training.epochs=3",)),
        MethodRecipe("long", "plain", ("training.epochs=9",)),
        MethodRecipe("blue", "bright", ("training.epochs=3", "rate=0.2")),
    )
    assert departures(Painting(rate=1e-5, training=Training(options={"a": 1})), {}) == ["training.options={...}", "rate=1e-05"]
    assert departures(Painting(), {}) == []
    striped = Painting(training=Training(stripes=[Colour.red, Colour.blue]))
    assert departures(striped, {}) == ["training.stripes=[red, blue]"]
    assert departures(striped, {"training": {"stripes": ["red", "blue"]}}) == []


def test_sentences() -> None:
    """One for equal recipes; else one with what is each method's own and one with what all depart in."""
    same = [MethodRecipe(name, "plain", ("a=1",)) for name in ("vft", "tapt")]
    assert recipe_sentences(same, {}) == ("Recipe: preset plain with a=1.",)
    other = [MethodRecipe("vft", "plain", ("a=1",)), MethodRecipe("long", "bright", ("a=1", "b=2"))]
    assert recipe_sentences(other, {"long": "Long"}) == (
        "Recipes: vft: preset plain; Long: preset bright with b=2.",
        "In all recipes: a=1.",
    )
    assert recipe_sentences([MethodRecipe("vft", "plain", ())], {}) == ("Recipe: preset plain.",)
    assert recipe_sentences([], {}) == ()


def test_methods_with_the_same_settings_are_named_together() -> None:
    """Twelve methods on parts of the data do not repeat one list twelve times."""
    parts = [
        MethodRecipe(name, "plain", ("part=2",) if "half" in name else (), (name[:3],), ("rate=1",))
        for name in ("vft", "vft-half", "tap-half")
    ]
    assert recipe_sentences(parts, {"vft": "V-FT"}) == ("Recipes: V-FT: preset plain; vft-half, tap-half: preset plain with part=2.",)
    assert training_sentences(parts, {"vft": "V-FT"}) == (
        "Trained: V-FT, vft-half: vft | tap-half: tap.",
        "Differs from the published code also in: rate=1.",
    )


def test_methods_are_compared_within_settings_that_the_schema_names(configs: Path) -> None:
    """The rate of this one: methods at the default agree, another value is a group of its own; tables name the key."""

    class ByRate(Painting):
        compared_within: ClassVar[tuple[str, ...]] = ("rate",)

    recipes = method_recipes({"one": ByRate(), "two": ByRate(speed=4), "fast": ByRate(rate=0.1), "other": ByRate(rate=0.1)}, configs)
    assert [each.compared_within for each in recipes] == [(), (), ("rate=0.1",), ("rate=0.1",)]
    pairs = [("one", "two"), ("fast", "other"), ("one", "fast"), ("one", "unknown")]
    assert [comparable(recipes, *pair) for pair in pairs] == [True, True, False, True]
    assert comparison_sentences(recipes) == ("Compared are methods with the same recipe.rate.",)
    assert comparison_sentences(recipes[2:]) == comparison_sentences(recipes[:2]) == ()


def test_settings_that_no_method_reads_are_no_departures(configs: Path) -> None:
    """Those that one method reads are departures of all methods that have them."""

    class Reading(Painting):
        def reads(self, method: str) -> tuple[str, ...]:
            return ("rate",) if method == "vft" else ("training",)

    long = Training(epochs=9)
    alone = method_recipes({"vft": Reading(rate=0.1, training=long)}, configs)
    assert [each.departures for each in alone] == [("rate=0.1",)]
    both = method_recipes({"vft": Reading(rate=0.1, training=long), "mine": Reading(training=long)}, configs, {"mine": "tapt"})
    assert [set(each.departures) for each in both] == [{"training.epochs=9", "rate=0.1"}, {"training.epochs=9"}]


def test_sentences_on_the_training() -> None:
    """What is trained and what departs from the published code: once for equal recipes, else for each method; nothing if not known."""
    tapt = MethodRecipe("tapt", "plain", (), ("model m", "TAPT", "15 epochs"), ("rate=1",))
    vft = MethodRecipe("vft", "plain", (), ("model m", "15 epochs"), ("rate=1",))
    assert training_sentences([vft, tapt], {}) == (
        "Trained: model m; 15 epochs; TAPT.",
        "Differs from the published code also in: rate=1.",
    )
    own = MethodRecipe("long", "published", ("epochs=9",), ("model m", "9 epochs"), ())
    assert training_sentences([vft, own], {"long": "Long"}) == (
        "Trained: vft: model m; 15 epochs | Long: model m; 9 epochs.",
        "Differs from the published code also in: vft: rate=1 | Long: nothing.",
    )
    assert training_sentences([MethodRecipe("vft", "plain", ())], {}) == ()
    named = MethodRecipe("vft", "published", ("rate=1",), (), ("rate=1",))
    assert training_sentences([named], {}) == (), "the sentence on the preset names it"


def test_variants_are_rows_of_one_grid(configs: Path) -> None:
    """Each has its own stages where its settings differ; equal settings share a stage."""
    corpus, layout = Corpus("demo", "d", ("1",), "/nowhere"), Layout(Path("/nowhere"), "walls")
    graph = launch(walls(configs), corpus, PaintRegistry(), layout).graph
    assert [run.name for run in graph.runs] == [f"{method}/1/{slot}" for method in ("vft", "long", "blue") for slot in (0, 1)]
    assert len(graph.nodes) == 6
    equal = launch(walls(configs, "variants.long.recipe.training.epochs=3"), corpus, PaintRegistry(), layout).graph
    assert len(equal.nodes) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variants.long.method=vtf", r"variants.long.method: 'vtf' is unknown; did you mean 'vft'\?"),
        ("variants.vft={method: vft}", "variants.vft: is the name of a method"),
        ("methods=[vft,lng]", r"methods: 'lng' is unknown; did you mean 'long'\?"),
        ("variants.a/b={method: vft}", "variants.a/b in .*: use letters"),
        (
            "variants.long.recipe.training.epoch=1",
            r"unknown key 'variants.long.recipe.training.epoch' in variants.long: did you mean 'variants.long.recipe.training.epochs'\?",
        ),
        ("variants.long.recipe.rate=fast", "recipe.rate in variants.long"),
        ("variants.blue.recipe.preset=grey", "no preset 'grey'"),
        ("variants.long.recipe=fast", "variants.long.recipe: expected settings"),
    ],
)
def test_bad_variants_are_refused_in_one_line(configs: Path, override: str, message: str) -> None:
    corpus, layout = Corpus("demo", "d", ("1",), "/nowhere"), Layout(Path("/nowhere"), "walls")
    with pytest.raises(UsageError, match=message) as refused:
        launch(walls(configs, override), corpus, PaintRegistry(), layout)
    assert len(str(refused.value).splitlines()) == 1
