"""Recipes that follow a preset of configs/recipe."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from ser_core.settings.recipe import Recipe

FOLDER = Path(__file__).parents[2] / "configs" / "recipe"


def with_preset(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the values of a preset; settings that no preset has stay."""
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(recipe), OmegaConf.load(FOLDER / f"{name}.yaml")))
    assert isinstance(merged, Recipe)
    return merged
