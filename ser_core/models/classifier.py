"""Fine-tuning network (section 2.2): transformer encoder on frozen features, masked mean over frames, linear head; weighted loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ser_core.errors import InputError
from ser_core.models.adaptors import AdaptorShape, Bottleneck, Gate, LayerSum, LowRank, adaptor_names, attach
from ser_core.models.encoder import run_states, run_transformer
from ser_core.models.front_end import valid_frames
from ser_core.models.trained import below, train_only
from ser_core.settings.finetune import Pooling

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model


@dataclass(frozen=True)
class ClassifierAdaptors:
    """What a classifier trains beside its head; by default nothing (head only)."""

    shape: AdaptorShape = field(default_factory=AdaptorShape)
    layer_sum: bool = False  # classify the weighted sum of all layers' states instead of the last layer's output


class EmotionClassifier(nn.Module):
    """Emotion logits from projected features.

    Trained are the encoder's transformer (positional convolution and norms included) and the head; with `adaptors` only these, the
    weighted sum of layers and the head. Convolutions, projection and mask embedding are always frozen. Dropout and layer drop are those of
    the encoder's configuration.
    """

    def __init__(
        self,
        encoder: Wav2Vec2Model,
        classes: int,
        pooling: Pooling = Pooling.paper,
        adaptors: ClassifierAdaptors | None = None,
        projector: int = 0,  # units of a linear layer on every frame, whose plain mean the head classifies; 0: none, `pooling` decides
    ) -> None:
        super().__init__()
        self.wav2vec2: Any = encoder
        self.pooling = pooling
        self.head = nn.Linear(projector or encoder.config.hidden_size, classes)
        self.projector = nn.Linear(encoder.config.hidden_size, projector) if projector else None
        self.layer_sum: LayerSum | None = None
        head = below(self, "head", *(("projector",) if projector else ()))
        if adaptors is None:
            train_only(self, [*below(self, "wav2vec2.encoder"), *head])
            return
        attach(encoder, adaptors.shape)
        if adaptors.layer_sum:
            self.layer_sum = LayerSum(encoder.config.num_hidden_layers + 1)
        train_only(self, [*adaptor_names(self), *head])

    def forward(self, features: Tensor, frames: Tensor, time_mask: Tensor | None = None, feature_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, classes).

        `features` (B, T, hidden): output of the front end without dropout. `frames` (B,): numbers of valid frames. Frames in `time_mask`
        (B, T) bool are replaced by the learned mask embedding, channels in `feature_mask` (B, hidden) bool are then set to zero.
        """
        logits: Tensor = self.head(self.pooled(features, frames, time_mask, feature_mask))
        return logits

    def pooled(self, features: Tensor, frames: Tensor, time_mask: Tensor | None = None, feature_mask: Tensor | None = None) -> Tensor:
        """Return the input of the last layer: (B, hidden), or (B, units) behind a projector."""
        masked = mask(self.wav2vec2, features, time_mask, feature_mask)
        if self.layer_sum is None:
            hidden = run_transformer(self.wav2vec2, masked, frames)
        else:
            hidden = self.layer_sum(run_states(self.wav2vec2, masked, frames))
        return pool(hidden, frames, self.pooling) if self.projector is None else mean_frames(self.projector(hidden), frames)


def parameters_of(model: EmotionClassifier, parts: Iterable[str]) -> list[str]:
    """Return the names of the trained parameters of parts of a classifier, by names of `TrainedPart`.

    Raises ValueError for a part without any.
    """
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    head = [name for name in trained if name.partition(".")[0] in ("head", "projector")]
    kinds = {"ba": Bottleneck, "lora": LowRank, "ws": LayerSum, "wg": Gate}
    found: list[str] = []
    for part in parts:
        if part == "head":
            names = head
        elif part == "transformer":
            adaptors = set(adaptor_names(model))
            names = [name for name in trained if name not in head and name not in adaptors]
        else:
            names = adaptor_names(model, kinds[part])
        if not names:
            raise ValueError(f"{part}: no part of this classifier is trained under that name")
        found += names
    return found


def encode(encoder: Any, features: Tensor, frames: Tensor, time_mask: Tensor | None = None, feature_mask: Tensor | None = None) -> Tensor:
    """Run the transformer over projected features: (B, T, hidden) -> (B, T, hidden). Attention ignores padding."""
    return run_transformer(encoder, mask(encoder, features, time_mask, feature_mask), frames)


def mask(encoder: Any, features: Tensor, time_mask: Tensor | None = None, feature_mask: Tensor | None = None) -> Tensor:
    """Apply the projection's dropout and the masks to projected features (B, T, hidden), which are not modified."""
    dropout = encoder.feature_projection.dropout
    hidden: Tensor = dropout(features)
    if time_mask is not None:
        hidden = torch.where(time_mask[..., None], encoder.masked_spec_embed.to(hidden.dtype), hidden)
    if feature_mask is not None:
        hidden = hidden.masked_fill(feature_mask[:, None, :], 0)
    return hidden


def pool(hidden: Tensor, frames: Tensor, pooling: Pooling) -> Tensor:
    """Average frames: (B, T, hidden) with (B,) valid frames -> (B, hidden).

    `paper` (section 2.2): mean over the valid frames, then ReLU. `reference` (authors' code): ReLU first, and the mean omits the last valid
    frame (except for an utterance of one frame, for which the authors' code divides by zero).
    """
    counted = frames
    if pooling is Pooling.reference:
        hidden = F.relu(hidden)
        counted = (frames - 1).clamp(min=1)
    return F.relu(mean_frames(hidden, counted))


def mean_frames(hidden: Tensor, frames: Tensor) -> Tensor:
    """Return the mean over the first frames of each row: (B, T, hidden) with (B,) frames -> (B, hidden)."""
    weights = valid_frames(frames, hidden.shape[1]).to(hidden.dtype)
    return (hidden * weights[..., None]).sum(1) / frames[:, None].to(hidden.dtype)


def class_weights(counts: Sequence[int]) -> Tensor:
    """Return weights (classes,): inverse class frequencies, normalised to sum 1 (authors' code). Raises InputError for a zero count."""
    if not counts or min(counts) <= 0:
        raise InputError(f"class counts {list(counts)}: every class needs at least one utterance in the training split")
    inverse = torch.tensor(list(counts), dtype=torch.float64).reciprocal()
    return (inverse / inverse.sum()).float()


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, total_weight: Tensor | float | None = None) -> Tensor:
    """Return the weighted mean cross-entropy, sum(w * ce) / sum(w), of (N, classes) logits and (N,) int64 labels.

    For gradient accumulation pass `label_weight` of the whole batch's labels as `total_weight`: the losses (and gradients) of its
    micro-batches then add up to those of the batch.
    """
    total = label_weight(labels, weights) if total_weight is None else total_weight
    return F.cross_entropy(logits.float(), labels, weight=weights, reduction="sum") / total


def label_weight(labels: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of the class weights of (N,) labels, a scalar tensor."""
    return weights[labels].sum()
