"""The presets of the recipe in configs/recipe: what they set, that `paper` is the default, and that experiments can select them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, load_experiment
from jobs.experiment.launched import Corpus, launch
from jobs.experiment.recipes import method_recipes
from jobs.store.layout import Layout
from ser_core.keyed import plain
from ser_core.registry import REGISTRY
from ser_core.settings.recipe import Recipe

CONFIGS = Path(__file__).parents[1] / "configs"
CORPUS = Corpus("iemocap", "d" * 64, tuple("12345"), "/nowhere")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def preset(name: str) -> dict[str, Any]:
    return flat(yaml.safe_load((CONFIGS / "recipe" / f"{name}.yaml").read_text()))


def experiment(*overrides: str, name: str = "iemocap") -> Experiment:
    return load_experiment(name, list(overrides), configs=CONFIGS, recipe_schema=Recipe, methods=REGISTRY.methods)


def test_the_paper_preset_is_the_default_of_the_schema() -> None:
    """Every value of configs/recipe/paper.yaml is that of ser_core/settings, so a recipe without a preset follows it too."""
    defaults = flat(plain(Recipe()))
    assert Recipe().preset == "paper"
    assert preset("paper") == {key: defaults[key] for key in preset("paper")}


def test_both_presets_set_the_same_keys() -> None:
    """Selecting a preset leaves nothing of the other, and `published` differs in all that is not the minimum of `states`."""
    paper, published = preset("paper"), preset("published")
    assert paper.keys() == published.keys()
    assert {key for key in paper if paper[key] == published[key]} == {"states.spec_augment.time_minimum"}


@pytest.mark.slow
def test_an_experiment_selects_a_preset_and_overrides_single_settings() -> None:
    chosen = experiment("recipe.preset=published", "recipe.features.padding=independent")
    values = flat(plain(chosen.recipe))
    assert {key: values[key] for key in preset("published")} == {**preset("published"), "features.padding": "independent"}
    (vft, *_) = method_recipes(chosen.recipes, CONFIGS)
    assert (vft.preset, vft.departures) == ("published", ("features.padding=independent",))
    assert {each.departures for each in method_recipes(experiment().recipes, CONFIGS)} == {()}


def test_what_is_trained_and_how_it_differs_from_the_published() -> None:
    """Backbone, lengths and k of each method; the preset `published` differs in nothing, `paper` in every setting that they disagree on."""
    chosen = experiment("recipe.preset=published", "recipe.finetune.epochs=1", "recipe.cluster.counts=[8,32]", "recipe.tapt.steps=9")
    vft, tapt, ptapt = method_recipes(chosen.recipes, CONFIGS)
    model, *_ = vft.trained
    assert vft.trained == (model, "fine-tuning of 1 epoch")
    assert tapt.trained == (model, "TAPT of 9 steps", "fine-tuning of 1 epoch")
    assert ptapt.trained == (model, f"P-TAPT of {chosen.recipe.ptapt.steps} steps on k = 8, 32", "fine-tuning of 1 epoch")
    assert "features.padding=independent" not in vft.unlike_published
    paper, *_ = method_recipes(experiment().recipes, CONFIGS)
    assert {"features.padding=independent", "finetune.head.pooling=paper", "tapt.drop_last=false"} <= set(paper.unlike_published)
    as_variant = method_recipes({"mine": chosen.recipe}, CONFIGS, {"mine": "ptapt"})[0]
    assert as_variant.trained == ptapt.trained


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"recipe.preset: no preset 'publshed' .*; did you mean 'published'\?"):
        experiment("recipe.preset=publshed")


def test_the_preset_is_not_part_of_a_key_and_its_settings_are() -> None:
    """The settings of `published` written out one by one give the stages of the preset."""
    methods = "methods=[vft,tapt]"
    spelled = [f"recipe.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in preset("published").items()]

    def keys(*overrides: str) -> set[str]:
        return set(launch(experiment(methods, *overrides), CORPUS, REGISTRY, Layout(Path("/nowhere"), "x")).graph.nodes)

    assert keys("recipe.preset=published") == keys(*spelled)
    assert not keys("recipe.preset=published") & keys()
