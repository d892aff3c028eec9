"""Agreement with the authors' code, stage by stage, to 1e-4 relative; tests/ser_core/golden/README.md tells the values' origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ser_core.models.backbone import build_backbone
from ser_core.models.classifier import EmotionClassifier, class_weights, weighted_cross_entropy
from ser_core.models.fairseq_checkpoint import build_wav2vec
from ser_core.models.front_end import project_independent, project_padded
from ser_core.models.ptapt import PseudoLabelModel, ptapt_loss
from ser_core.models.states import EmotionStates, states_loss
from ser_core.models.tapt import TaptDraw, tapt_loss
from ser_core.settings.backbone import BackboneSettings, Padding, Wav2vecSettings
from ser_core.settings.execution import Attention
from ser_core.settings.finetune import Pooling
from tests.ser_core.models import rebuild

GOLDEN = Path(__file__).parents[1] / "golden"
RELATIVE = 1e-4


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def close(ours: Tensor | float, theirs: object) -> None:
    """Largest difference within 1e-4 of the largest value: relative to the tensor, so that entries near zero do not decide."""
    expected = np.asarray(theirs, dtype=np.float64)
    actual = ours.detach().double().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= RELATIVE * np.abs(expected).max()


def backbone(attention: Attention = Attention.eager) -> Any:
    model = build_backbone(BackboneSettings(checkpoint=None, config=rebuild.BACKBONE), attention=attention)
    rebuild.fill(dict(model.named_parameters()), seed=1)
    return model


def classifier(pooling: Pooling, attention: Attention = Attention.eager) -> EmotionClassifier:
    model = EmotionClassifier(backbone(attention).wav2vec2, len(rebuild.CLASS_COUNTS), pooling)
    rebuild.fill({f"head.{name}": parameter for name, parameter in model.head.named_parameters()}, seed=3)
    return model.eval()


def waves() -> list[Tensor]:
    return [torch.from_numpy(wave) for wave in rebuild.waves()]


def gradient_norm(parameters: Any) -> float:
    return float(torch.sqrt(sum((p.grad.double() ** 2).sum() for p in parameters if p.grad is not None)))


def test_class_weights() -> None:
    """Inverse frequencies, normalised to sum 1, are the authors'."""
    close(class_weights(rebuild.CLASS_COUNTS), golden("finetune")["class_weights"])


@pytest.mark.parametrize("attention", list(Attention))
def test_finetune_evaluation(attention: Attention) -> None:
    """Pooled features and logits of a zero-padded batch."""
    expected = golden("finetune")["finetune_evaluation"]
    model = classifier(Pooling.reference, attention)
    features, frames = project_padded(model.wav2vec2, waves())
    close(model.pooled(features, frames), expected["pooled"])
    close(model(features, frames), expected["logits"])


def test_finetune_alone() -> None:
    """Logits of the authors' evaluation, one utterance at a time, from a batch of independent features."""
    model = classifier(Pooling.reference)
    features = project_independent(model.wav2vec2, waves())
    frames = torch.tensor([len(f) for f in features])
    batch = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    close(model(batch, frames), golden("finetune")["finetune_alone"]["logits"])


def test_finetune_training() -> None:
    """Pooled features, logits, loss and gradient of a training step with given masks."""
    expected = golden("finetune")["finetune_training"]
    model = classifier(Pooling.reference).train()
    features, frames = project_padded(model.wav2vec2, waves())
    masks = torch.from_numpy(rebuild.time_mask()), torch.from_numpy(rebuild.feature_mask())
    close(model.pooled(features, frames, *masks), expected["pooled"])
    logits = model(features, frames, *masks)
    close(logits, expected["logits"])
    loss = weighted_cross_entropy(logits, torch.tensor(rebuild.LABELS), class_weights(rebuild.CLASS_COUNTS))
    close(loss, expected["loss"])
    torch.autograd.backward(loss)
    close(gradient_norm(model.wav2vec2.encoder.parameters()), expected["gradient_norm"])
    close(gradient_norm(model.head.parameters()), expected["gradient_norm_head"])
    assert not any(parameter.grad is not None for parameter in model.wav2vec2.feature_projection.parameters())


def test_paper_pooling_differs() -> None:
    """The paper's pooling is another function than the code's: far beyond the tolerance on the same features."""
    expected = np.asarray(golden("finetune")["finetune_evaluation"]["pooled"])
    model = classifier(Pooling.paper)
    pooled = model.pooled(*project_padded(model.wav2vec2, waves())).detach().numpy()
    assert np.abs(pooled - expected).max() > 0.05 * np.abs(expected).max()


def test_padding_differs() -> None:
    """What an utterance is padded with reaches its logits in the authors' code, and is far beyond the tolerance too."""
    values = golden("finetune")
    padded, alone = np.asarray(values["finetune_evaluation"]["logits"]), np.asarray(values["finetune_alone"]["logits"])
    longest = int(np.argmax(rebuild.SAMPLES))
    assert np.allclose(padded[longest], alone[longest], rtol=RELATIVE)
    assert np.abs(padded - alone).max() > 0.01 * np.abs(alone).max()


def test_tapt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, parts and gradients of a padded batch in training mode, with given masks, negatives and Gumbel noise."""
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", rebuild.fixed_gumbel_softmax)
    expected = golden("tapt")["tapt"]
    model = backbone().train()
    mask = rebuild.time_mask()
    result = tapt_loss(model, waves(), TaptDraw(mask, rebuild.negatives(mask)[mask]), padding=Padding.reference, attention_mask=False)
    close(result.loss, expected["loss"])
    close(result.contrastive, expected["contrastive"])
    close(result.diversity, expected["diversity"])
    assert result.masked == int(mask.sum())
    torch.autograd.backward(result.loss)
    close(gradient_norm(model.parameters()), expected["gradient_norm"])
    close(gradient_norm(model.wav2vec2.feature_extractor.parameters()), expected["gradient_norm_convolutions"])
    close(gradient_norm(model.quantizer.parameters()), expected["gradient_norm_quantizer"])


def test_ptapt() -> None:
    """Loss over two heads, logits and gradient, with frames that have no label."""
    expected = golden("ptapt")["ptapt"]
    model = PseudoLabelModel(backbone().wav2vec2, rebuild.CLUSTERS, rebuild.HEAD_UNITS).train()
    rebuild.fill({f"heads.{name}": parameter for name, parameter in model.heads.named_parameters()}, seed=4)
    mask = torch.from_numpy(rebuild.time_mask())
    features, frames = project_padded(model.wav2vec2, waves())
    logits = model(features, frames, mask)
    for ours, theirs in zip(logits, expected["logits_first_frame"], strict=True):
        close(ours[0], theirs)
    result = ptapt_loss(logits, torch.from_numpy(rebuild.pseudo_labels(mask.numpy())), mask)
    close(result.loss, expected["loss"])
    torch.autograd.backward(result.loss)
    close(gradient_norm(model.parameters()), expected["gradient_norm"])
    close(gradient_norm(model.wav2vec2.encoder.parameters()), expected["gradient_norm_encoder"])
    for head, theirs in zip(model.heads, expected["gradient_norm_heads"], strict=True):
        close(gradient_norm(head.parameters()), theirs)


def states() -> tuple[EmotionStates, Tensor]:
    wav2vec = build_wav2vec(Wav2vecSettings(config=rebuild.WAV2VEC))
    rebuild.fill(dict(wav2vec.named_parameters()), seed=2)
    model = EmotionStates(wav2vec, len(rebuild.CLASS_COUNTS), rebuild.RNN_UNITS, rebuild.HEAD_UNITS)
    rebuild.fill({name: parameter for name, parameter in model.named_parameters() if not name.startswith("wav2vec.")}, seed=9)
    return model, torch.stack([wave[: rebuild.STATES_SAMPLES] for wave in waves()])


def test_states_evaluation() -> None:
    """Logits and loss without masks."""
    expected = golden("states")["states_evaluation"]
    model, crops = states()
    model.eval()
    utterance, frame = model(crops)
    close(utterance, expected["utterance_logits"])
    close(frame.mean(1), expected["frame_logits_mean"])
    loss = states_loss(utterance, frame, torch.tensor(rebuild.LABELS), class_weights(rebuild.CLASS_COUNTS))
    close(loss.loss, expected["loss"])


def test_states_training() -> None:
    """Loss and gradient with given masks."""
    expected = golden("states")["states_training"]
    model, crops = states()
    model.train()
    masks = torch.from_numpy(rebuild.states_time_mask()), torch.from_numpy(rebuild.states_feature_mask())
    utterance, frame = model(crops, *masks)
    loss = states_loss(utterance, frame, torch.tensor(rebuild.LABELS), class_weights(rebuild.CLASS_COUNTS)).loss
    close(loss, expected["loss"])
    torch.autograd.backward(loss)
    close(gradient_norm(model.parameters()), expected["gradient_norm"])


def test_states_for_clustering() -> None:
    """The frames of a whole utterance that k-means is given."""
    expected = golden("states")["states_frames"]
    model, _ = states()
    frames = model.eval().frames(waves()[1])
    assert len(frames) == expected["count"]
    close(frames.mean(0), expected["mean"])
    close(frames[-1], expected["last"])
