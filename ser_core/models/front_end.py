"""Front end: waves to projected features (convolutions, layer norm, projection), for each utterance alone or for a zero-padded batch.

wav2vec2-base has a group norm over time after its first convolution, so zero padding changes all features of an utterance. The
`independent` functions compute each utterance as if it were alone in the batch. The `padded` ones do what the authors' code does, with
transformers' modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ser_core.models.backbone import frame_count, minimum_samples
from ser_core.models.convolutions import convolve, supports
from ser_core.models.model_types import NORMALISE_KEY
from ser_core.settings.backbone import Padding

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForPreTraining, Wav2Vec2Model

NORMALISE_EPSILON = 1e-7  # of the variance; transformers.Wav2Vec2FeatureExtractor


@dataclass(frozen=True)
class FrontEnd:
    """Output of the front end for a batch.

    `projected` (B, T, hidden) is the transformer's input, `normalised` (B, T, channels) the quantizer's, `frames` (B,) int64 the numbers of
    valid frames. After its valid frames a row of `independent` features is zero, a row of `padded` ones is not.
    """

    projected: Tensor
    normalised: Tensor
    frames: Tensor


@dataclass(frozen=True)
class Extracted:
    """Output of the convolutions, before projection and dropout, hence deterministic.

    `rows`: (B, T, channels) of a padded batch, or the concatenated valid frames of all utterances (frames, channels).
    """

    rows: Tensor
    frames: tuple[int, ...]  # valid frames of each utterance


def project_independent(model: Wav2Vec2Model | Wav2Vec2ForPreTraining, waves: Sequence[Tensor]) -> list[Tensor]:
    """Return the features of each utterance, (frames, hidden), without gradient and without dropout.

    `waves` are float tensors (samples,); one shorter than one frame is padded with zeros to one frame. The features of an utterance are
    bit-identical whatever the other utterances.
    """
    encoder = encoder_of(model)
    with torch.no_grad():
        # One at a time: the rounding of a matrix product may depend on its number of rows.
        return [_project(encoder, _convolve_apart(encoder, [wave])[0]) for wave in _prepared(encoder, waves)]


def project_padded(model: Wav2Vec2Model | Wav2Vec2ForPreTraining, waves: Sequence[Tensor], samples: int = 0) -> tuple[Tensor, Tensor]:
    """Return features (B, T, hidden) of zero-padded utterances as in the authors' code, without gradient or dropout, and frames (B,) int64.

    The features of an utterance depend on the length of the longest wave of the batch only. For a micro-batch pass that length as `samples`
    to get the features of the whole batch.
    """
    encoder = encoder_of(model)
    prepared = _prepared(encoder, waves)
    with torch.no_grad():
        features = _project(encoder, _convolve(encoder, _stacked(prepared, samples)))
    return features, _frames(encoder, prepared)


def run_front_end(model: Wav2Vec2Model | Wav2Vec2ForPreTraining, waves: Sequence[Tensor], padding: Padding, samples: int = 0) -> FrontEnd:
    """Run convolutions and projection with gradient and with the model's dropout, for stages that train the front end.

    `samples` as for `project_padded`; ignored for `independent` padding.
    """
    return project(model, extract(model, waves, padding, samples))


def extract(model: Wav2Vec2Model | Wav2Vec2ForPreTraining, waves: Sequence[Tensor], padding: Padding, samples: int = 0) -> Extracted:
    """Run the convolutions alone, with gradient; arguments as for `run_front_end`."""
    encoder = encoder_of(model)
    prepared = _prepared(encoder, waves)
    frames = tuple(frame_count(encoder.config, len(wave)) for wave in prepared)
    if padding is Padding.reference:
        return Extracted(_convolve(encoder, _stacked(prepared, samples)), frames)
    return Extracted(torch.cat(_convolve_apart(encoder, prepared)), frames)


def project(model: Wav2Vec2Model | Wav2Vec2ForPreTraining, extracted: Extracted, length: int = 0) -> FrontEnd:
    """Apply layer norm and projection to the output of the convolutions, with the model's dropout.

    `length`: frames that T has at least, with zeros after the frames of `independent` rows.
    """
    projection = encoder_of(model).feature_projection
    normalised = _normed(projection, extracted.rows)
    projected = projection.dropout(projection.projection(normalised))
    frames = torch.tensor(extracted.frames, dtype=torch.int64, device=projected.device)
    return FrontEnd(_padded(projected, extracted.frames, length), _padded(normalised, extracted.frames, length), frames)


def normalise(model: Wav2Vec2Model | Wav2Vec2ForPreTraining, extracted: Extracted, length: int = 0) -> Tensor:
    """Return the quantizer's input (B, T, channels): `normalised` of `project`, without computing the projection."""
    return _padded(encoder_of(model).feature_projection.layer_norm(extracted.rows), extracted.frames, length)


def valid_frames(frames: Tensor, length: int) -> Tensor:
    """Return (B, length) bool, True for the first `frames` (B,) frames of each row."""
    return torch.arange(length, device=frames.device)[None] < frames[:, None]


def encoder_of(model: Any) -> Any:
    """Return the Wav2Vec2Model inside a model with heads, or the model itself (of any kind)."""
    return getattr(model, "wav2vec2", model)


def _prepared(encoder: Any, waves: Sequence[Tensor]) -> list[Tensor]:
    """Return the waves on the model's device, normalised if the model expects it, padded to at least one frame."""
    weight = encoder.feature_projection.projection.weight
    shortest = minimum_samples(encoder.config)
    normalise = bool(getattr(encoder.config, NORMALISE_KEY, False))
    prepared = []
    for wave in waves:
        samples = wave.to(device=weight.device, dtype=weight.dtype, non_blocking=True)
        if normalise:
            samples = (samples - samples.mean()) / torch.sqrt(samples.var(unbiased=False) + NORMALISE_EPSILON)
        prepared.append(F.pad(samples, (0, max(shortest - len(samples), 0))))
    return prepared


def _stacked(waves: Sequence[Tensor], samples: int) -> Tensor:
    """Stack waves to (B, samples) with zero padding, at least `samples` long."""
    stacked = pad_sequence(list(waves), batch_first=True)
    return F.pad(stacked, (0, max(samples - stacked.shape[1], 0)))


def _frames(encoder: Any, waves: Sequence[Tensor]) -> Tensor:
    device = encoder.feature_projection.projection.weight.device
    return torch.tensor([frame_count(encoder.config, len(wave)) for wave in waves], dtype=torch.int64, device=device)


def _padded(rows: Tensor, frames: Sequence[int], length: int) -> Tensor:
    """Concatenated frames (frames, n) as (B, T, n) with zero padding, T at least `length`; a padded batch unchanged."""
    if rows.dim() == 3:
        return rows
    padded = pad_sequence(list(torch.split(rows, list(frames))), batch_first=True)
    return F.pad(padded, (0, 0, 0, max(length - padded.shape[1], 0)))


def _convolve_apart(encoder: Any, waves: Sequence[Tensor]) -> list[Tensor]:
    """Convolutional features (frames, channels) of each wave, computed as if each were alone."""
    if supports(encoder.feature_extractor):
        return convolve(encoder.feature_extractor, waves)
    return [_convolve(encoder, wave[None])[0] for wave in waves]


def _convolve(encoder: Any, waves: Tensor) -> Tensor:
    """(B, samples) -> (B, T, channels)."""
    features: Tensor = encoder.feature_extractor(waves)
    return features.transpose(1, 2)


def _project(encoder: Any, features: Tensor) -> Tensor:
    """(..., channels) -> (..., hidden), without the projection's dropout, which is applied at every training step."""
    projection = encoder.feature_projection
    projected: Tensor = projection.projection(_normed(projection, features))
    return projected


def _normed(projection: Any, features: Tensor) -> Tensor:
    """Layer norm of convolutional features before the projection; a HuBERT may have none."""
    normed: Tensor = projection.layer_norm(features) if getattr(projection, "feat_proj_layer_norm", True) else features
    return normed
