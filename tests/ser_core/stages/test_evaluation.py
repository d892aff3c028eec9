from __future__ import annotations

import numpy as np
import pytest
import torch

from ser_core.corpora.manifest import Manifest
from ser_core.errors import Diverged, Interrupted
from ser_core.features.features import FrozenFeatures
from ser_core.models.backbone import load_encoder
from ser_core.models.classifier import EmotionClassifier
from ser_core.settings.backbone import Padding
from ser_core.settings.execution import FeatureCache, Precision
from ser_core.settings.finetune import Pooling
from ser_core.settings.recipe import Recipe
from ser_core.training.device import choose_arithmetic
from ser_core.training.evaluate import predict
from ser_core.training.progress import Progress
from ser_core.training.splits import Split


@pytest.fixture
def model(recipe: Recipe) -> EmotionClassifier:
    torch.manual_seed(0)
    return EmotionClassifier(load_encoder(recipe.backbone), 2, Pooling.paper)


@pytest.fixture
def split(corpus: Manifest) -> Split:
    return Split(corpus, corpus.test("1"))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_batch_of_the_test_gives_the_logits_of_each_utterance_alone(norm: str, recipe: Recipe, split: Split) -> None:
    """Batches by length, padded in the transformer only, change no logit beyond rounding; order is that of the split."""
    recipe.backbone.config["feat_extract_norm"] = norm
    torch.manual_seed(0)
    model = EmotionClassifier(load_encoder(recipe.backbone), 2)
    alone = predict(model, split, 1)
    assert np.allclose(predict(model, split, 8), alone, rtol=1e-4, atol=1e-5)
    assert np.ptp(alone[:, 0]) > 1e-3  # utterances differ, so a wrong order would be seen
    assert np.allclose(predict(model, split.subset([3, 1]), 2), alone[[3, 1]], rtol=1e-4, atol=1e-5)


def test_the_test_uses_no_dropout(model: EmotionClassifier, split: Split) -> None:
    model.train()
    assert np.array_equal(predict(model, split, 4), predict(model, split, 4))


def test_logits_that_are_not_finite_are_divergence(model: EmotionClassifier, split: Split) -> None:
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(Diverged):
        predict(model, split, 4)


def features(model: EmotionClassifier, split: Split, padding: Padding, cache: FeatureCache, samples: int | None = None) -> FrozenFeatures:
    arithmetic = choose_arithmetic(torch.device("cpu"), Precision.float32)
    found = FrozenFeatures(model.wav2vec2, split, samples, padding, cache, arithmetic)
    found.fill(lambda: False, Progress(lambda line: None))
    return found


def test_features_do_not_depend_on_the_batch_nor_on_the_cache(model: EmotionClassifier, split: Split) -> None:
    """To the bit, group norm or not; with `reference` padding they do depend on it."""
    kept = features(model, split, Padding.independent, FeatureCache.memory)
    fresh = features(model, split, Padding.independent, FeatureCache.none)
    together, frames = kept.padded([0, 1, 2])
    again, _ = fresh.padded([0, 1, 2])
    assert torch.equal(together, again)
    for row, position in enumerate([0, 1, 2]):
        alone, count = fresh.padded([position])
        assert int(count) == int(frames[row])
        assert torch.equal(alone[0], together[row, : int(count)])
    padded = features(model, split, Padding.reference, FeatureCache.memory)
    shortest = int(frames.argmin())
    together, _ = padded.padded([0, 1, 2])
    alone, count = padded.padded([shortest])
    assert not torch.allclose(alone[0], together[shortest, : int(count)], atol=1e-4)


def test_features_are_cut_as_waves_first_and_as_frames_then(model: EmotionClassifier, split: Split) -> None:
    """`max_samples` cuts the waveform; a crop of frames is part of the features of what is left."""
    cut = features(model, split, Padding.independent, FeatureCache.memory, 4_000)
    whole, frames = cut.padded([0, 2])
    assert frames.max() <= 4_000 // 320 < min(split.samples[0], split.samples[2]) // 320
    part, counts = cut.padded([0, 2], [(2, 5), (0, 3)])
    assert counts.tolist() == [5, 3]
    assert torch.equal(part[0], whole[0, 2:7])
    assert torch.equal(part[1, :3], whole[1, :3])
    assert not part[1, 3:].any()


def test_filling_the_cache_can_be_stopped(model: EmotionClassifier, split: Split) -> None:
    found = FrozenFeatures(
        model.wav2vec2, split, None, Padding.independent, FeatureCache.memory, choose_arithmetic(torch.device("cpu"), Precision.float32)
    )
    with pytest.raises(Interrupted):
        found.fill(lambda: True, Progress(lambda line: None))


def test_kept_samples_are_those_of_the_file(corpus: Manifest) -> None:
    """16 bit in memory, the same float32 numbers out; a split knows its own utterances only."""
    split = Split(corpus, corpus.training("2"))
    for position in range(len(split)):
        assert torch.equal(split.wave(position), split.wave(position, keep=False))
        assert torch.equal(split.wave(position), Split(corpus, corpus.training("2")).wave(position, keep=False))
        assert len(split.wave(position)) == split.samples[position]
    assert {utterance.fold for utterance in split.utterances} == {"1"}
    assert [corpus.classes[label] for label in split.labels] == [utterance.label for utterance in split.utterances]
    assert sum(split.class_counts()) == len(split)
