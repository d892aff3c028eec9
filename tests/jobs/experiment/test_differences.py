"""How a launch differs from the one before, and which key makes a stage new."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.experiment.config import Experiment, load_experiment
from jobs.experiment.differences import new_stage_lines, setting_differences
from jobs.experiment.graph import Graph
from jobs.experiment.launched import Corpus, last_launch, launch, store
from jobs.experiment.stored_config import resolved_values
from jobs.store.layout import Layout
from ser_core.registry import REGISTRY
from ser_core.settings.recipe import Recipe
from tests.command_line import ROOT

CORPUS = Corpus("emodb", "d1", ("1", "2"), "/nowhere")


def experiment(*overrides: str) -> Experiment:
    return load_experiment("emodb", overrides, configs=ROOT / "configs", recipe_schema=Recipe, methods=REGISTRY.methods)


def graph(*overrides: str, digest: str = "d1") -> Graph:
    corpus = Corpus("emodb", digest, ("1", "2"), "/nowhere")
    return launch(experiment(*overrides), corpus, REGISTRY, Layout(Path("/nowhere"), "emodb")).graph


def reasons(*overrides: str, digest: str = "d1") -> list[str]:
    """Lines for a launch with these settings after one without."""
    before, now = graph(), graph(*overrides, digest=digest)
    typed = [each.key for each in setting_differences({}, resolved_values(experiment()))]
    return new_stage_lines(before, now, [key for key in now.nodes if key not in before.nodes], typed)


def test_settings_that_differ() -> None:
    """Keys as they are typed, with both values; a key that one side lacks; secrets by name only; long values cut."""
    before = {"seeds": 5, "methods": ["vft"], "slurm": {"environment": {"TOKEN": "a"}}, "resources": {"tapt": {"gpus": 1}}, "same": {}}
    now: Mapping[str, Any] = {
        "seeds": 3,
        "methods": ["vft", "tapt"],
        "slurm": {"environment": {"TOKEN": "b"}},
        "resources": {},
        "same": {},
        "recipe": {"long": "x" * 100},
    }
    found = [str(each) for each in setting_differences(before, now, secret=("slurm.environment",))]
    assert found[:3] == ["seeds: 5 -> 3", "methods: [vft] -> [vft, tapt]", "slurm.environment.TOKEN: (not shown) -> (not shown)"]
    assert "resources.tapt.gpus: 1 -> not set" in found
    assert next(each for each in found if each.startswith("recipe.long")).endswith("x...")
    assert not setting_differences(before, before)


@pytest.mark.slow
def test_a_stage_is_new_for_its_own_key_or_for_that_of_a_stage_upstream() -> None:
    """The key as it is typed, with both values; fine-tunings of a method that depends on it repeat the reason of the pretraining."""
    assert reasons("recipe.finetune.epochs=13") == [
        f"new: finetune {method}, 6 stages: recipe.finetune.epochs 12 -> 13" for method in ("vft", "tapt", "ptapt")
    ]
    assert reasons("recipe.tapt.steps=81") == [
        f"new: {stage} tapt, {count} stages: recipe.tapt.steps 80 -> 81" for stage, count in (("tapt", 2), ("finetune", 6))
    ]
    (*_, last) = reasons("recipe.cluster.iterations=21")
    assert last == "new: finetune ptapt, 6 stages: recipe.cluster.iterations 20 -> 21"


@pytest.mark.slow
def test_seeds_folds_methods_and_the_corpus() -> None:
    assert reasons("seeds=4", "methods=vft") == ["new: finetune vft, 2 stages: seed 3 is new"]
    assert {line.partition(": ")[2].partition(": ")[2] for line in reasons(digest="d2")} == {"corpus digest d1 -> d2"}
    before = graph("methods=vft", "folds=1")
    typed = ("recipe.finetune.epochs",)
    assert new_stage_lines(before, graph("methods=vft"), list(graph("methods=vft").nodes), typed) == [
        "new: finetune vft, 3 stages: fold 2 is new"
    ]
    with_tapt = graph("methods=[vft,tapt]", "folds=1")
    assert new_stage_lines(before, with_tapt, list(with_tapt.nodes), typed) == [
        "new: tapt tapt, 1 stage: method tapt is new",
        "new: finetune tapt, 3 stages: method tapt is new",
    ]
    assert reasons() == []


def test_the_last_launch_is_read_with_its_stages(tmp_path: Path) -> None:
    """None before the first; without stages if this version of the program does not know one of its settings."""
    layout = Layout(tmp_path, "emodb")
    assert last_launch(layout, REGISTRY, Recipe) is None
    store(launch(experiment("seeds=2"), CORPUS, REGISTRY, layout))
    found = last_launch(layout, REGISTRY, Recipe)
    assert found is not None
    assert found.graph is not None
    assert (found.values["seeds"], set(found.graph.nodes)) == (2, set(graph("seeds=2").nodes))
    text = layout.experiment_file.read_text()
    layout.experiment_file.write_text(text.replace('"upstream_seed"', '"upstream_number"'))
    changed = last_launch(layout, REGISTRY, Recipe)
    assert changed is not None
    assert changed.graph is None
