"""Random span masks along time and channels, drawn from an explicit generator; padding is never masked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ser_core.errors import InputError

BoolArray = NDArray[np.bool_]


def time_mask(
    lengths: NDArray[np.integer],
    frames: int,
    *,
    probability: float,
    span: int,
    minimum: int,
    rng: np.random.Generator,
    shared_count: bool = False,
) -> BoolArray:
    """Draw a mask (B, frames) bool, False on padding.

    `lengths` (B,): valid frames of each row. A row of length L gets max(minimum, int(probability * L / span + U[0, 1))) spans with distinct
    starts (wav2vec 2.0, section 3.1 of arXiv 2006.11477, and docs/recipe.md). A start leaves room for the whole span; in a row too short
    for that, starts are among the first frames and spans are cut at the row's end. `probability` 0 masks nothing.

    `shared_count` draws as the authors' fine-tuning code: one count for all rows, from the padded length `frames` and limited so that spans
    fit without overlap; starts anywhere in the padded row; then cut to the valid frames.

    Raises InputError for `span` < 1, ValueError for lengths that do not fit `frames`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if span < 1:
        raise InputError(f"mask length {span}: must be at least 1 frame")
    if lengths.size and (int(lengths.max()) > frames or int(lengths.min()) < 0):
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} do not fit {frames} frames")
    valid: BoolArray = np.arange(frames) < lengths[:, None]
    if probability <= 0 or frames == 0 or lengths.size == 0:
        return np.zeros_like(valid)
    if shared_count:
        count = max(minimum, int(probability * frames / span + rng.random()))
        count = min(count, max(frames // span, 1))
        counts = np.full(len(lengths), count)
        ranges = np.full(len(lengths), frames)
    else:
        counts = np.maximum(minimum, (probability * lengths / span + rng.random(len(lengths))).astype(np.int64))
        ranges = lengths
    mask = np.zeros((len(lengths), frames + span), dtype=bool)
    offsets = np.arange(span)
    for row, (count, length) in enumerate(zip(counts.tolist(), ranges.tolist(), strict=True)):
        count = min(count, length)
        if count == 0:
            continue
        # A row too short for `count` whole spans with distinct starts gets one more possible start: else it would be masked entirely.
        starts = max(length - span + 1, min(count + 1, length))
        chosen = rng.choice(starts, size=count, replace=False, shuffle=False)
        mask[row, (chosen[:, None] + offsets).ravel()] = True
    result: BoolArray = mask[:, :frames] & valid
    return result


def row_masks(
    lengths: NDArray[np.integer], frames: int, *, probability: float, span: int, minimum: int, rngs: Sequence[np.random.Generator]
) -> BoolArray:
    """Draw the mask of `time_mask` with a generator for each row, or with a single one for all rows, which then have equally many spans."""
    lengths = np.asarray(lengths)
    shared = len(rngs) != len(lengths)
    groups = [lengths] if shared else lengths[:, None]
    drawn = [
        time_mask(group, frames, probability=probability, span=span, minimum=minimum, rng=rng, shared_count=shared)
        for group, rng in zip(groups, rngs, strict=True)
    ]
    return np.concatenate(drawn)


def feature_mask(
    batch: int, channels: int, *, probability: float, span: int, minimum: int, rng: np.random.Generator, shared_count: bool = False
) -> BoolArray:
    """Draw a mask (batch, channels) bool with the spans of `time_mask` along the channels.

    Raises InputError if one span would cover all channels.
    """
    if probability > 0 and span >= channels:
        raise InputError(
            f"spec_augment.feature_length={span} would zero all {channels} channels of this model: "
            f"set it below {channels} (published: 64 of 768), or feature_probability=0"
        )
    lengths = np.full(batch, channels, dtype=np.int64)
    return time_mask(lengths, channels, probability=probability, span=span, minimum=minimum, rng=rng, shared_count=shared_count)
