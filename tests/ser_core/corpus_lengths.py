"""Utterance lengths shaped like the paper's corpora: lognormal quantiles with their size, mean, extremes and share of long utterances."""

from __future__ import annotations

from math import exp
from statistics import NormalDist

import numpy as np

SAMPLE_RATE = 16_000
NAMES = ("iemocap", "savee")

# One training split: utterances, median in seconds, sigma of the logarithm, shortest and longest in seconds.
# IEMOCAP without one session: mean 4.5 s, 3.8 % above 12 s. SAVEE without one speaker: mean 3.8 s.
SHAPES = {"iemocap": (4425, 3.62, 0.675, 0.585, 34.14), "savee": (360, 3.70, 0.27, 1.6, 7.1)}


def corpus_lengths(name: str) -> list[int]:
    """Return the samples of each utterance at 16 kHz, in a fixed random order; the same values on every machine."""
    count, median, sigma, shortest, longest = SHAPES[name]
    quantiles = (NormalDist().inv_cdf((index + 0.5) / count) for index in range(count))
    seconds = [min(longest, max(shortest, median * exp(sigma * quantile))) for quantile in quantiles]
    order = np.random.default_rng(0).permutation(count)
    return [round(seconds[index] * SAMPLE_RATE) for index in order]
