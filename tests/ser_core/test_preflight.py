"""What is refused before a launch because a corpus is too small for a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ser_core.corpora.manifest import Manifest, Utterance, load_manifest, write_manifest
from ser_core.errors import InputError
from ser_core.preflight import corpus_problems
from ser_core.registry import REGISTRY
from ser_core.settings.backbone import BackboneSettings, Wav2vecSettings
from ser_core.settings.recipe import Recipe
from ser_core.stages.states import validation_split

FOLDS = {"1": (), "2": (), "3": ()}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Fold 1 has ten utterances of a quarter of a second, fold 2 six, fold 3 four: without fold 1 ten are left, the fewest."""
    sizes = {"1": 10, "2": 6, "3": 4}
    spoken = [
        Utterance(f"{fold}-{number}", f"{fold}-{number}.flac", 4000, ("angry", "sad")[number % 2], f"speaker of {fold}", fold)
        for fold, count in sizes.items()
        for number in range(count)
    ]
    return write_manifest(tmp_path, "small", list(sizes), spoken)


def recipe(**sizes: Any) -> Recipe:
    found = Recipe(backbone=BackboneSettings(checkpoint=None, config={"hidden_size": 16}))
    found.states.wav2vec = Wav2vecSettings(config={"conv_feature_layers": [[8, 10, 5], [8, 8, 4]]})
    found.finetune.batch_size = sizes.get("finetune", 10)
    found.states.batch_size = sizes.get("states", 9)
    found.cluster.counts = sizes.get("counts", [8])
    return found


def test_a_recipe_that_fits_has_no_problem(manifest: Manifest) -> None:
    """A batch may hold all training utterances of the smallest fold, of `states` all without the validation part."""
    assert len(validation_split(10, 0.1, 0)[0]) == 9
    assert not list(corpus_problems("ptapt", recipe(), manifest, FOLDS))


@pytest.mark.parametrize(
    ("method", "sizes", "expected"),
    [
        ("vft", {"finetune": 11}, "recipe.finetune.batch_size=11: more than the 10 training utterances of fold '1' of small; at most 10"),
        (
            "ptapt",
            {"states": 10},
            "recipe.states.batch_size=10: more than the 9 training utterances of fold '1' of small without the validation part; at most 9",
        ),
        ("ptapt", {"counts": [8, 5000]}, "recipe.cluster.counts=[8, 5000]: 5000 clusters are more than the"),
    ],
)
def test_what_does_not_fit_is_named_with_its_fold(manifest: Manifest, method: str, sizes: dict[str, Any], expected: str) -> None:
    """One line: the setting, the fold with the least, and the limit. The registry raises it."""
    (line,) = corpus_problems(method, recipe(**sizes), manifest, FOLDS)
    assert line.startswith(expected)
    with pytest.raises(InputError) as caught:
        REGISTRY.check_corpus(manifest.folder, [(method, recipe(**sizes)), (method, recipe(**sizes))], FOLDS)
    assert caught.value.problems == (line,)


def test_the_number_of_frames_is_the_largest_cluster_count(manifest: Manifest) -> None:
    """As many clusters as frames are accepted, one more is refused."""
    frames = REGISTRY.training_frames(manifest.folder, recipe(), "1")
    assert not list(corpus_problems("ptapt", recipe(counts=[frames]), manifest, FOLDS))
    assert list(corpus_problems("ptapt", recipe(counts=[frames + 1]), manifest, FOLDS))


def test_only_folds_and_methods_of_the_experiment_count(manifest: Manifest) -> None:
    """Fold 3 trains on sixteen utterances; V-FT has no clusters and no emotion states."""
    assert not list(corpus_problems("vft", recipe(finetune=16, states=999, counts=[9999]), manifest, {"3": ()}))
    assert list(corpus_problems("vft", recipe(finetune=16), manifest, FOLDS))


def test_a_corpus_of_one_fold_is_one_line(tmp_path: Path) -> None:
    """Nothing is left to train on."""
    only = write_manifest(tmp_path, "one", ["1"], [Utterance("a", "a.flac", 4000, "sad", "x", "1")])
    assert list(corpus_problems("ptapt", recipe(), load_manifest(only.folder), {"1": ()})) == [
        "one: no utterances to train on when fold '1' is held out"
    ]
