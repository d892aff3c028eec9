"""Share of masked frames in fine-tuning by utterance length, and candidates for negatives, on lengths like IEMOCAP's: both presets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ser_core.models.backbone import frame_count
from ser_core.models.masking import row_masks
from ser_core.models.tapt import sample_negatives
from ser_core.settings.backbone import SpansPer, SpecAugmentSettings
from ser_core.settings.pretraining import NegativeFrames
from ser_core.settings.recipe import Recipe
from ser_core.training.augmentation import row_generators, spans
from ser_core.training.batches import bucketed_epoch
from tests.ser_core.presets import with_preset
from tests.ser_core.training.test_batches import IEMOCAP, by

BATCH = 64
EDGES = (50, 100, 150, 200, 300, 400, 500)


def iemocap_frames() -> list[int]:
    from transformers import Wav2Vec2Config

    return [max(1, frame_count(Wav2Vec2Config(), samples)) for samples in IEMOCAP]


def masked_shares(settings: SpecAugmentSettings, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames and masked share, in percent, of every utterance of every batch, drawn as fine-tuning draws them."""
    frames = iemocap_frames()
    lengths: list[int] = []
    shares: list[float] = []
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(frames)).tolist()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            rows = [frames[index] for index in batch]
            rngs = row_generators(epoch, start, [str(index) for index in batch], settings.spans_per)
            mask, _ = spans(settings, rows, max(rows), 768, rngs)
            lengths += rows
            shares += (100 * mask.sum(1).numpy() / np.array(rows)).tolist()
    return np.array(lengths), np.array(shares)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "expected"), [("published", 7.4), ("paper", 8.0)])
def test_the_masked_share_is_flat_over_length(preset: str, expected: float) -> None:
    """Within 0.5 points of the stated share over all utterances; in every range of lengths from 1 s within 0.8, noise included."""
    settings = with_preset(Recipe(), preset).finetune.spec_augment
    lengths, shares = masked_shares(settings, 3)
    assert abs(shares.mean() - expected) < 0.5
    for low, high in itertools.pairwise(EDGES):
        chosen = shares[(lengths >= low) & (lengths < high)]
        assert len(chosen) > 300
        assert abs(chosen.mean() - expected) < 0.8
    if preset == "published":
        assert abs(100 * (shares == 0).mean() - 32) < 3  # utterances without a masked frame


@pytest.mark.slow
def test_a_minimum_for_each_utterance_masks_short_ones_most() -> None:
    """What the default was before: more than twice the share of `paper`, and over a third of the frames of short utterances."""
    lengths, shares = masked_shares(SpecAugmentSettings(spans_per=SpansPer.utterance, time_minimum=2), 1)
    assert shares.mean() > 16
    assert shares[lengths < 100].mean() > 35


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "rows"), [("published", range(212, 230)), ("paper", range(205, 225))])
def test_candidates_for_negatives(preset: str, rows: range) -> None:
    """Nearly all frames of an utterance's row: some 216 on average; only masked frames would be 19."""
    settings = with_preset(Recipe(), preset).tapt
    frames = iemocap_frames()
    counts, masked = [], []
    batches = bucketed_epoch(IEMOCAP, by(250 * 16_000, settings.buckets, settings.batches_per_bucket, drop_last=settings.drop_last), 0, 0)
    for number, batch in enumerate(batches):
        own = np.array([frames[index] for index in batch])
        length = int(own.max())
        rngs = row_generators(0, number, [str(index) for index in batch], settings.mask_spans_per)
        mask = row_masks(own, length, probability=0.05, span=10, minimum=settings.mask_minimum, rngs=rngs)
        pools = np.full_like(own, length) if settings.negative_frames is NegativeFrames.padded else own
        one = np.zeros_like(mask)
        one[np.arange(len(own)), mask.argmax(1)] = True  # the first masked frame of each row
        drawn = sample_negatives(one, 12 * length, [np.random.default_rng(0)], pools)
        counts += [len(set(row)) for row in drawn.tolist()]
        masked += mask.sum(1).tolist()
    assert np.mean(counts) == pytest.approx(rows.start, abs=len(rows))
    assert 15 < np.mean(masked) < 25


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "length", "expected"), [(NegativeFrames.padded, 499, 498), (NegativeFrames.valid, 499, 99)])
def test_candidates_in_a_padded_row(frames: NegativeFrames, length: int, expected: int) -> None:
    """An utterance of 100 frames in a row of 10 s: all 499 frames but its own, or its own 100."""
    mask = np.zeros((1, length), dtype=bool)
    mask[0, 40] = True
    pool = np.array([length if frames is NegativeFrames.padded else 100])
    drawn = sample_negatives(mask, 20_000, [np.random.default_rng(0)], pool)
    assert len(set(drawn[0].tolist())) == expected
