"""Where spans are masked: drawn here, for time and for features, from an explicit generator and never on padding."""

from __future__ import annotations

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
    """Draw masked frames, as a bool array (B, frames) that is False wherever a row is padding.

    `lengths` (B,) are the valid frames of each row. A row of length L gets max(minimum, int(probability * L / span + U[0, 1))) spans with
    distinct starts (wav2vec 2.0, arXiv 2006.11477, and RECIPE). Starts lie where a whole span fits; a row too short for that takes the
    few first frames as starts and its spans are cut at its end. `probability` 0 masks nothing.

    With `shared_count` the spans are drawn as in the authors' fine-tuning code: one count for all rows, computed from the padded length
    `frames` and capped so that spans fit without overlap, starts anywhere in the padded row, and only then cut to the valid frames.
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
        # A row that cannot hold `count` whole spans with distinct starts keeps one start to spare, so that it is not always masked whole.
        starts = max(length - span + 1, min(count + 1, length))
        chosen = rng.choice(starts, size=count, replace=False, shuffle=False)
        mask[row, (chosen[:, None] + offsets).ravel()] = True
    result: BoolArray = mask[:, :frames] & valid
    return result


def feature_mask(
    batch: int, channels: int, *, probability: float, span: int, minimum: int, rng: np.random.Generator, shared_count: bool = False
) -> BoolArray:
    """Draw masked channels, as a bool array (batch, channels); the same spans as `time_mask`, along the channels.

    Raises InputError where one span would cover every channel, because then nothing is left to learn from.
    """
    if probability > 0 and span >= channels:
        raise InputError(
            f"spec_augment.feature_length={span} would zero all {channels} channels of this model: "
            f"set it below {channels} (the paper's is 64 of 768), or feature_probability=0"
        )
    lengths = np.full(batch, channels, dtype=np.int64)
    return time_mask(lengths, channels, probability=probability, span=span, minimum=minimum, rng=rng, shared_count=shared_count)
