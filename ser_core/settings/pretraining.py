"""Pretraining before fine-tuning: TAPT and the stages of P-TAPT; the pretraining loss of an untouched checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ser_core.settings.backbone import SpansPer, SpecAugmentSettings, Wav2vecSettings
from ser_core.settings.execution import Precision


class NegativeFrames(Enum):
    """Frames of an utterance's row that the negatives of the contrastive loss are drawn from."""

    valid = "valid"  # all frames of the utterance
    padded = "padded"  # code: all frames of the padded row


@dataclass
class TaptSettings:
    """Continued wav2vec 2.0 pretraining (TAPT in section 2.2, training in 3.2)."""

    steps: int = 20_000  # of the optimiser
    learning_rate: float = 1e-4  # at its maximum
    warmup_steps: int = 100  # linear rise of the rate
    flat_fraction: float = 0.05  # share of the steps at the maximum; then a linear decay to 0
    batch_seconds: float = 250.0  # audio of a batch
    max_seconds: float = 10.0  # random crop
    buckets: int = 50  # of similar length, at most
    batches_per_bucket: float = 1.5  # at least, so that the batches of a small corpus differ between epochs; 0: always `buckets` buckets
    drop_last: bool = False  # drop the last incomplete batch, which has the longest utterances; False: equal batches, nothing dropped
    negatives: int = 100  # of each masked frame
    negative_frames: NegativeFrames = NegativeFrames.valid  # where they are drawn from
    temperature: float = 0.1  # of the contrastive loss
    diversity_weight: float = 0.1  # of the batch's diversity, added once to the sum over masked frames
    attention_mask: bool = True  # False: the transformer attends to padding (the code passes no mask)
    mask_minimum: int = 2  # spans; their length and probability are those of the backbone's configuration
    mask_spans_per: SpansPer = SpansPer.utterance  # what a number of spans is drawn for
    precision: Precision = Precision.auto  # autocast type


@dataclass
class StatesSettings:
    """P-TAPT stage 1, emotion states from wav2vec v1 (section 2.3)."""

    wav2vec: Wav2vecSettings = field(default_factory=Wav2vecSettings)
    steps: int = 10_000  # of the optimiser
    learning_rate: float = 1e-4  # at its maximum
    warmup_fraction: float = 0.05  # share of the steps in which the rate rises
    flat_fraction: float = 0.05  # share of the steps at the maximum; then a linear decay to 0
    batch_size: int = 64  # utterances
    validation_fraction: float = 0.1  # share of the training utterances that choose the best model
    validate_every: int = 0  # steps; 0: once per epoch
    rnn_units: int = 256  # per direction
    head_units: int = 128  # hidden units of the classifier of a frame
    spec_augment: SpecAugmentSettings = field(default_factory=lambda: SpecAugmentSettings(time_minimum=2))
    precision: Precision = Precision.auto  # autocast type


@dataclass
class ClusterSettings:
    """P-TAPT stage 2, k-means on frames of the training folds (section 2.3)."""

    counts: list[int] = field(default_factory=lambda: [64, 512, 4096])  # the published script's; the paper names none
    iterations: int = 20  # of k-means at most


@dataclass
class PtaptSettings:
    """P-TAPT stage 3, pretraining on pseudo-labels (section 2.3)."""

    steps: int = 20_000  # of the optimiser
    learning_rate: float = 1e-4  # at its maximum
    warmup_steps: int = 100  # linear rise of the rate
    flat_fraction: float = 0.05  # share of the steps at the maximum; then a linear decay to 0
    batch_seconds: float = 250.0  # audio of a batch
    max_seconds: float = 10.0  # random crop
    buckets: int = 50  # of similar length, at most
    batches_per_bucket: float = 1.5  # at least, so that the batches of a small corpus differ between epochs; 0: always `buckets` buckets
    drop_last: bool = False  # drop the last incomplete batch; False: equal batches, nothing dropped
    mask_length: int = 15  # frames of a span
    mask_probability: float = 0.06  # share of the frames in spans, overlaps counted twice
    mask_minimum: int = 2  # spans at least
    mask_spans_per: SpansPer = SpansPer.utterance  # what a number of spans is drawn for
    head_units: int = 256  # hidden units of the head of each k
    precision: Precision = Precision.auto  # autocast type


@dataclass
class PretrainingLossSettings:
    """Pretraining loss of the untouched checkpoint on a whole corpus (Table 3); spans as in the backbone's configuration."""

    draws: int = 3  # of masks, negatives and noise for each utterance; the loss is their mean
    negatives: int = 100  # of each masked frame, from all other frames of the utterance
    temperature: float = 0.1  # of the contrastive loss
    diversity_weight: float = 0.1  # of the diversity of an utterance's codes, added once to the sum over its masked frames
    mask_minimum: int = 2  # spans of an utterance
    precision: Precision = Precision.float32  # autocast type
