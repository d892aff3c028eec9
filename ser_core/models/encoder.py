"""A faster CPU implementation of the transformer of wav2vec 2.0 and its relatives, with transformers' weights, equal up to rounding.

Differences from transformers' encoder, each measured in docs/speed.md:

- utterances are concatenated without padding; attention is computed for each utterance;
- dropout compares raw bits of a fast generator, seeded from torch's default one, with a threshold: one pass forward, one backward;
- an attention block and a feed-forward block are one autograd node each, which saves few tensors and works in place;
- the positional convolution is computed with a Fourier transform (overlap-save, blocks of the kernel's length);
- gradients of weights that are not trained are not computed, and LoRA costs two products of its rank.

`run_transformer` and `run_states` are the entry points. On a GPU, with eager attention (as in the authors' code) and for every encoder that
holds anything `is_known` does not list they call transformers' encoder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ser_core.models.adaptors import AdaptedBlock, block_of, low_rank_of
from ser_core.models.front_end import valid_frames
from ser_core.models.known_encoder import is_known, is_stable
from ser_core.models.transformers_encoder import by_transformers

STREAMS = 2  # generators that draw bits in parallel; a constant, so that the bits do not depend on the number of threads
PARALLEL_DRAW_WORDS = 1 << 15  # 64-bit words from which a second thread saves time

aten: Any = torch.ops.aten


def run_transformer(encoder: Any, hidden: Tensor, frames: Tensor | None) -> Tensor:
    """Run the transformer of an encoder (such as `Wav2Vec2Model`) over projected features: (B, T, hidden) -> (B, T, hidden).

    `frames` (B,): the number of valid frames of each row; None: all. Attention ignores the padding after them; its output is undefined.
    """
    return _transformed(encoder.encoder, hidden, frames, states=False)[0]


def run_states(encoder: Any, hidden: Tensor, frames: Tensor | None) -> list[Tensor]:
    """Return the states of the L layers: the input of the first block and the output of every block, L + 1 tensors (B, T, hidden).

    A block that layer drop leaves out repeats its input. The layer norm after the last block of a stable-layer-norm model is not applied.
    """
    return _transformed(encoder.encoder, hidden, frames, states=True)[1]


def _transformed(encoder: Any, hidden: Tensor, frames: Tensor | None, *, states: bool) -> tuple[Tensor, list[Tensor]]:
    """Output (B, T, hidden), and with `states` the states of the layers."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    if hidden.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not is_known(encoder):
        valid = None if frames is None else valid_frames(frames, hidden.shape[1])
        return by_transformers(encoder, hidden, valid, states=states)
    batch, length, _ = hidden.shape
    lengths = [length] * batch if frames is None else frames.tolist()
    with torch.autocast("cpu", enabled=False):
        # Features that were projected under autocast are bfloat16; between the layers everything is float32.
        packed, kept = _run(encoder, _packed(hidden, lengths).float(), lengths, dtype)

    def padded(rows: Tensor) -> Tensor:
        found = pad_sequence(list(torch.split(rows, lengths)), batch_first=True)
        return F.pad(found, (0, 0, 0, length - found.shape[1]))

    return padded(packed), [padded(each) for each in kept] if states else []


def _packed(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Concatenate the valid rows of (B, T, hidden): (frames, hidden)."""
    flat = hidden.flatten(0, 1)
    if sum(lengths) == len(flat):
        return flat
    length = hidden.shape[1]
    pieces = [size for each in lengths for size in (each, length - each)]
    return torch.cat(torch.split(flat, pieces)[::2])


def _run(encoder: Any, hidden: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Run the encoder over packed rows (frames, hidden), with matrix products in `dtype`; also return the states of the layers."""
    config, training = encoder.config, encoder.training
    stable = is_stable(encoder)
    hidden = hidden + _positions(encoder.pos_conv_embed, hidden, lengths)
    if not stable:
        hidden = encoder.layer_norm(hidden)
    hidden = F.dropout(hidden, config.hidden_dropout, training)
    # Layer drop: one random number per layer, as in transformers, drawn before the seed of the dropout masks.
    dropped = [training and config.layerdrop > 0 and float(torch.rand([])) < config.layerdrop for _ in encoder.layers]
    dropout_bits = DropoutBits.seeded() if training else None
    states = [hidden]
    for layer, is_dropped in zip(encoder.layers, dropped, strict=True):
        if not is_dropped:
            hidden = _block(block_of(layer), hidden, lengths, dropout_bits, dtype, stable=stable)
            if type(layer) is AdaptedBlock:
                with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                    hidden = layer.adapt(hidden)
        states.append(hidden)
    if stable:
        hidden = encoder.layer_norm(hidden)
    return hidden, states


def _block(
    block: Any, hidden: Tensor, lengths: Sequence[int], dropout_bits: DropoutBits | None, dtype: torch.dtype, *, stable: bool
) -> Tensor:
    attention, feed_forward = block.attention, block.feed_forward
    first = (lengths, attention.num_heads, attention.dropout, block.dropout.p, dropout_bits, dtype)
    second = (feed_forward.intermediate_dropout.p, feed_forward.output_dropout.p, dropout_bits, dtype)
    if stable:
        hidden = _attend(attention, hidden, block.layer_norm(hidden), first)
        return _feed_forward(feed_forward, hidden, block.final_layer_norm(hidden), second)
    hidden = block.layer_norm(_attend(attention, hidden, hidden, first))
    output: Tensor = block.final_layer_norm(_feed_forward(feed_forward, hidden, hidden, second))
    return output


class DropoutBits:
    """Dropout masks from random bits: a float of random bits is at or below a threshold (`threshold_for`) with the dropout probability.

    `threshold_backward(x, bits, threshold)` keeps x where bits > threshold, so it applies dropout in one pass, and likewise to the
    gradient. NaN bit patterns do not compare as below the threshold; they keep x.
    """

    def __init__(self, seed: int) -> None:
        self._streams = [np.random.SFC64(each) for each in np.random.SeedSequence(seed).spawn(STREAMS)]

    @classmethod
    def seeded(cls) -> DropoutBits:
        """Create one with a seed from torch's default generator."""
        return cls(int(torch.randint(1 << 62, ())))

    def bits(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of `shape` and `dtype` with random bits."""
        count = math.prod(shape)
        words = -(-count * dtype.itemsize // (8 * STREAMS))
        drawn = np.empty((STREAMS, words), np.uint64)

        def draw(stream: int) -> None:
            drawn[stream] = self._streams[stream].random_raw(words)

        if words < PARALLEL_DRAW_WORDS or torch.get_num_threads() == 1:
            for stream in range(STREAMS):
                draw(stream)
        else:
            list(_pool().map(draw, range(STREAMS)))
        return torch.from_numpy(drawn.reshape(-1)).view(dtype)[:count].view(shape)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(STREAMS, thread_name_prefix="bits")


@functools.cache
def threshold_for(probability: float, dtype: torch.dtype) -> float:
    """Return the (negative) number that random bits of `dtype` are at or below with `probability` (at most `MAX_DROPOUT`)."""
    bits = 8 * dtype.itemsize
    infinity = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80}[dtype]
    # The bit patterns from the threshold to minus infinity, both included, are the share `probability` of all 2^bits.
    magnitude = infinity + 1 - round(probability * 2**bits)
    integer = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    return -float(torch.tensor(magnitude, dtype=integer).view(dtype))


def _drop(values: Tensor, bits: Tensor | None, probability: float) -> Tensor:
    """Apply dropout in place, without the scale 1 / (1 - probability), which is merged into a matrix product."""
    if bits is not None:
        aten.threshold_backward.grad_input(values, bits, threshold_for(probability, values.dtype), grad_input=values)
    return values


def _dropped(values: Tensor, bits: Tensor | None, probability: float) -> Tensor:
    """`_drop`, out of place."""
    if bits is None:
        return values
    result: Tensor = aten.threshold_backward(values, bits, threshold_for(probability, values.dtype))
    return result


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale * left @ right, for matrices or batches of matrices."""
    if left.dim() == 2:
        return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=scale)
    return torch.baddbmm(left.new_zeros(()), left, right, beta=0, alpha=scale)


def _attend(attention: Any, residual: Tensor, hidden: Tensor, options: tuple[Any, ...]) -> Tensor:
    scales, tensors = _tensors(attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    output: Tensor = _Attention.apply((*options, scales), residual, hidden, *tensors)  # type: ignore[no-untyped-call]
    return output


def _feed_forward(block: Any, residual: Tensor, hidden: Tensor, options: tuple[Any, ...]) -> Tensor:
    scales, tensors = _tensors(block.intermediate_dense, block.output_dense)
    output: Tensor = _FeedForward.apply((*options, scales), residual, hidden, *tensors)  # type: ignore[no-untyped-call]
    return output


def _tensors(*projections: Any) -> tuple[list[float], list[Tensor | None]]:
    """LoRA scale of each projection, and its weight, bias, LoRA down and up (None without LoRA)."""
    scales, tensors = [], []
    for projection in projections:
        low_rank = low_rank_of(projection)
        if low_rank is None:
            scales.append(0.0)
            tensors += [projection.weight, projection.bias, None, None]
        else:
            scales.append(low_rank.scale)
            tensors += [projection.parametrizations.weight.original, projection.bias, low_rank.down, low_rank.up]
    return scales, tensors


def _effective(tensors: Sequence[Tensor | None], scales: Sequence[float], dtype: torch.dtype) -> list[Any]:
    """Weight and bias of each projection in `dtype`, LoRA added to the weight."""
    found: list[Any] = []
    for number, scale in enumerate(scales):
        weight, bias, down, up = tensors[4 * number : 4 * number + 4]
        if weight is None or bias is None:
            raise ValueError("a projection needs weight and bias")
        merged = weight if down is None or up is None else torch.addmm(weight, up, down, alpha=scale)
        found += [merged.to(dtype), bias.to(dtype)]
    return found


class _ProjectionGradients:
    """Gradients of the parameters of projections, of those that require one: four places for each, as in `_tensors`."""

    def __init__(self, needed: Sequence[bool], adapted: Sequence[Tensor | None], scales: Sequence[float]) -> None:
        self._needed, self._adapted, self._scales = needed, adapted, scales  # adapted: LoRA down and up of each projection
        self.found: list[Tensor | None] = [None] * (4 * len(scales))

    def needs(self, *projections: int) -> bool:
        """Whether any parameter of these projections requires a gradient."""
        return any(any(self._needed[4 * number : 4 * number + 4]) for number in projections)

    def add(self, number: int, gradient: Tensor, inputs: Tensor, scale: float | None = None, bias_scale: float = 1.0) -> None:
        """Compute the gradients from that of the projection's output (rows, outputs), times `scale`, and its input (rows, inputs).

        `bias_scale` is that of the output alone. Gradients that no parameter requires are not computed.
        """
        weight, bias, down, up = self._needed[4 * number : 4 * number + 4]
        place = 4 * number
        if weight:
            self.found[place] = torch.mm(gradient.t(), inputs) if scale is None else _scaled_product(gradient.t(), inputs, scale)
        if bias:
            self.found[place + 1] = gradient.sum(0) if scale is None else gradient.sum(0) * bias_scale
        if down or up:
            factors = [each.to(inputs.dtype) for each in self._adapted[2 * number : 2 * number + 2] if each is not None]
            both = self._scales[number] * (1.0 if scale is None else scale)
            self.found[place + 2] = _scaled_product(torch.mm(gradient, factors[1]).t(), inputs, both)
            self.found[place + 3] = _scaled_product(gradient.t(), torch.mm(inputs, factors[0].t()), both)

    def in_type(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [None if each is None else each.to(dtype) for each in self.found]


class _Attention(torch.autograd.Function):
    """residual + dropout(out_proj(attention(hidden))) on packed rows (frames, hidden); `tensors`: q, k, v, out of `_tensors`."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], residual: Tensor, hidden: Tensor, *tensors: Tensor | None) -> Tensor:
        lengths, heads, inner, outer, dropout_bits, dtype, scales = options
        inner, outer = (inner, outer) if dropout_bits is not None else (0.0, 0.0)
        x = hidden.to(dtype)
        wq, bq, wk, bk, wv, bv, wo, bo = _effective(tensors, scales, dtype)
        q, k, v = torch.addmm(bq, x, wq.t()), torch.addmm(bk, x, wk.t()), torch.addmm(bv, x, wv.t())
        merged = torch.empty_like(q)
        scaling = (x.shape[1] // heads) ** -0.5
        probabilities: list[Tensor] = []
        kept: list[Tensor] = []
        for q_, k_, v_, merged_ in zip(*(_heads(each, lengths, heads) for each in (q, k, v, merged)), strict=True):
            p = torch.softmax(_scaled_product(q_, k_.transpose(1, 2), scaling), -1)
            probabilities.append(p)
            if inner:
                bits = dropout_bits.bits(tuple(p.shape), dtype)
                # The result overwrites the bits.
                p = aten.threshold_backward.grad_input(p, bits, threshold_for(inner, dtype), grad_input=bits)
                kept.append(p)
            merged_.copy_(_scaled_product(p, v_, 1 / (1 - inner)))
        bits = dropout_bits.bits(tuple(x.shape), dtype) if outer else None
        output = _drop(torch.addmm(bo, merged, wo.t()), bits, outer)
        adapted = [each for number in range(4) for each in tensors[4 * number + 2 : 4 * number + 4]]
        needed = ctx.needs_input_grad[3:]  # x and merged are only factors of the gradients of projections
        inputs = (x if any(needed[:12]) else None, merged if any(needed[12:]) else None)
        ctx.save_for_backward(*inputs, q, k, v, bits, wq, wk, wv, wo, *adapted, *probabilities, *kept)
        ctx.facts = (lengths, heads, inner, outer, scaling, scales)
        return torch.add(residual, output, alpha=1 / (1 - outer))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        lengths, heads, inner, outer, scaling, scales = ctx.facts
        x, merged, q, k, v, bits, wq, wk, wv, wo, *saved = ctx.saved_tensors
        adapted, saved = saved[:8], saved[8:]
        probabilities, kept = saved[: len(lengths)], saved[len(lengths) :]
        scale, inner_scale = 1 / (1 - outer), 1 / (1 - inner)
        found = _ProjectionGradients(ctx.needs_input_grad[3:], adapted, scales)
        g = _dropped(gradient.to(q.dtype), bits, outer)
        if found.needs(3):
            found.add(3, g, merged, scale, scale)
        dx = None
        if ctx.needs_input_grad[2] or found.needs(0, 1, 2):
            dmerged = _scaled_product(g, wo, scale)
            dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            rows = zip(*(_heads(each, lengths, heads) for each in (q, k, v, dmerged, dq, dk, dv)), strict=True)
            for number, (q_, k_, v_, dmerged_, dq_, dk_, dv_) in enumerate(rows):
                p = probabilities[number]
                p_kept = kept[number] if kept else p
                dv_.copy_(_scaled_product(p_kept.transpose(1, 2), dmerged_, inner_scale))
                dp = _scaled_product(dmerged_, v_.transpose(1, 2), inner_scale)
                if kept:  # probabilities that dropout kept are above zero
                    aten.threshold_backward.grad_input(dp, p_kept, 0.0, grad_input=dp)
                ds = aten._softmax_backward_data(dp, p, -1, p.dtype)
                dq_.copy_(_scaled_product(ds, k_, scaling))
                dk_.copy_(_scaled_product(ds.transpose(1, 2), q_, scaling))
            if ctx.needs_input_grad[2]:
                dx = torch.mm(dq, wq).addmm_(dk, wk).addmm_(dv, wv).to(gradient.dtype)
            for number, each in enumerate((dq, dk, dv)):
                found.add(number, each, x)
        return None, gradient, dx, *found.in_type(gradient.dtype)


class _FeedForward(torch.autograd.Function):
    """residual + dropout(output_dense(dropout(gelu(intermediate_dense(hidden))))) on packed rows (frames, hidden)."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], residual: Tensor, hidden: Tensor, *tensors: Tensor | None) -> Tensor:
        inner, outer, dropout_bits, dtype, scales = options
        inner, outer = (inner, outer) if dropout_bits is not None else (0.0, 0.0)
        x = hidden.to(dtype)
        w1, b1, w2, b2 = _effective(tensors, scales, dtype)
        u = torch.addmm(b1, x, w1.t())
        inner_bits = dropout_bits.bits(tuple(u.shape), dtype) if inner else None
        h = _drop(F.gelu(u), inner_bits, inner)
        outer_bits = dropout_bits.bits(tuple(x.shape), dtype) if outer else None
        output = _drop(torch.addmm(b2, h, w2.t(), alpha=1 / (1 - inner)), outer_bits, outer)
        needed = ctx.needs_input_grad[3:]  # x and h are only factors of the gradients of projections
        inputs = (x if any(needed[:4]) else None, h if any(needed[4:]) else None)
        ctx.save_for_backward(*inputs, u, inner_bits, outer_bits, w1, w2, *tensors[2:4], *tensors[6:8])
        ctx.facts = (inner, outer, scales)
        return torch.add(residual, output, alpha=1 / (1 - outer))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inner, outer, scales = ctx.facts
        x, h, u, inner_bits, outer_bits, w1, w2, *adapted = ctx.saved_tensors
        scale = 1 / (1 - outer)
        both = scale / (1 - inner)
        found = _ProjectionGradients(ctx.needs_input_grad[3:], adapted, scales)
        g = _dropped(gradient.to(u.dtype), outer_bits, outer)
        if found.needs(1):
            found.add(1, g, h, both, scale)
        dx = None
        if ctx.needs_input_grad[2] or found.needs(0):
            du = _drop(_scaled_product(g, w2, both), inner_bits, inner)
            aten.gelu_backward.grad_input(du, u, grad_input=du)
            if ctx.needs_input_grad[2]:
                dx = torch.mm(du, w1).to(gradient.dtype)
            found.add(0, du, x)
        return None, gradient, dx, *found.in_type(gradient.dtype)


def _heads(rows: Tensor, lengths: Sequence[int], heads: int) -> list[Tensor]:
    """Return a view (heads, frames, head size) of each utterance in packed rows (frames, hidden)."""
    return [each.view(len(each), heads, -1).transpose(0, 1) for each in torch.split(rows, list(lengths))]


def _positions(embedding: Any, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Positional embedding gelu(convolution) of packed rows (frames, hidden), each utterance zero-padded.

    The stack of small convolutions of data2vec is computed by transformers, for each utterance alone.
    """
    if not hasattr(embedding, "conv"):
        return torch.cat([embedding(rows[None])[0] for rows in torch.split(hidden, list(lengths))])
    convolution = embedding.conv
    weight: Tensor = convolution.weight  # (hidden, hidden / groups, kernel); weight norm recomputes it at each access
    kernel, groups = weight.shape[2], convolution.groups
    before = kernel // 2
    # Zeros before the first utterance and after each, then up to whole blocks; the last block is read only.
    gap = hidden.new_zeros(before, hidden.shape[1])
    total = sum(lengths) + before * len(lengths)
    blocks = -(-total // kernel)
    pieces = [gap]
    for rows in torch.split(hidden, list(lengths)):
        pieces += [rows, gap]
    pieces.append(hidden.new_zeros((blocks + 1) * kernel - total - before, hidden.shape[1]))
    convolved = _correlate(torch.cat(pieces), weight, groups)
    sizes = [size for each in lengths for size in (each, before)]
    valid = torch.cat(torch.split(convolved[:total], sizes)[::2])
    output: Tensor = F.gelu(valid + convolution.bias)
    return output


def _correlate(rows: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Correlate (blocks * kernel + kernel, channels) with (channels, channels / groups, kernel): (blocks * kernel, channels).

    Row t is the sum over k of row t + k times the weights of tap k. Windows of two blocks are Fourier-transformed, multiplied, and
    transformed back. Spectra are stored as real tensors: cosine part, sine part. The transforms are matrix products, which write the layout
    that the next product reads.
    """
    channels, size, kernel = weight.shape
    analysis, synthesis, signs = (each.to(rows.dtype) for each in _spectral_matrices(kernel))
    count = len(signs)  # frequencies
    # Shifted by half a window, a block has the same spectrum except for the sign of odd frequencies.
    halves = torch.matmul(analysis, rows.view(-1, kernel, channels)).view(-1, 2, count, channels)
    spectra = halves[:-1] + signs[:, None] * halves[1:]  # (blocks, 2, frequencies, channels)
    blocks = len(spectra)
    x = spectra.view(blocks, 2, count, groups, size).permute(2, 3, 1, 0, 4).reshape(count * groups, 2 * blocks, size)
    w = torch.mm(analysis, weight.reshape(-1, kernel).t()).view(2, count * groups, size, size).transpose(2, 3)  # (outputs, inputs) turned
    by_cosine, by_sine = torch.bmm(x, w[0]).view(-1, 2, blocks, size), torch.bmm(x, w[1]).view(-1, 2, blocks, size)
    real = by_cosine[:, 0] + by_sine[:, 1]
    imaginary = by_cosine[:, 1] - by_sine[:, 0]
    y = torch.stack((real, imaginary)).view(2, count, groups, blocks, size).permute(3, 0, 1, 2, 4).reshape(blocks, 2 * count, channels)
    return torch.matmul(synthesis, y).view(blocks * kernel, channels)


@functools.cache
def _spectral_matrices(kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fourier matrices of windows of 2 * kernel samples.

    Analysis (2 * frequencies, kernel), synthesis (kernel, 2 * frequencies), signs of the shifted half (frequencies,).
    """
    window = 2 * kernel
    frequency: NDArray[np.float64] = np.arange(kernel + 1, dtype=np.float64)
    time = np.arange(kernel)
    # Angles are reduced modulo the window as integers, so that the float64 cosines are accurate.
    angle = (np.outer(np.arange(kernel + 1), time) % window) * (2 * np.pi / window)
    analysis = np.concatenate([np.cos(angle), -np.sin(angle)])
    share = np.where((frequency == 0) | (frequency == kernel), 1.0, 2.0) / window
    synthesis = np.concatenate([share[:, None] * np.cos(angle), -share[:, None] * np.sin(angle)]).T
    signs = np.where(frequency % 2 == 0, 1.0, -1.0)
    first, second, third = (torch.from_numpy(np.ascontiguousarray(each)) for each in (analysis, synthesis, signs))
    return first, second, third
