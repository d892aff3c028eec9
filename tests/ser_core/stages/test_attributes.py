"""Fine-tuning on valence, activation and dominance: learnt, scored and written; equal in parts; refused where a corpus lacks them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from ser_core.corpora.manifest import DIMENSIONS, Manifest, Utterance, write_manifest
from ser_core.errors import InputError
from ser_core.keyed import keyed
from ser_core.registry import REGISTRY
from ser_core.settings.finetune import AttributeSettings, FinetuneSettings
from ser_core.settings.recipe import Recipe
from ser_core.stages.finetune import Finetuning, Part
from ser_core.training.attributes import AttributeTask, nearest_class_logits
from ser_core.training.concordance import ccc
from tests.ser_core.stages.conftest import Bench, curves
from tests.ser_core.stages.test_relief import DROPOUTS
from tests.ser_core.stages.test_teams import Teams, close

FOLDS = ("1", "2")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """160 sounds of two speakers: valence and activation are the shares of two tones, dominance of both; two have no attributes."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(3)
    utterances = []
    for number in range(160):
        low, high = rng.uniform(size=2)
        time = np.arange(int(rng.integers(1_600, 3_200))) / 16_000
        wave = 0.1 * sum(
            share * np.sin(2 * np.pi * (pitch * time + rng.uniform())) for share, pitch in ((low, 900), (high, 2200), (0.5, 5000))
        )
        path = f"audio/tone{number:03d}.flac"
        soundfile.write(folder / path, wave, 16_000, subtype="PCM_16")
        fold = FOLDS[number % 2]
        triple = None if number // 2 == 7 else (1 + 4 * low, 1 + 4 * high, 1 + 2 * (low + high))
        label = "angry" if low > 0.5 else "sad"
        utterances.append(Utterance(f"tone{number:03d}", path, len(time), label, f"speaker{fold}", fold, triple))
    return write_manifest(folder, "planted", FOLDS, utterances)


@pytest.fixture
def tones(planted: Manifest, tmp_path: Path) -> Bench:
    return Bench(planted.folder, tmp_path)


def with_attributes(recipe: Recipe, weight: float) -> Recipe:
    recipe.finetune.attributes = AttributeSettings(weight=weight)
    recipe.finetune.batch_size = 16
    return recipe


def learning(recipe: Recipe, weight: float) -> Recipe:
    """A recipe under which the planted attributes are learnt in a second or two."""
    recipe.backbone.config |= {"feat_extract_norm": "layer", "layerdrop": 0.0, "hidden_dropout": 0.0, "hidden_size": 32}
    recipe.finetune.spec_augment.time_probability = recipe.finetune.spec_augment.feature_probability = 0.0
    recipe.finetune.spec_augment.feature_minimum = 0
    recipe.finetune.epochs, recipe.finetune.learning_rate = 16, 3e-3
    return with_attributes(recipe, weight)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_planted_attributes_are_learnt(weight: float, recipe: Recipe, tones: Bench, planted: Manifest) -> None:
    """The CCC of the held-out fold is far above chance, and that of the file; alone, the class is the nearest in the attributes."""
    result, output = tones.run(REGISTRY.call("vft", learning(recipe, weight), fold="1", seed=0))
    metrics = result["metrics"]
    assert result["diverged"] == ""
    assert metrics["ccc"] > 0.35
    assert metrics["ccc"] == pytest.approx(np.mean([metrics[f"ccc_{name}"] for name in DIMENSIONS]))
    with (output / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics["test_utterances"] == metrics["test_attributes"] + 1 == 80
    rng = np.random.default_rng(0)
    known = [row for row in rows if row["valence"]]
    for name in DIMENSIONS:
        true, predicted = (np.array([float(row[column]) for row in known]) for column in (name, f"predicted_{name}"))
        assert ccc(predicted, true) == pytest.approx(metrics[f"ccc_{name}"], abs=1e-4)
        assert 2 < predicted.mean() < 4  # in the scale of the corpus
        assert max(ccc(predicted, rng.permutation(true)) for _ in range(50)) < metrics["ccc"]  # chance
    assert ("train/accuracy" in curves(output)) == ("training_accuracy" in metrics) == (weight < 1)
    assert metrics["wa"] == np.mean([row["label"] == row["predicted"] for row in rows])
    if weight == 1:
        training = planted.training("1")
        means = {label: np.mean([u.dimensions for u in training if u.label == label and u.dimensions], axis=0) for label in planted.classes}
        width = np.std([u.dimensions for u in training if u.dimensions], axis=0)
        for row in rows:
            own = np.array([float(row[f"predicted_{name}"]) for name in DIMENSIONS])
            assert row["predicted"] == min(means, key=lambda label: float((((own - means[label]) / width) ** 2).sum()))


@pytest.mark.slow
def test_parts_and_processes_give_the_numbers_of_the_whole_batch(recipe: Recipe, tones: Bench, tmp_path: Path) -> None:
    """Curves and metrics of batches in one part, of batches in parts after memory ran out, and in parts of one in two processes."""
    recipe.backbone.config |= dict.fromkeys(DROPOUTS, 0.0)
    recipe.finetune.epochs, recipe.execution.log_every = 1, 1
    whole, output = tones.run(REGISTRY.call("vft", with_attributes(recipe, 0.3), fold="1", seed=0))
    recipe.execution.micro_batch = 3
    relieved, other = tones.run(REGISTRY.call("vft", recipe, fold="1", seed=0), relief=1)
    recipe.execution.micro_batch = 1
    shared, third = Teams(tones, tmp_path, REGISTRY.call("vft", recipe, fold="1", seed=0)).by(2)
    losses = dict(curves(output)["train/loss"])
    assert len(set(losses.values())) == whole["metrics"]["steps"] == 5
    for result, folder in ((relieved, other), (shared, third)):
        close(dict(curves(folder)["train/loss"]), losses)
        assert result["metrics"] == pytest.approx(whole["metrics"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_the_sums_of_a_step_have_the_dropout_of_its_loss(recipe: Recipe, tones: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every part the first pass, without gradient, sums the predictions that the second pass takes the loss of, bit for bit."""
    recipe.backbone.config |= dict.fromkeys(DROPOUTS, 0.3)
    recipe.finetune.epochs, recipe.execution.micro_batch = 1, 5
    seen: dict[int, list[Tensor]] = {}
    summed = Finetuning._attribute_sums

    def noted(self: Finetuning, outputs: Tensor, part: Part, task: AttributeTask) -> Tensor:
        found = summed(self, outputs, part, task)
        seen.setdefault(id(part), []).append(found.detach())
        kept.append(part)
        return found

    kept: list[Part] = []  # so that no other part gets the same id
    monkeypatch.setattr(Finetuning, "_attribute_sums", noted)
    tones.run(REGISTRY.call("vft", with_attributes(recipe, 0.5), fold="1", seed=0))
    assert len(seen) == 5 * 4
    for first, second in seen.values():
        assert torch.equal(first, second)


def test_what_is_refused(recipe: Recipe, corpus: Manifest, planted: Manifest) -> None:
    """At planning: a corpus, or a fold, without attributes, a batch of one, a weight that is none. Nothing where the weight is 0."""
    folds: dict[str, tuple[str, ...]] = {"1": (), "2": ()}

    def refused(manifest: Manifest) -> str:
        with pytest.raises(InputError) as caught:
            REGISTRY.check_corpus(manifest.folder, [("vft", recipe)], folds)
        (line,) = caught.value.problems
        return line

    REGISTRY.check_corpus(corpus.folder, [("vft", recipe)], folds)
    with_attributes(recipe, 0.5).finetune.batch_size = 8
    assert refused(corpus) == (
        "recipe.finetune.attributes.weight=0.5: utterances to train on in fold '1' of noise that have valence, activation, dominance: 0, "
        "at least 2 are needed; prepare a corpus that has them (docs/corpora.md), or set the weight to 0"
    )
    REGISTRY.check_corpus(planted.folder, [("vft", recipe)], folds)
    recipe.finetune.batch_size = 1
    assert "batch_size must be at least 2" in refused(planted)
    recipe.finetune.attributes.weight = 1.5
    with pytest.raises(InputError, match=r"recipe.finetune.attributes.weight=1.5: must lie between 0 and 1"):
        REGISTRY.check(recipe)


def test_a_fold_without_attributes_is_refused(recipe: Recipe, planted: Manifest, tmp_path: Path) -> None:
    """It could be trained on, and not be tested on."""
    moved = [replace(each, dimensions=each.dimensions if each.fold == "1" else None) for each in planted.utterances]
    with pytest.raises(InputError, match="utterances to test on in fold '2' of half that have valence, activation, dominance: 0,"):
        REGISTRY.check_corpus(write_manifest(tmp_path, "half", FOLDS, moved).folder, [("vft", with_attributes(recipe, 1.0))], {"2": ()})


def test_the_nearest_class() -> None:
    """Equidistant predictions have equal logits; a class whose training utterances have no attributes is never predicted."""
    training = [
        Utterance("a", "a", 1, "angry", "x", "1", (1.0, 2.0, 2.0)),
        Utterance("b", "b", 1, "sad", "x", "1", (3.0, 2.0, 2.0)),
        Utterance("c", "c", 1, "happy", "x", "1"),
    ]
    logits = nearest_class_logits(np.array([[2.0, 2, 2], [1.0, 2, 2], [9.0, 2, 2]]), training, ("angry", "happy", "sad"))
    assert logits[0, 0] == logits[0, 2]
    assert logits.argmax(axis=1).tolist()[1:] == [0, 2]
    assert logits[1].tolist() == [0, -np.inf, -2]  # the standard deviation is 1


def test_keys(recipe: Recipe) -> None:
    """At weight 0 the settings of the stage are those of before; otherwise they are part of the key of `finetune` only."""
    assert "attributes" not in keyed(FinetuneSettings())
    before = REGISTRY.call("tapt", recipe, fold="1", seed=0)
    after = REGISTRY.call("tapt", with_attributes(recipe, 0.5), fold="1", seed=0)
    assert after.settings["finetune"]["attributes"] == {"weight": 0.5}
    assert before.upstream == after.upstream
    assert recipe.trained("vft")[-1] == "fine-tuning of 3 epochs on classes and attributes (1 - CCC, weight 0.5)"
