"""All losses hold under bfloat16 autocast, the arithmetic of training on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ser_core.models.backbone import build_backbone
from ser_core.models.classifier import EmotionClassifier, class_weights, weighted_cross_entropy
from ser_core.models.fairseq_checkpoint import build_wav2vec
from ser_core.models.front_end import project_padded
from ser_core.models.ptapt import PseudoLabelModel, ptapt_loss
from ser_core.models.states import EmotionStates, states_loss
from ser_core.models.tapt import draw_tapt, tapt_loss
from ser_core.settings.backbone import BackboneSettings, Wav2vecSettings
from ser_core.settings.pretraining import NegativeFrames
from tests.ser_core.models import rebuild

LABELS = torch.tensor(rebuild.LABELS)
WEIGHTS = class_weights(rebuild.CLASS_COUNTS)


def waves() -> list[Tensor]:
    return [torch.from_numpy(wave) for wave in rebuild.waves()]


def backbone() -> Any:
    model = build_backbone(BackboneSettings(checkpoint=None, config=rebuild.BACKBONE))
    rebuild.fill(dict(model.named_parameters()), seed=1)
    return model


def both(compute: Any, model: torch.nn.Module, tolerance: float) -> None:
    """Compute a loss with and without autocast; they must be near, and the gradient of the second finite and of float32."""
    exact = compute().detach()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute()
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach() / exact) - 1) < tolerance
    torch.autograd.backward(loss)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.dtype == torch.float32 and bool(torch.isfinite(gradient).all()) for gradient in gradients)


@pytest.mark.slow
def test_finetune() -> None:
    """The classifier's loss."""
    model = EmotionClassifier(backbone().wav2vec2, 4).train()
    features, frames = project_padded(model.wav2vec2, waves())
    mask = torch.from_numpy(rebuild.time_mask())
    both(lambda: weighted_cross_entropy(model(features, frames, mask), LABELS, WEIGHTS), model, 0.02)


def test_features_that_are_projected_under_autocast() -> None:
    """They are bfloat16, and the transformer takes them: what is not a matrix product is computed in float32."""
    model = EmotionClassifier(backbone().wav2vec2, 4).eval()
    both(lambda: weighted_cross_entropy(model(*project_padded(model.wav2vec2, waves())), LABELS, WEIGHTS), model, 0.02)


def test_tapt() -> None:
    """The contrastive loss; codes are drawn from rounded logits, so that some differ."""
    model = backbone().eval()
    rngs = [np.random.default_rng(0)]
    draw = draw_tapt(model.config, np.array(rebuild.FRAMES), minimum=2, negatives=50, negative_frames=NegativeFrames.valid, rngs=rngs)
    both(lambda: tapt_loss(model, waves(), draw).loss, model, 0.05)


def test_ptapt() -> None:
    """The pseudo-label loss."""
    model = PseudoLabelModel(backbone().wav2vec2, rebuild.CLUSTERS, rebuild.HEAD_UNITS).train()
    features, frames = project_padded(model.wav2vec2, waves())
    mask = torch.from_numpy(rebuild.time_mask())
    labels = torch.from_numpy(rebuild.pseudo_labels(mask.numpy()))
    both(lambda: ptapt_loss(model(features, frames, mask), labels, mask).loss, model, 0.02)


def test_states() -> None:
    """The emotion states' loss."""
    model = EmotionStates(build_wav2vec(Wav2vecSettings(config=rebuild.WAV2VEC)), 4, rebuild.RNN_UNITS, rebuild.HEAD_UNITS).train()
    crops = torch.stack([wave[: rebuild.STATES_SAMPLES] for wave in waves()])

    def loss() -> Tensor:
        utterance, frame = model(crops)
        return states_loss(utterance, frame, LABELS, WEIGHTS).loss

    both(loss, model, 0.02)
