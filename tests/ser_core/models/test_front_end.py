"""Features belong to an utterance, not to its batch, unless the reference padding is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ser_core.models.backbone import build_backbone, frame_count, minimum_samples
from ser_core.models.classifier import EmotionClassifier
from ser_core.models.front_end import project_independent, project_padded, run_front_end
from ser_core.models.model_types import NORMALISE_KEY
from ser_core.settings.backbone import BackboneSettings, Padding
from ser_core.settings.execution import Attention
from ser_core.settings.finetune import Pooling
from tests.ser_core.models import rebuild

OTHERS: list[dict[str, Any]] = [
    {},
    {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
    {"conv_dim": [8, 16], "conv_kernel": [12, 5], "conv_stride": [7, 3], "num_feat_extract_layers": 2},
]


def model_of(**changes: Any) -> Any:
    model = build_backbone(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, **changes}))
    rebuild.fill(dict(model.named_parameters()), seed=1)
    return model


def waves() -> list[Tensor]:
    return [torch.from_numpy(wave) for wave in rebuild.waves()]


@pytest.mark.slow
@pytest.mark.parametrize("changes", OTHERS)
def test_independent_features(changes: dict[str, Any]) -> None:
    """An utterance's features are the same to the bit alone, in a batch, and in another order; as many as frame_count says."""
    model, batch = model_of(**changes), waves()
    together = project_independent(model, batch)
    backwards = project_independent(model, batch[::-1])[::-1]
    for wave, features, again in zip(batch, together, backwards, strict=True):
        alone = project_independent(model, [wave])[0]
        assert features.shape == (frame_count(model.config, len(wave)), 32)
        assert torch.equal(features, alone)
        assert torch.equal(features, again)
        assert not features.requires_grad


def test_reference_padding_reaches_the_features() -> None:
    """Zero padding through the group norm changes the shorter utterances' features, and only theirs."""
    model, batch = model_of(), waves()
    independent = project_independent(model, batch)
    padded, frames = project_padded(model, batch)
    assert frames.tolist() == [len(features) for features in independent]
    differences = [
        float((padded[row, :n] - independent[row]).abs().max() / independent[row].abs().max()) for row, n in enumerate(frames.tolist())
    ]
    assert differences[0] < 1e-5
    assert min(differences[1:]) > 0.01


def test_layer_norm_models_are_independent_of_padding() -> None:
    """Without a norm over time both ways give the same features."""
    model, batch = model_of(feat_extract_norm="layer"), waves()
    padded, frames = project_padded(model, batch)
    for row, features in enumerate(project_independent(model, batch)):
        torch.testing.assert_close(padded[row, : int(frames[row])], features, rtol=1e-4, atol=1e-5)


def test_logits_do_not_depend_on_the_batch() -> None:
    """From waves to logits: the same utterance alone and beside longer ones."""
    model = model_of()
    classifier = EmotionClassifier(model.wav2vec2, 4, Pooling.paper).eval()
    features = project_independent(model, waves())
    frames = torch.tensor([len(f) for f in features])
    together = classifier(pad_sequence(features, batch_first=True), frames)
    for row, one in enumerate(features):
        torch.testing.assert_close(classifier(one[None], frames[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-5)


def test_cached_features_are_not_modified() -> None:
    """The transformer never writes into the features it is given: they may come from a cache."""
    model = model_of()
    features, frames = project_padded(model, waves())
    before = features.clone()
    mask = torch.from_numpy(rebuild.time_mask())
    classifier = EmotionClassifier(model.wav2vec2, 4)
    for training in (False, True):
        classifier.train(training)(features, frames, mask if training else None)
        assert torch.equal(features, before)


def test_eager_and_sdpa_agree() -> None:
    """Both attention kernels give the same logits, padding included."""
    logits = []
    for attention in Attention:
        model = build_backbone(BackboneSettings(checkpoint=None, config=rebuild.BACKBONE), attention=attention)
        rebuild.fill(dict(model.named_parameters()), seed=1)
        classifier = EmotionClassifier(model.wav2vec2, 4)
        rebuild.fill(dict(classifier.head.named_parameters()), seed=3)
        logits.append(classifier.eval()(*project_padded(model, waves())))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", OTHERS)
def test_clip_below_one_frame(changes: dict[str, Any]) -> None:
    """A clip too short for one frame, even an empty one, counts as one frame, in both paddings and with gradient."""
    model = model_of(**changes)
    shortest = minimum_samples(model.config)
    clips = [torch.zeros(0), torch.randn(shortest - 1), torch.randn(shortest)]
    assert [features.shape[0] for features in project_independent(model, clips)] == [1, 1, 1]
    assert project_padded(model, clips)[1].tolist() == [1, 1, 1]
    assert run_front_end(model, clips, Padding.independent).frames.tolist() == [1, 1, 1]
    classifier = EmotionClassifier(model.wav2vec2, 4, Pooling.reference).eval()
    assert bool(torch.isfinite(classifier(*project_padded(model, clips))).all())


def test_with_gradient() -> None:
    """`run_front_end` gives the same features as the frozen ways, zero behind each row, and reaches the first convolution."""
    model, batch = model_of(), waves()
    for padding in Padding:
        result = run_front_end(model, batch, padding)
        if padding is Padding.independent:
            for row, features in enumerate(project_independent(model, batch)):
                torch.testing.assert_close(result.projected[row, : len(features)], features, rtol=1e-5, atol=1e-6)
                assert not result.projected[row, len(features) :].any()
        else:
            torch.testing.assert_close(result.projected, project_padded(model, batch)[0], rtol=1e-5, atol=1e-6)
        model.zero_grad()
        torch.autograd.backward(result.projected.sum())
        assert float(model.wav2vec2.feature_extractor.conv_layers[0].conv.weight.grad.abs().sum()) > 0


def test_normalised_waves() -> None:
    """With normalised waves the features do not depend on loudness."""
    model = model_of(feat_extract_norm="layer")
    wave = waves()[0]
    plain = project_independent(model, [wave, 3 * wave + 0.1])
    assert not torch.allclose(plain[0], plain[1], rtol=1e-2)
    setattr(model.config, NORMALISE_KEY, True)
    first, second = project_independent(model, [wave, 3 * wave + 0.1])
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
