"""SpecAugment masks for the utterances of a step, drawn from the step and the utterance's id, independent of the rest of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ser_core.models.masking import feature_mask, row_masks
from ser_core.settings.backbone import SpansPer, SpecAugmentSettings
from ser_core.training.randomness import generator


def time_spans(
    frames: Sequence[int],
    length: int,
    rngs: Sequence[np.random.Generator],
    *,
    span: int,
    probability: float,
    minimum: int,
) -> Tensor:
    """Return a mask (B, length) bool for rows with `frames` (B,) valid frames, drawn from the generators of `row_generators`.

    If all rows share one generator they get the same number of spans, from the padded length, as in the authors' code.
    """
    if probability <= 0:
        return torch.zeros(len(frames), length, dtype=torch.bool)
    return torch.from_numpy(row_masks(np.asarray(frames), length, probability=probability, span=span, minimum=minimum, rngs=rngs))


def row_generators(seed: int, step: int, ids: Sequence[str], spans_per: SpansPer) -> list[np.random.Generator]:
    """Return a generator for each utterance of a batch, or a single one for all rows if spans are counted per batch."""
    if spans_per is SpansPer.batch and len(ids) > 1:
        return [generator(seed, "mask", step, *ids)]
    return [generator(seed, "mask", step, each) for each in ids]


def spans(
    settings: SpecAugmentSettings, frames: Sequence[int], length: int, channels: int, rngs: Sequence[np.random.Generator]
) -> tuple[Tensor, Tensor]:
    """Return masked frames (B, length) and masked channels (B, channels), bool; arguments as for `time_spans`."""
    time = time_spans(frames, length, rngs, span=settings.time_length, probability=settings.time_probability, minimum=settings.time_minimum)
    if settings.feature_probability <= 0:
        return time, torch.zeros(len(frames), channels, dtype=torch.bool)
    shared = len(rngs) != len(frames)
    rows = [
        feature_mask(
            len(frames) if shared else 1,
            channels,
            probability=settings.feature_probability,
            span=settings.feature_length,
            minimum=settings.feature_minimum,
            rng=rng,
            shared_count=shared,
        )
        for rng in rngs
    ]
    return time, torch.from_numpy(np.concatenate(rows))
