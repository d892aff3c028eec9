"""Projected features of a frozen front end: computed once a stage and kept, or again at every step with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ser_core.models.front_end import project_independent, project_padded
from ser_core.settings import FeatureCache, Padding
from ser_core.training.device import Arithmetic
from ser_core.training.endings import Interrupted
from ser_core.training.progress import Progress
from ser_core.training.splits import Split

Crop = tuple[int, int]  # first frame, frames


class FrozenFeatures:
    """Features of a split's utterances, each cut to its first `max_samples` samples (None: whole), on the encoder's device.

    `independent` features are those of the utterance alone, whoever shares its batch, so that they can be kept in memory (on the CPU; 7 h
    of wav2vec2-base are 3.9 GB in float32, half of it under 16-bit autocast); `reference` ones depend on the batch: computed for each.
    """

    def __init__(
        self, encoder: Any, split: Split, max_samples: int | None, padding: Padding, cache: FeatureCache, arithmetic: Arithmetic
    ) -> None:
        self._encoder = encoder
        self._split = split
        self._max_samples = max_samples
        self._arithmetic = arithmetic
        self.padding = padding
        self._keeps = cache is FeatureCache.memory and padding is Padding.independent
        self._kept: list[Tensor] = []

    def fill(self, should_stop: Callable[[], bool], progress: Progress) -> None:
        """Compute what is to be kept, if anything. Raises Interrupted where asked to stop: there is nothing to save yet."""
        if not self._keeps:
            return
        total = len(self._split)
        for position in range(total):
            if should_stop():
                raise Interrupted(f"stopped at utterance {position} of {total} in the front end; nothing to resume")
            self._kept.append(self._alone(position, keep=False).cpu())
            progress.at(position + 1, total, "front end: utterance")

    def padded(self, positions: Sequence[int], crops: Sequence[Crop] | None = None, samples: int = 0) -> tuple[Tensor, Tensor]:
        """Features (B, T, hidden) of a batch; with `crops`, the given frames of each utterance.

        `reference` features of a part of a batch need the length of its longest utterance as `samples`. With the features come the valid
        frames (B,) int64, on the CPU.
        """
        if self.padding is Padding.reference:
            if crops is not None:
                raise ValueError("features that depend on the batch are cropped as waves, not as frames")
            with self._arithmetic.autocast():
                features, frames = project_padded(self._encoder, [self._wave(position, keep=True) for position in positions], samples)
            return features, frames.cpu()
        device = self._arithmetic.device
        alone = [self._kept[position] if self._keeps else self._alone(position, keep=True) for position in positions]
        if crops is not None:
            alone = [features[first : first + count] for features, (first, count) in zip(alone, crops, strict=True)]
        frames = torch.tensor([len(features) for features in alone], dtype=torch.int64)
        return pad_sequence(alone, batch_first=True).to(device, non_blocking=True), frames

    def _alone(self, position: int, *, keep: bool) -> Tensor:
        with self._arithmetic.autocast():
            return project_independent(self._encoder, [self._wave(position, keep=keep)])[0]

    def _wave(self, position: int, *, keep: bool) -> Tensor:
        return self._split.wave(position, keep=keep)[: self._max_samples]
