"""The classification head, what is trained, and a weighted loss that adds up over micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ser_core.errors import InputError
from ser_core.models.backbone import build_backbone
from ser_core.models.classifier import EmotionClassifier, class_weights, encode, label_weight, pool, weighted_cross_entropy
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.finetune import Pooling
from tests.ser_core.models import rebuild


def encoder(**changes: Any) -> Any:
    return build_backbone(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, **changes})).wav2vec2


def test_pooling_by_hand() -> None:
    """Paper: mean over valid frames, then ReLU. Reference: ReLU on the frames, mean without the last valid frame."""
    hidden = torch.tensor([[[1.0, -4.0], [3.0, 2.0], [5.0, -7.0], [99.0, 99.0]]])
    frames = torch.tensor([3])
    assert pool(hidden, frames, Pooling.paper).tolist() == [[3.0, 0.0]]
    assert pool(hidden, frames, Pooling.reference).tolist() == [[2.0, 1.0]]
    assert pool(hidden, torch.tensor([1]), Pooling.reference).tolist() == [[1.0, 0.0]]


def test_what_is_trained() -> None:
    """An optimiser is given the transformer, with positional convolution and norms, and the head; the rest gets no gradient."""
    model = EmotionClassifier(encoder(), 4).train()
    features, frames = torch.randn(2, 30, 32), torch.tensor([30, 20])
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[:, 3:9] = True
    torch.autograd.backward(model(features, frames, mask).square().sum())
    for name, parameter in model.named_parameters():
        expected = name.startswith(("wav2vec2.encoder.", "head."))
        assert parameter.requires_grad == expected == (parameter.grad is not None), name
    assert any("pos_conv" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_masks() -> None:
    """Masked frames carry the learned embedding, masked channels zero, also where both meet; padding stays zero."""
    model = encoder()
    model.set_attn_implementation("eager")  # transformers' encoder, which can be listened to
    seen = []
    handle = model.encoder.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    features = torch.randn(1, 6, 32)
    time, channel = torch.zeros(1, 6, dtype=torch.bool), torch.zeros(1, 32, dtype=torch.bool)
    time[0, 1], channel[0, 4] = True, True
    encode(model, features, torch.tensor([5]), time, channel)
    handle.remove()
    expected = features.clone()
    expected[0, 1] = model.masked_spec_embed.detach()
    expected[..., 4] = 0
    expected[0, 5] = 0
    assert torch.equal(seen[0], expected)


def test_dropout_of_the_projection_belongs_to_the_step() -> None:
    """Features come without dropout; it is drawn anew for every training pass, as in the authors' loop, and never in evaluation."""
    model = EmotionClassifier(encoder(feat_proj_dropout=0.5), 4)
    features, frames = torch.randn(1, 20, 32), torch.tensor([20])
    model.train()
    assert not torch.equal(model(features, frames), model(features, frames))
    model.eval()
    assert torch.equal(model(features, frames), model(features, frames))


def test_class_weights() -> None:
    """Inverse to the counts and summing to 1; a class without utterances is refused."""
    weights = class_weights([1, 2, 4])
    assert torch.allclose(weights, torch.tensor([4 / 7, 2 / 7, 1 / 7]))
    with pytest.raises(InputError, match="every class needs"):
        class_weights([3, 0])


def test_loss_over_parts() -> None:
    """The whole batch's loss is torch's weighted mean; parts of any size add up to it and to its gradient."""
    torch.manual_seed(0)
    labels, weights = torch.randint(0, 4, (17,)), class_weights([5, 1, 9, 2])
    whole = torch.randn(17, 4, requires_grad=True)
    loss = weighted_cross_entropy(whole, labels, weights)
    assert torch.allclose(loss, F.cross_entropy(whole, labels, weight=weights))
    torch.autograd.backward(loss)
    parts = whole.detach().clone().requires_grad_()
    total, added = label_weight(labels, weights), 0.0
    for part in (slice(0, 5), slice(5, 6), slice(6, 17)):
        piece = weighted_cross_entropy(parts[part], labels[part], weights, total)
        torch.autograd.backward(piece)
        added += float(piece.detach())
    assert abs(added - float(loss.detach())) < 1e-6
    torch.testing.assert_close(parts.grad, whole.grad)
