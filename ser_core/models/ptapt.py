"""P-TAPT stage 3 (section 2.3): predict the pseudo-labels of masked frames, with one head for each number of clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ser_core.models.backbone import frame_count, hop_samples
from ser_core.models.classifier import encode
from ser_core.models.trained import below, train_only

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

UNLABELLED = -100  # a frame without pseudo-label; the default ignore_index of torch's cross-entropy


@dataclass(frozen=True)
class PtaptLoss:
    """`loss`: mean cross-entropy over labelled masked frames, summed over heads. `correct` (heads,) of `labelled` masked frames."""

    loss: Tensor
    correct: Tensor
    labelled: int


class PseudoLabelModel(nn.Module):
    """wav2vec 2.0 with a head ReLU-Linear(hidden, head_units)-Tanh-Linear(head_units, k) for each k.

    Only the transformer and the heads are trained. The ReLU is in the authors' code; the paper mentions only the linear layers.
    """

    def __init__(self, encoder: Wav2Vec2Model, counts: Sequence[int], head_units: int = 256) -> None:
        super().__init__()
        self.wav2vec2: Any = encoder
        hidden = encoder.config.hidden_size
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(hidden, head_units), nn.Tanh(), nn.Linear(head_units, k)) for k in counts)
        train_only(self, below(self, "wav2vec2.encoder", "heads"))

    def forward(self, features: Tensor, frames: Tensor, mask: Tensor) -> list[Tensor]:
        """Return the logits (M, k) of the masked frames in row order, for each head.

        `features` (B, T, hidden) without dropout, `frames` (B,) numbers of valid frames, `mask` (B, T) bool.
        """
        hidden = F.relu(encode(self.wav2vec2, features, frames, mask)[mask])
        return [head(hidden) for head in self.heads]


def ptapt_loss(logits: Sequence[Tensor], labels: Tensor, mask: Tensor, total: int | None = None) -> PtaptLoss:
    """Return the loss of logits (M, k) for each k against `labels` (B, heads, T) int64 at the masked frames of `mask` (B, T).

    Frames labelled -100 are ignored. For gradient accumulation pass `labelled_frames` of the whole batch as `total`: the losses of its
    micro-batches then add up to that of the batch.
    """
    targets = labels.transpose(1, 2)[mask]  # (M, heads)
    known = targets != UNLABELLED
    labelled = int(known[:, 0].sum())
    losses = [F.cross_entropy(head.float(), targets[:, i], ignore_index=UNLABELLED, reduction="sum") for i, head in enumerate(logits)]
    correct = torch.stack([((head.argmax(-1) == targets[:, i]) & known[:, i]).sum() for i, head in enumerate(logits)])
    return PtaptLoss(torch.stack(losses).sum() / max(labelled if total is None else total, 1), correct, labelled)


def labelled_frames(labels: Tensor, mask: Tensor) -> int:
    """Return the number of masked frames (`mask` (B, T)) that have a label in `labels` (B, heads, T)."""
    return int(((labels[:, 0] != UNLABELLED) & mask).sum())


def crop_labels(labels: NDArray[np.integer], config: Wav2Vec2Config, start: int, samples: int) -> NDArray[np.int64]:
    """Return the labels (heads, frames) of a crop of `samples` samples from sample `start`, given an utterance's (heads, all frames).

    Frame j of the crop gets the label of the utterance's frame nearest in time, or -100 if there is none; exact if `start` is a multiple of
    `hop_samples`. (The authors' code uses `frame_count(start)` as first label, which is negative for a start before the first whole frame:
    an uncropped utterance that is the longest of its batch loses all its labels.)
    """
    hop = hop_samples(config)
    return align_labels(labels[:, (start + hop // 2) // hop :], max(frame_count(config, samples), 1))


def align_labels(labels: NDArray[np.integer], frames: int) -> NDArray[np.int64]:
    """Cut labels (heads, n) to (heads, frames), or pad them with -100.

    wav2vec v1 and wav2vec 2.0 may differ by a frame at the end: 16 000 samples give 48 and 49 frames.
    """
    aligned = np.full((labels.shape[0], frames), UNLABELLED, dtype=np.int64)
    kept = labels[:, :frames]
    aligned[:, : kept.shape[1]] = kept
    return aligned
