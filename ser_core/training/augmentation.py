"""SpecAugment for the utterances of a step: each one's spans come from the step and its own id, not from who shares its batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ser_core.models.masking import feature_mask, time_mask
from ser_core.settings import Padding, SpecAugmentSettings
from ser_core.training.randomness import generator


def time_spans(
    frames: Sequence[int],
    length: int,
    ids: Sequence[str],
    seed: int,
    step: int,
    padding: Padding,
    *,
    span: int,
    probability: float,
    minimum: int,
) -> Tensor:
    """Masked frames (B, length) bool of rows with so many valid frames.

    `reference` draws one number of spans for all rows, from the padded length, as the authors' code does.
    """
    if padding is Padding.reference:
        rng = generator(seed, "time mask", step, *ids)
        return torch.from_numpy(
            time_mask(np.asarray(frames), length, probability=probability, span=span, minimum=minimum, rng=rng, shared_count=True)
        )
    rows = [
        time_mask(
            np.asarray([count]),
            length,
            probability=probability,
            span=span,
            minimum=minimum,
            rng=generator(seed, "time mask", step, each),
        )
        for count, each in zip(frames, ids, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))


def spans(
    settings: SpecAugmentSettings,
    frames: Sequence[int],
    length: int,
    channels: int,
    ids: Sequence[str],
    seed: int,
    step: int,
    padding: Padding,
) -> tuple[Tensor, Tensor]:
    """Masked frames (B, length) and masked channels (B, channels), bool."""
    time = time_spans(
        frames,
        length,
        ids,
        seed,
        step,
        padding,
        span=settings.time_length,
        probability=settings.time_probability,
        minimum=settings.time_minimum,
    )
    shared = padding is Padding.reference
    rngs = [generator(seed, "feature mask", step, *ids)] if shared else [generator(seed, "feature mask", step, each) for each in ids]
    rows = [
        feature_mask(
            len(ids) if shared else 1,
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
