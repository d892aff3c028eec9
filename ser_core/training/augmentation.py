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
    rngs: Sequence[np.random.Generator],
    *,
    span: int,
    probability: float,
    minimum: int,
) -> Tensor:
    """Masked frames (B, length) bool of rows with so many valid frames, from the generators that `row_generators` gave.

    One generator for all rows draws one number of spans for all, from the padded length, as the authors' code does.
    """
    if probability <= 0:
        return torch.zeros(len(frames), length, dtype=torch.bool)
    lengths = np.asarray(frames)
    shared = len(rngs) != len(frames)
    groups = [lengths] if shared else lengths[:, None]
    rows = [
        time_mask(group, length, probability=probability, span=span, minimum=minimum, rng=rng, shared_count=shared)
        for group, rng in zip(groups, rngs, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))


def row_generators(seed: int, step: int, ids: Sequence[str], padding: Padding) -> list[np.random.Generator]:
    """A generator for each utterance of a batch; with `reference` padding, where rows depend on each other anyhow, one for all."""
    if padding is Padding.reference and len(ids) > 1:
        return [generator(seed, "mask", step, *ids)]
    return [generator(seed, "mask", step, each) for each in ids]


def spans(
    settings: SpecAugmentSettings, frames: Sequence[int], length: int, channels: int, rngs: Sequence[np.random.Generator]
) -> tuple[Tensor, Tensor]:
    """Masked frames (B, length) and masked channels (B, channels), bool."""
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
