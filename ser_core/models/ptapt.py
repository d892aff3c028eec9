"""P-TAPT stage 3: predict the pseudo-labels of masked frames, one head for every number of clusters."""

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
from ser_core.models.classifier import encode, freeze_front_end

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

UNLABELLED = -100  # a frame without pseudo-label; torch's own value for targets to leave out


@dataclass(frozen=True)
class PtaptLoss:
    """`loss` is differentiated: mean cross-entropy over labelled masked frames, summed over heads; `correct` (heads,) of `labelled`."""

    loss: Tensor
    correct: Tensor
    labelled: int


class PseudoLabelModel(nn.Module):
    """wav2vec 2.0 with a head hidden-`head_units`-k (tanh between) for each k; convolutions, projection and mask embedding frozen.

    `relu` puts a ReLU between the encoder and the heads: so does the authors' code, the paper does not say so.
    """

    def __init__(self, encoder: Wav2Vec2Model, counts: Sequence[int], head_units: int = 256, *, relu: bool = False) -> None:
        super().__init__()
        self.wav2vec2: Any = encoder
        self.relu = relu
        hidden = encoder.config.hidden_size
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(hidden, head_units), nn.Tanh(), nn.Linear(head_units, k)) for k in counts)
        freeze_front_end(encoder)

    def forward(self, features: Tensor, frames: Tensor, mask: Tensor) -> list[Tensor]:
        """Return for each head the logits (M, k) of the masked frames, in row order.

        `features` (B, T, hidden) without dropout, `frames` (B,) valid ones, `mask` (B, T) bool.
        """
        hidden = encode(self.wav2vec2, features, frames, mask)[mask]
        if self.relu:
            hidden = F.relu(hidden)
        return [head(hidden) for head in self.heads]


def ptapt_loss(logits: Sequence[Tensor], labels: Tensor, mask: Tensor, total: int | None = None) -> PtaptLoss:
    """Return the loss of logits (M, k) for each k against `labels` (B, heads, T) int64 at the masked frames (B, T).

    Frames labelled -100 are left out. A batch in parts: pass `labelled_frames` of the whole batch as `total` with every part, and the
    parts' losses add up to that of the whole.
    """
    targets = labels.transpose(1, 2)[mask]  # (M, heads)
    known = targets != UNLABELLED
    labelled = int(known[:, 0].sum())
    losses = [F.cross_entropy(head.float(), targets[:, i], ignore_index=UNLABELLED, reduction="sum") for i, head in enumerate(logits)]
    correct = torch.stack([((head.argmax(-1) == targets[:, i]) & known[:, i]).sum() for i, head in enumerate(logits)])
    return PtaptLoss(torch.stack(losses).sum() / max(labelled if total is None else total, 1), correct, labelled)


def labelled_frames(labels: Tensor, mask: Tensor) -> int:
    """Return how many masked frames (B, T) have a label in (B, heads, T)."""
    return int(((labels[:, 0] != UNLABELLED) & mask).sum())


def crop_labels(labels: NDArray[np.integer], config: Wav2Vec2Config, start: int, samples: int) -> NDArray[np.int64]:
    """Return the labels (heads, frames) of the crop of `samples` samples from sample `start`, out of an utterance's (heads, all frames).

    Frame j of the crop takes the label of the utterance's frame nearest to it in time; -100 where there is none. Exact where `start` is a
    multiple of `hop_samples`. (The authors take `frame_count(start)` for the first label, which is negative for a start before the first
    whole frame: an uncropped utterance that is the longest of its batch loses all its labels.)
    """
    hop = hop_samples(config)
    return align_labels(labels[:, (start + hop // 2) // hop :], max(frame_count(config, samples), 1))


def align_labels(labels: NDArray[np.integer], frames: int) -> NDArray[np.int64]:
    """Cut (heads, any) labels to (heads, frames), or fill up with -100.

    The grids of wav2vec v1 and wav2vec 2.0 may differ by a frame at the end: 16 000 samples give 48 and 49.
    """
    aligned = np.full((labels.shape[0], frames), UNLABELLED, dtype=np.int64)
    kept = labels[:, :frames]
    aligned[:, : kept.shape[1]] = kept
    return aligned
