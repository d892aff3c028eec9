"""What adaptors can learn and a frozen transformer's mean cannot: whether the two halves of an utterance have the same pitch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from ser_core.corpora.manifest import Manifest, Utterance, write_manifest
from ser_core.registry import REGISTRY
from ser_core.settings.backbone import SpecAugmentSettings
from ser_core.settings.finetune import Adaptor, AdaptorSettings, HeadKind, HeadSettings
from ser_core.settings.recipe import Recipe
from tests.ser_core.stages.conftest import FOLDS, Bench

PITCHES = (500, 1500)
EACH = 96  # utterances of a fold; chance has a standard deviation of 5 points
CHANCE, BY_CHANCE = 50.0, 20.0
GAIN = 15.0  # points of UA; 40 were measured


def pairs(folder: Path, *, shuffled: bool) -> Manifest:
    """Two tones one after the other, of the same pitch or of both. In either class the pitches are equally frequent.

    The mean of an utterance of `other` lies halfway between those of the two kinds of `same`: no linear function of it tells them apart.
    """
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    found = []
    for number in range(2 * EACH):
        first, is_same = number % 2, bool(number // 2 % 2)
        second = first if is_same else 1 - first
        length = int(rng.integers(1_600, 2_600))
        time = np.arange(length) / 16_000
        tones = [np.sin(2 * np.pi * (PITCHES[each] * rng.uniform(0.97, 1.03) * time + rng.uniform())) for each in (first, second)]
        wave = 0.1 * rng.uniform(0.8, 1.2) * np.concatenate(tones) + 0.02 * rng.standard_normal(2 * length)
        path = f"audio/pair{number:03d}.flac"
        soundfile.write(folder / path, wave, 16_000, subtype="PCM_16")
        fold = FOLDS[number // EACH]
        found.append((f"pair{number:03d}", path, 2 * length, "same" if is_same else "other", f"speaker{fold}", fold))
    labels = [each[3] for each in found]
    if shuffled:
        labels = [labels[place] for place in rng.permutation(len(labels))]
    utterances = [Utterance(*each[:3], label, *each[4:]) for each, label in zip(found, labels, strict=True)]
    return write_manifest(folder, "pairs", FOLDS, utterances)


def score(recipe: Recipe, kind: Adaptor, corpus: Manifest, folder: Path) -> tuple[float, float]:
    """UA of the held-out fold in percent, and the share of correct training predictions."""
    recipe.finetune.adaptors = AdaptorSettings(kinds=[kind], lora_rank=4, lora_alpha=4.0)
    metrics = Bench(corpus.folder, folder).run(REGISTRY.call("vft", recipe, fold="1", seed=0))[0]["metrics"]
    return 100 * metrics["ua"], metrics["training_accuracy"]


@pytest.mark.slow
def test_adaptors_beat_the_frozen_head_where_they_can(recipe: Recipe, tmp_path: Path) -> None:
    """LoRA learns to compare the halves, a linear head on frozen features does not; with shuffled labels neither is above chance."""
    recipe.backbone.config |= {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "conv_dim": [32, 32]}
    recipe.backbone.config |= {"feat_extract_norm": "layer", "conv_bias": True}  # each frame alone
    recipe.backbone.config |= dict.fromkeys(("layerdrop", "hidden_dropout", "attention_dropout", "activation_dropout"), 0.0)
    recipe.finetune.epochs, recipe.finetune.batch_size = 40, 32
    recipe.finetune.learning_rate, recipe.finetune.clip_norm = 0.01, 1.0
    recipe.finetune.spec_augment = SpecAugmentSettings(time_probability=0.0, time_minimum=0, feature_probability=0.0, feature_minimum=0)
    recipe.finetune.head = HeadSettings(kind=HeadKind.projector, projector_units=8)  # linear in the mean
    for name in ("true", "shuffled"):
        (tmp_path / name).mkdir()
    corpus = pairs(tmp_path / "true", shuffled=False)
    head, lora = (score(recipe, kind, corpus, tmp_path / kind.name)[0] for kind in (Adaptor.head, Adaptor.lora))
    by_chance, fitted = score(recipe, Adaptor.lora, pairs(tmp_path / "shuffled", shuffled=True), tmp_path / "chance")
    assert lora - head >= GAIN
    assert head - CHANCE <= BY_CHANCE
    assert abs(by_chance - CHANCE) <= BY_CHANCE
    assert fitted > 0.75  # it learnt the training labels by heart
