"""What a sweep searches is declared by the recipe: no module of the job system names a method, a proxy or a setting of the recipe."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import Experiment
from jobs.sweeps.space import swept_method
from ser_core.registry import AUDIO, METHODS
from ser_core.settings.recipe import Recipe

ROOT = Path(__file__).resolve().parents[3]
SWEPT = Recipe.swept
# The other methods, `text` and `score`, are ordinary words of tables and columns.
NAMES = {*AUDIO, SWEPT.label, SWEPT.counts, "training_loss", "entropy", *(column.name for column in SWEPT.proxies)}


@dataclass
class PlainRecipe:
    """A recipe without a method to sweep."""

    steps: int = 1


def literals(module: Path) -> set[str]:
    """The text constants of a module, without docstrings."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
    return {node.value for node in constants if isinstance(node.value, str)}


@pytest.mark.parametrize("package", ["store", "control", "worker", "local", "slurm", "tables", "sweeps"])
def test_job_system_names_no_method_and_no_proxy(package: str) -> None:
    """No text constant contains such a name, alone or as a word of a longer text such as a caption."""
    modules = sorted((ROOT / "jobs" / package).rglob("*.py"))
    assert modules
    found = {
        (module.name, name) for module in modules for text in literals(module) for name in NAMES if name in text.replace(",", " ").split()
    }
    assert found == set()


def test_a_recipe_without_a_swept_method_is_an_error_in_one_line() -> None:
    """It names the recipe and the missing attribute."""
    with pytest.raises(UsageError, match=r"^sweep: the recipe PlainRecipe declares no method to sweep .*`swept`"):
        swept_method(Experiment(name="e", corpus="c", recipe=PlainRecipe()))


def test_the_swept_method_is_one_of_the_registry() -> None:
    """Its key of cluster counts is one of the recipe."""
    assert SWEPT.name in METHODS
    section, key = SWEPT.counts.split(".")
    assert getattr(getattr(Recipe(), section), key)
