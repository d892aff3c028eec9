"""Stages that train on a part of the utterances: what is in their keys, and that no stage opens another training recording."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ser_core.corpora.manifest import Manifest, load_manifest
from ser_core.corpora.subsets import subset
from ser_core.errors import InputError
from ser_core.registry import AUDIO, METHODS, REGISTRY, StageCall
from ser_core.settings.recipe import Recipe
from tests.ser_core.stages.conftest import Bench, artifacts


def all_calls(call: StageCall) -> list[StageCall]:
    return [call, *(each for parent in call.upstream.values() for each in all_calls(parent))]


@pytest.mark.parametrize("method", METHODS)
def test_the_fraction_is_a_setting_of_every_stage(method: str, recipe: Recipe) -> None:
    """And of none where it is 1: these stages are those of an experiment that knows no fractions."""
    recipe.training_fraction = 0.5
    assert {call.settings["training_fraction"] for call in all_calls(REGISTRY.call(method, recipe, fold="1", seed=0))} == {0.5}
    recipe.training_fraction = 1.0
    assert not any("training_fraction" in call.settings for call in all_calls(REGISTRY.call(method, recipe, fold="1", seed=0)))


@pytest.mark.slow
@pytest.mark.parametrize("method", AUDIO)
def test_every_stage_opens_recordings_of_the_subset_only(method: str, corpus: Manifest, recipe: Recipe, tmp_path: Path) -> None:
    """Where the other training recordings do not exist the numbers are the same; the whole held-out fold is tested."""
    recipe.training_fraction = 0.5
    call = REGISTRY.call(method, recipe, fold="1", seed=0)
    kept = {utterance.id for utterance in subset(corpus, "1", corpus.training("1"), 0.5)}
    assert len(kept) == 4
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.folder, folder)
    for utterance in load_manifest(folder).training("1"):
        if utterance.id not in kept:
            (folder / utterance.audio).unlink()
    result, output = Bench(folder, tmp_path / "part").run(call)
    assert result["metrics"]["training_utterances"] == len(kept)
    assert result["metrics"]["test_utterances"] == len(corpus.test("1"))
    whole, other = Bench(corpus.folder, tmp_path / "whole").run(call)
    assert (whole["metrics"], artifacts(other)) == (result["metrics"], artifacts(output))
    recipe.training_fraction = 1.0
    with pytest.raises(InputError, match=r"audio/utterance\d+\.flac"):  # so the recordings are gone indeed
        Bench(folder, tmp_path / "again").run(REGISTRY.call(method, recipe, fold="1", seed=0))


def test_the_frames_that_are_clustered_are_of_the_subset(corpus: Manifest, recipe: Recipe, tmp_path: Path) -> None:
    """The pseudo-labels of P-TAPT are for its utterances, and for no others."""
    recipe.training_fraction = 0.5
    ptapt = REGISTRY.call("ptapt", recipe, fold="1", seed=0).upstream["backbone"]
    _, output = Bench(corpus.folder, tmp_path).run(ptapt.upstream["clusters.2"])
    found = json.loads((output / "utterances.json").read_text())
    assert found == [utterance.id for utterance in subset(corpus, "1", corpus.training("1"), 0.5)]


def test_what_cannot_be_computed_is_refused_before_it_is_launched(corpus: Manifest, recipe: Recipe) -> None:
    """A fraction that leaves a class without utterances, by the corpus; one out of range, and one in a sweep, without it."""
    recipe.training_fraction, recipe.finetune.batch_size = 0.5, 4
    REGISTRY.check_corpus(corpus.folder, [("vft", recipe)], {"1": ()})
    with pytest.raises(InputError, match="a sweep trains on all utterances"):
        REGISTRY.check_corpus(corpus.folder, [("vft", recipe)], {"1": ("speaker2",)})
    recipe.finetune.batch_size = 5
    with pytest.raises(InputError, match=r"batch_size=5: more than the 4 training utterances"):
        REGISTRY.check_corpus(corpus.folder, [("vft", recipe)], {"1": ()})
    recipe.training_fraction = 0.125
    with pytest.raises(InputError, match=r"without a training utterance of class '(angry|sad)' when fold '1' of noise"):
        REGISTRY.check_corpus(corpus.folder, [("vft", recipe)], {"1": ()})
    for wrong in (0.0, -0.5, 1.5, float("nan")):
        recipe.training_fraction = wrong
        with pytest.raises(InputError, match=r"recipe\.training_fraction=.*: must be above 0 and at most 1"):
            REGISTRY.check(recipe)
