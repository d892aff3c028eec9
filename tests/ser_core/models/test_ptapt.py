"""Pseudo-label heads see masked frames only, and labels stay with the audio they belong to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ser_core.models.backbone import build_backbone, frame_count
from ser_core.models.ptapt import PseudoLabelModel, align_labels, crop_labels, labelled_frames, ptapt_loss
from ser_core.settings.backbone import BackboneSettings
from tests.ser_core.models import rebuild


def encoder() -> Any:
    return build_backbone(BackboneSettings(checkpoint=None, config=rebuild.BACKBONE)).wav2vec2


def test_only_masked_labels_count() -> None:
    """Labels of frames that are not masked, and frames without label, do not reach the loss."""
    model = PseudoLabelModel(encoder(), rebuild.CLUSTERS, rebuild.HEAD_UNITS)
    mask = torch.from_numpy(rebuild.time_mask())
    features, frames = torch.randn(4, mask.shape[1], 32), torch.tensor(rebuild.FRAMES)
    logits = model(features, frames, mask)
    assert [tuple(head.shape) for head in logits] == [(int(mask.sum()), k) for k in rebuild.CLUSTERS]
    labels = torch.from_numpy(rebuild.pseudo_labels(mask.numpy()))
    loss = ptapt_loss(logits, labels, mask)
    assert loss.labelled == labelled_frames(labels, mask) < int(mask.sum())
    changed = torch.where(mask[:, None], labels, torch.zeros_like(labels))
    assert torch.equal(ptapt_loss(logits, changed, mask).loss, loss.loss)
    assert bool((loss.correct <= loss.labelled).all())


def test_parts_add_up() -> None:
    """Losses of the parts of a batch, each given the batch's number of labelled frames, add up to the batch's."""
    torch.manual_seed(0)
    mask = torch.from_numpy(rebuild.time_mask())
    labels = torch.from_numpy(rebuild.pseudo_labels(mask.numpy()))
    model = PseudoLabelModel(encoder(), rebuild.CLUSTERS, rebuild.HEAD_UNITS).eval()
    features, frames = torch.randn(4, mask.shape[1], 32), torch.tensor(rebuild.FRAMES)
    whole = ptapt_loss(model(features, frames, mask), labels, mask).loss
    total = labelled_frames(labels, mask)
    parts = sum(
        ptapt_loss(model(features[part], frames[part], mask[part]), labels[part], mask[part], total).loss
        for part in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(parts, whole)


def test_nothing_labelled() -> None:
    """A batch without a label on a masked frame has loss 0, not NaN, and can be differentiated."""
    logits = [torch.randn(3, k, requires_grad=True) for k in rebuild.CLUSTERS]
    mask = torch.tensor([[True, True, True]])
    result = ptapt_loss(logits, torch.full((1, 2, 3), -100), mask)
    torch.autograd.backward(result.loss)
    assert (float(result.loss.detach()), result.labelled) == (0.0, 0)


@pytest.mark.parametrize("start", [0, 80, 800, 39, 41, 2960])
def test_cropped_labels_stay_with_the_audio(start: int) -> None:
    """The label of each frame of a crop is that of the utterance's frame nearest to it; where the utterance ends, none."""
    config = encoder().config
    samples = 6000
    labels = np.arange(frame_count(config, samples))[None].repeat(2, 0)
    cropped = crop_labels(labels, config, start, 3000)
    first = int(np.floor(start / 80 + 0.5))
    assert cropped.shape == (2, frame_count(config, 3000))
    assert cropped[1].tolist() == list(range(first, first + cropped.shape[1]))
    beyond = crop_labels(labels, config, 5000, 3000)
    assert beyond[0, -1] == -100
    assert (beyond[0] != -100).sum() == labels.shape[1] - 63


def test_grids_differing_by_a_frame() -> None:
    """Labels from a grid one frame shorter are filled up with -100, those from a longer one cut."""
    labels = np.array([[1, 2, 3]])
    assert align_labels(labels, 4).tolist() == [[1, 2, 3, -100]]
    assert align_labels(labels, 2).tolist() == [[1, 2]]
