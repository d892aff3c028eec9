"""P-TAPT stage 1 (section 2.3): emotion states, frames of wav2vec v1 trained to classify the emotion per utterance and per frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ser_core.models.classifier import weighted_cross_entropy
from ser_core.models.shapes import MATCH_KERNEL, MATCH_STRIDE, minimum_samples
from ser_core.models.wav2vec import Wav2vec


@dataclass(frozen=True)
class StatesLoss:
    """`loss` = `utterance` + `frame`, each a weighted mean cross-entropy; `correct`: number of correctly classified utterances."""

    loss: Tensor
    utterance: Tensor
    frame: Tensor
    correct: Tensor


class EmotionStates(nn.Module):
    """wav2vec v1 -> Conv1d(kernel 4, stride 2) -> ReLU = emotion states, then a BiLSTM with a head per utterance and an MLP per frame.

    The extractor is frozen; aggregator, convolution, BiLSTM and both heads are trained. `rnn_units` per direction. Sizes are those
    of the authors' code.
    """

    def __init__(self, wav2vec: Wav2vec, classes: int, rnn_units: int = 256, head_units: int = 128) -> None:
        super().__init__()
        self.wav2vec = wav2vec
        channels = wav2vec.outputs
        self.match = nn.Conv1d(channels, channels, MATCH_KERNEL, MATCH_STRIDE)
        self.rnn = nn.LSTM(channels, rnn_units, bidirectional=True, batch_first=True)
        self.utterance_head = nn.Sequential(nn.Linear(2 * rnn_units, head_units), nn.Tanh(), nn.Linear(head_units, classes))
        self.frame_head = nn.Sequential(nn.Linear(channels, head_units), nn.Tanh(), nn.Linear(head_units, classes))
        for parameter in wav2vec.extractor.parameters():
            parameter.requires_grad_(False)

    def forward(self, waves: Tensor, time_mask: Tensor | None = None, feature_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return utterance logits (B, classes) and frame logits (B, T, classes) of waves of equal length (B, samples).

        `time_mask` (B, extractor frames, see `extractor_frames`) and `feature_mask` (B, channels), bool, zero the extractor's output.
        """
        frames = self.states(waves, time_mask, feature_mask)
        outputs, _ = self.rnn(frames)
        return self.utterance_head(F.relu(outputs.mean(1))), self.frame_head(frames)

    def states(self, waves: Tensor, time_mask: Tensor | None = None, feature_mask: Tensor | None = None) -> Tensor:
        """Return the emotion states (B, T, channels) of waves of equal length (B, samples)."""
        with torch.no_grad():
            extracted = self.wav2vec.extractor(waves)
            if time_mask is not None:
                extracted = extracted.masked_fill(time_mask[:, None, :], 0)
            if feature_mask is not None:
                extracted = extracted.masked_fill(feature_mask[:, :, None], 0)
        return F.relu(self.match(self.wav2vec.aggregator(extracted))).transpose(1, 2)

    @torch.no_grad()
    def frames(self, wave: Tensor) -> Tensor:
        """Return the emotion states (T, channels) of one whole utterance (samples,), without augmentation, for clustering.

        An utterance too short for one state is padded with zeros to one state.
        """
        wave = wave.to(self.match.weight)
        missing = minimum_samples(self.wav2vec.config) - len(wave)
        states: Tensor = self.states(F.pad(wave, (0, max(missing, 0)))[None])[0]
        return states


def states_loss(
    utterance_logits: Tensor,
    frame_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    total_weight: Tensor | float | None = None,
) -> StatesLoss:
    """Return the sum of both losses for labels (B,) with class weights (classes,); every frame has the label of its utterance.

    For gradient accumulation over micro-batches of equal length pass `label_weight` of the whole batch's labels as `total_weight`.
    """
    length = frame_logits.shape[1]
    utterance = weighted_cross_entropy(utterance_logits, labels, weights, total_weight)
    frame_total = None if total_weight is None else total_weight * length
    frame = weighted_cross_entropy(frame_logits.flatten(0, 1), labels.repeat_interleave(length), weights, frame_total)
    correct = (utterance_logits.argmax(-1) == labels).sum()
    return StatesLoss(utterance + frame, utterance, frame, correct)
