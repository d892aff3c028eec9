"""A split: the utterances of a corpus that a stage may read, with labels and audio, and no access to any other utterance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ser_core.corpora.audio import load_audio
from ser_core.corpora.manifest import Manifest, Utterance

FULL_SCALE = 1 << 15


class Split:
    """Some utterances of a corpus, by position. It has no reference to other utterances, so a stage cannot read them.

    Audio is cached in memory as 16-bit samples (the format of a prepared corpus; 7 hours are 0.8 GB), because a pretraining stage reads
    each utterance hundreds of times.
    """

    def __init__(self, manifest: Manifest, utterances: Sequence[Utterance]) -> None:
        self._manifest = dataclasses.replace(manifest, utterances=tuple(utterances), source={})
        self._kept: dict[int, NDArray[np.int16] | NDArray[np.float32]] = {}
        self.utterances: tuple[Utterance, ...] = self._manifest.utterances
        self.corpus_digest: str = manifest.digest  # of the whole corpus
        self.classes: tuple[str, ...] = manifest.classes
        self.labels: list[int] = [manifest.class_index(utterance) for utterance in utterances]
        self.samples: list[int] = [utterance.samples for utterance in utterances]

    def __len__(self) -> int:
        return len(self.utterances)

    def wave(self, position: int, *, keep: bool = True) -> Tensor:
        """Return the samples (samples,) float32 in ±1; with `keep` they are cached in memory."""
        kept = self._kept.get(position)
        if kept is None:
            samples = load_audio(self._manifest, self.utterances[position])
            if not keep:
                return torch.from_numpy(samples)
            kept = _narrowed(samples)
            self._kept[position] = kept
        if kept.dtype == np.int16:
            return torch.from_numpy(kept).to(torch.float32) / FULL_SCALE
        return torch.from_numpy(kept)

    def class_counts(self) -> list[int]:
        """Return the number of utterances of each class."""
        counts = [0] * len(self.classes)
        for label in self.labels:
            counts[label] += 1
        return counts

    def subset(self, positions: Sequence[int]) -> Split:
        """Return a split of some of these utterances."""
        return Split(self._manifest, [self.utterances[position] for position in positions])


def _narrowed(samples: NDArray[np.float32]) -> NDArray[np.int16] | NDArray[np.float32]:
    """Convert to 16 bit if that is lossless."""
    scaled = samples * FULL_SCALE
    narrow = np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    return narrow if np.array_equal(narrow, scaled) else samples
