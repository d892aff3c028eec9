"""TAPT: the wav2vec 2.0 pretraining loss on in-domain speech, contrastive loss plus codebook diversity.

Negatives are any other frames of the same utterance, masked or not. In transformers 4.10.0, the version of the authors' container image,
they are any other frames of the padded row; in wav2vec 2.0 (section 3.2 of arXiv 2006.11477) and current transformers, masked frames only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ser_core.models.encoder import run_transformer
from ser_core.models.front_end import Extracted, encoder_of, extract, normalise, project
from ser_core.models.masking import BoolArray, row_masks
from ser_core.settings.backbone import Padding
from ser_core.settings.pretraining import NegativeFrames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

GUMBEL_TEMPERATURE = 1.0  # of the quantizer in transformers 4.10.0, not annealed in the authors' code; transformers 5 starts at 2

LEAST_GRADIENT = 1e-30  # smallest gradient of a code's logit that is not flushed to zero

PERPLEXITY_EPSILON = 1e-7  # keeps the logarithm of an unused code finite; value of fairseq and transformers 4.10.0


@dataclass(frozen=True)
class TaptDraw:
    """Random draws of a batch: `mask` (B, T) bool; `negatives` (M, N) of the masked frames in row order, flat indices row * T + frame."""

    mask: BoolArray
    negatives: NDArray[np.int64]

    def part(self, rows: slice, length: int) -> TaptDraw:
        """Return the draws of consecutive rows, cut to `length` frames; no masked frame or negative may lie beyond `length`."""
        counts = self.mask.sum(axis=1)
        first, last = int(counts[: rows.start].sum()), int(counts[: rows.stop].sum())
        row, frame = np.divmod(self.negatives[first:last], self.mask.shape[1])
        return TaptDraw(self.mask[rows, :length], (row - rows.start) * length + frame)


@dataclass(frozen=True)
class WholeBatch:
    """Sums over the whole batch that the loss of a micro-batch needs: `code_sums` (groups, entries) and the number of masked frames."""

    code_sums: Tensor
    masked: int


@dataclass(frozen=True)
class TaptLoss:
    """The loss of a batch and its terms, scalars except `code_sums`.

    `loss`: differentiable, summed over masked frames as in transformers. `contrastive`: summed cross-entropy. `diversity`: unused share of
    the codebook (0 to 1). `correct`: masked frames more similar to their target than to all negatives, of `masked`. `code_sums` (groups,
    entries): code probabilities summed over masked frames, from which `codebook_diversity` computes the diversity of several batches.
    `code_counts` (groups, entries): masked frames by their most likely code, without Gumbel noise.
    """

    loss: Tensor
    contrastive: Tensor
    diversity: Tensor
    correct: Tensor
    masked: int
    code_sums: Tensor
    code_counts: Tensor

    @property
    def per_frame(self) -> Tensor:
        """The mean loss per masked frame, comparable between batches."""
        return self.loss / max(self.masked, 1)


def draw_tapt(
    config: Wav2Vec2Config,
    frames: NDArray[np.integer],
    *,
    minimum: int,
    negatives: int,
    negative_frames: NegativeFrames,
    rngs: Sequence[np.random.Generator],
) -> TaptDraw:
    """Draw mask and negatives for rows with `frames` (B,) valid frames; T is their maximum.

    Mask probability and span length are those of `config`; `minimum` spans per row, `negatives` per masked frame. `rngs`: a generator for
    each row, or a single one for all rows, which then have equally many spans (see `row_masks`).
    """
    length = int(np.max(frames))
    mask = row_masks(frames, length, probability=config.mask_time_prob, span=config.mask_time_length, minimum=minimum, rngs=rngs)
    candidates = frames if negative_frames is NegativeFrames.valid else np.full_like(frames, length)
    return TaptDraw(mask, sample_negatives(mask, negatives, rngs, candidates))


def sample_negatives(
    mask: BoolArray, count: int, rngs: Sequence[np.random.Generator], candidates: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Draw `count` negatives for each masked frame: (M, count) int64, flat indices row * T + frame, never the frame itself.

    They are among the first `candidates` (B,) frames of the row, which must include the masked frames. If a row has no other frame, the
    frame itself is returned, and the loss ignores it. `rngs`: a generator for each row, or a single one for all rows.
    """
    length = mask.shape[1]
    drawn = []
    for row, pool in enumerate(candidates.tolist()):
        own = np.flatnonzero(mask[row])
        if len(own) == 0:
            continue
        if own[-1] >= pool:
            raise ValueError("a masked frame must be among the candidates for negatives")
        if pool == 1:
            chosen = np.zeros((1, count), dtype=np.int64)
        else:
            chosen = rngs[row % len(rngs)].integers(0, pool - 1, size=(len(own), count))
            chosen += chosen >= own[:, None]
        drawn.append(chosen + row * length)
    return np.concatenate(drawn).astype(np.int64) if drawn else np.zeros((0, count), dtype=np.int64)


def tapt_loss(
    model: Wav2Vec2ForPreTraining,
    waves: Sequence[Tensor] | Extracted,
    draw: TaptDraw,
    *,
    temperature: float = 0.1,
    diversity_weight: float = 0.1,
    padding: Padding = Padding.independent,
    attention_mask: bool = True,
    gumbel_temperature: float = GUMBEL_TEMPERATURE,
    samples: int = 0,
    whole: WholeBatch | None = None,
) -> TaptLoss:
    """Return the loss of a batch of waves (samples,), or of their `extract` output, with gradients.

    `padding`: how the front end processes the batch. Without `attention_mask` the transformer attends to padding too. The diversity term is
    added once to the sum over masked frames, as in the authors' transformers 4.10.0 (fairseq, and transformers since 4.12, multiply it by
    their number). In training mode dropout is active and codes are drawn with Gumbel noise from torch's default generator; in evaluation
    mode the most likely codes are used.

    For gradient accumulation pass the length of the batch's longest wave as `samples` and the summed `code_sums` of its micro-batches as
    `whole`: their losses (and gradients) then add up to those of the batch. `diversity` is this micro-batch's share.
    """
    encoder = encoder_of(model)
    extracted = waves if isinstance(waves, Extracted) else extract(model, waves, padding, samples)
    features = project(model, extracted, draw.mask.shape[1])
    device = features.projected.device
    mask = torch.from_numpy(draw.mask).to(device)
    if mask.shape != features.projected.shape[:2]:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for features of {tuple(features.projected.shape[:2])} frames")
    embedding = encoder.masked_spec_embed  # under autocast too, the residual stream has the type of the parameters
    hidden = torch.where(mask[..., None], embedding, features.projected.to(embedding.dtype))
    encoded = run_transformer(encoder, hidden, features.frames if attention_mask else None)
    predicted = model.project_hid(encoded[mask])

    # Only targets and negatives are quantized.
    drawn = torch.from_numpy(draw.negatives).to(device)
    used = mask.flatten().index_fill(0, drawn.flatten(), True).view_as(mask)
    quantized = _quantize(model, model.dropout_features(features.normalised[used]), mask[used], gumbel_temperature)
    position = used.flatten().long().cumsum(0) - 1
    positives, negatives = position[mask.flatten()], position[drawn]
    logits = _contrastive_logits(predicted, model.project_q(quantized.vectors), quantized.codes, positives, negatives) / temperature

    masked = int(draw.negatives.shape[0])
    target = torch.zeros(masked, dtype=torch.int64, device=device)
    contrastive = F.cross_entropy(logits, target, reduction="sum")
    diversity = codebook_diversity(quantized.sums, masked) if whole is None else _diversity_share(quantized.sums, masked, whole)
    correct = (logits.argmax(-1) == 0).sum()
    loss = contrastive + diversity_weight * diversity
    return TaptLoss(loss, contrastive, diversity, correct, masked, quantized.sums, quantized.counts)


@torch.no_grad()
def code_sums(
    model: Wav2Vec2ForPreTraining,
    waves: Sequence[Tensor] | Extracted,
    mask: BoolArray,
    *,
    padding: Padding = Padding.independent,
    samples: int = 0,
) -> Tensor:
    """Return the code probabilities (groups, entries) summed over the masked frames of `mask` (B, T), as in `tapt_loss`.

    They do not depend on the Gumbel noise, and on dropout only if the configuration has dropout before the quantizer (no published model
    has).
    """
    extracted = waves if isinstance(waves, Extracted) else extract(model, waves, padding, samples)
    normalised = normalise(model, extracted, mask.shape[1])
    counted = torch.from_numpy(mask).to(normalised.device)
    chosen = model.dropout_features(normalised[counted])
    return _quantize(model, chosen, torch.ones(len(chosen), dtype=torch.bool, device=chosen.device), GUMBEL_TEMPERATURE).sums


def _diversity_share(sums: Tensor, masked: int, whole: WholeBatch) -> Tensor:
    """Return a micro-batch's share of its batch's diversity, with the gradient of the batch's diversity.

    The diversity is not a sum over frames, but it is a function of the code sums: its gradient with respect to them follows from the sums
    of the whole batch, and each micro-batch contributes its own sums.
    """
    total = whole.code_sums.detach().requires_grad_()
    with torch.enable_grad():
        diversity = codebook_diversity(total, whole.masked)
        (slope,) = torch.autograd.grad(diversity, total)
    return diversity.detach() * (masked / max(whole.masked, 1)) + (slope * (sums - sums.detach())).sum()


def codebook_diversity(code_sums: Tensor, masked: int) -> Tensor:
    """Return the unused share of the codebook, 1 - perplexity / entries, a scalar, from sums (groups, entries) over `masked` frames.

    Diversity loss of wav2vec 2.0 as in fairseq and transformers: the perplexities of the groups are added up.
    """
    return 1 - code_perplexity(code_sums, masked).sum() / code_sums.numel()


def code_perplexity(code_sums: Tensor, masked: int) -> Tensor:
    """Return the exponential of the entropy of the codes of each group, (groups,), from sums (groups, entries) over `masked` frames.

    `prob_perplexity` of fairseq (GumbelVectorQuantizer) from sums of probabilities, `code_perplexity` from counts of the most likely code;
    fairseq adds the groups up. 1: all frames have the same code; `entries`: all codes are equally frequent.
    """
    mean = code_sums / max(masked, 1)
    return torch.exp(-(mean * torch.log(mean + PERPLEXITY_EPSILON)).sum(-1))


@dataclass(frozen=True)
class _Quantized:
    vectors: Tensor  # (K, codevector_dim)
    codes: Tensor  # (K, groups) int64
    sums: Tensor  # (groups, entries), over the counted frames
    counts: Tensor  # (groups, entries) float, counted frames by their most likely code, which is drawn with noise in training


def _quantize(model: Any, features: Tensor, counted: Tensor, temperature: float) -> _Quantized:
    """Quantize features (K, channels) with the model's codebooks; frames in `counted` (K,) bool contribute to the code sums.

    One matrix product per group: transformers materialises (K, groups * entries, size), gigabytes for a batch of the paper's length.
    """
    quantizer = model.quantizer
    groups, entries = quantizer.num_groups, quantizer.num_vars
    logits = quantizer.weight_proj(features).float().reshape(-1, entries)
    if logits.requires_grad:
        logits.register_hook(_flush)
    if model.training:
        chosen = F.gumbel_softmax(logits, tau=temperature, hard=True)
        probabilities = torch.softmax(logits, dim=-1)
    else:
        chosen = F.one_hot(logits.argmax(-1), entries).to(logits.dtype)
        probabilities = chosen
    chosen = chosen.view(-1, groups, entries)
    books = quantizer.codevectors.view(groups, entries, -1)
    vectors = torch.einsum("kge,ged->kgd", chosen.to(books.dtype), books).flatten(1)
    sums = probabilities.view(-1, groups, entries)[counted].sum(0)
    return _Quantized(vectors, chosen.argmax(-1), sums, _histogram(logits.detach().argmax(-1).view(-1, groups)[counted], entries))


def _histogram(codes: Tensor, entries: int) -> Tensor:
    """Count codes (K, groups) int64: (groups, entries) float32. Unlike `torch.bincount` it does not wait for a GPU."""
    groups = codes.shape[1]
    flat = (codes + entries * torch.arange(groups, device=codes.device)).flatten()
    counts = torch.zeros(groups * entries, device=codes.device)
    return counts.index_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype)).view(groups, entries)


def _flush(gradient: Tensor) -> Tensor:
    """Flush tiny gradients to zero: those of very unlikely codes are subnormal, which slows matrix products on a CPU."""
    return gradient.masked_fill(gradient.abs() < LEAST_GRADIENT, 0)


def _contrastive_logits(predicted: Tensor, quantized: Tensor, codes: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Return cosine similarities (M, 1 + N), the positive first; -inf for a negative with the same codes as the positive."""
    with torch.autocast(predicted.device.type, enabled=False):
        # One matrix product over all quantized frames, instead of gathering negatives (M, N, size).
        similarity = F.normalize(predicted.float(), dim=-1, eps=1e-8) @ F.normalize(quantized.float(), dim=-1, eps=1e-8).T
    positive = similarity.gather(1, positives[:, None])
    negative = similarity.gather(1, negatives)
    same = (codes[positives][:, None] == codes[negatives]).all(-1)
    return torch.cat([positive, negative.masked_fill(same, float("-inf"))], dim=1)
