"""Emotion states: their grid, what is trained, and a loss that adds up."""

from __future__ import annotations

import torch

from ser_core.models.classifier import class_weights, label_weight
from ser_core.models.fairseq_checkpoint import build_wav2vec
from ser_core.models.shapes import Wav2vecConfig, extractor_frames, minimum_samples, state_count
from ser_core.models.states import EmotionStates, states_loss
from ser_core.settings.backbone import Wav2vecSettings
from tests.ser_core.models import rebuild


def states() -> EmotionStates:
    return EmotionStates(build_wav2vec(Wav2vecSettings(config=rebuild.WAV2VEC)), 4, rebuild.RNN_UNITS, rebuild.HEAD_UNITS)


def test_counts() -> None:
    """Counts are those of the network, from the shortest wave on; wav2vec large has 98 frames and 48 states a second."""
    model = states().eval()
    config = model.wav2vec.config
    for samples in (minimum_samples(config), minimum_samples(config) + 1, 2900, 4100):
        wave = torch.randn(samples)
        assert model.frames(wave).shape == (state_count(config, samples), 24)
        assert model.wav2vec.extractor(wave[None]).shape[2] == extractor_frames(config, samples)
    assert state_count(config, minimum_samples(config)) == 1
    assert state_count(config, minimum_samples(config) - 1) == 0
    large = Wav2vecConfig()
    assert (extractor_frames(large, 16000), state_count(large, 16000)) == (98, 48)


def test_strided_aggregator() -> None:
    """The count holds for aggregators that stride too."""
    config = {**rebuild.WAV2VEC, "conv_aggregator_layers": [[20, 5, 2], [20, 3, 1]], "skip_connections_agg": False}
    model = EmotionStates(build_wav2vec(Wav2vecSettings(config=config)), 4, 4, 4).eval()
    for samples in (minimum_samples(model.wav2vec.config), 2900, 2901, 4100):
        assert len(model.frames(torch.randn(samples))) == state_count(model.wav2vec.config, samples) > 0


def test_short_clip() -> None:
    """A clip too short for one state, even an empty one, has one."""
    model = states().eval()
    assert [len(model.frames(torch.randn(n))) for n in (0, 10, 200)] == [1, 1, 1]


def test_what_is_trained() -> None:
    """Everything but the extractor."""
    model = states().train()
    utterance, frame = model(torch.randn(2, 2900))
    torch.autograd.backward(states_loss(utterance, frame, torch.tensor([0, 1]), class_weights([1, 1, 1, 1])).loss)
    for name, parameter in model.named_parameters():
        expected = not name.startswith("wav2vec.extractor.")
        assert parameter.requires_grad == expected == (parameter.grad is not None), name


def test_masks_reach_the_states() -> None:
    """Masking all frames or all channels leaves nothing of the wave: both give the states of silence after the extractor."""
    model = states().eval()
    waves = torch.randn(2, 2900)
    length = extractor_frames(model.wav2vec.config, 2900)
    by_time = model.states(waves, torch.ones(2, length, dtype=torch.bool))
    by_channel = model.states(waves, None, torch.ones(2, 20, dtype=torch.bool))
    assert torch.equal(by_time, by_channel)
    assert not torch.equal(by_time, model.states(waves))


def test_parts_add_up() -> None:
    """Losses of parts of a batch, each told the whole's label weight, sum to the whole's."""
    model, weights = states().eval(), class_weights([1, 2, 3, 4])
    labels, waves = torch.tensor([0, 3, 1, 2, 2]), torch.randn(5, 2900)
    utterance, frame = model(waves)
    whole = states_loss(utterance, frame, labels, weights).loss
    total = label_weight(labels, weights)
    parts = sum(states_loss(utterance[p], frame[p], labels[p], weights, total).loss for p in (slice(0, 2), slice(2, 5)))
    torch.testing.assert_close(parts, whole)
