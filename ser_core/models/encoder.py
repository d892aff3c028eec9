"""A faster CPU implementation of the wav2vec 2.0 transformer encoder, with transformers' weights and equal to it up to rounding.

Differences from transformers' encoder, each measured in docs/speed.md:

- utterances are concatenated without padding; attention is computed for each utterance;
- dropout compares raw bits of a fast generator, seeded from torch's default one, with a threshold: one pass forward, one backward;
- an attention block and a feed-forward block are one autograd node each, which saves few tensors and works in place;
- the positional convolution is computed with a Fourier transform (overlap-save, blocks of the kernel's length).

`run_transformer` is the entry point. On a GPU, with eager attention (as in the authors' code) and for other configurations it calls
transformers' encoder.
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

from ser_core.models.front_end import valid_frames

MAX_DROPOUT = 0.49  # for a higher probability the threshold of `DropoutBits` would have to be positive
STREAMS = 2  # generators that draw bits in parallel; a constant, so that the bits do not depend on the number of threads
PARALLEL_DRAW_WORDS = 1 << 15  # 64-bit words from which a second thread saves time

aten: Any = torch.ops.aten


def run_transformer(encoder: Any, hidden: Tensor, frames: Tensor | None) -> Tensor:
    """Run the transformer of a `Wav2Vec2Model` over projected features: (B, T, hidden) -> (B, T, hidden).

    `frames` (B,): the number of valid frames of each row; None: all. Attention ignores the padding after them; its output is undefined.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    if hidden.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not is_supported(encoder.encoder):
        valid = None if frames is None else valid_frames(frames, hidden.shape[1])
        output: Tensor = _by_transformers(encoder.encoder, hidden, valid)
        return output
    batch, length, _ = hidden.shape
    lengths = [length] * batch if frames is None else frames.tolist()
    with torch.autocast("cpu", enabled=False):
        # Features that were projected under autocast are bfloat16; between the layers everything is float32.
        packed = _run(encoder.encoder, _packed(hidden, lengths).float(), lengths, dtype)
    padded = pad_sequence(list(torch.split(packed, lengths)), batch_first=True)
    return F.pad(padded, (0, 0, 0, length - padded.shape[1]))


def is_supported(encoder: Any) -> bool:
    """Whether this implementation covers the configuration of transformers' encoder."""
    config = encoder.config
    dropped = (config.hidden_dropout, config.activation_dropout, config.attention_dropout)
    return (
        type(encoder).__name__ in ("Wav2Vec2Encoder", "Wav2Vec2EncoderStableLayerNorm")
        and config._attn_implementation != "eager"
        and config.hidden_act == config.feat_extract_activation == "gelu"
        and getattr(config, "adapter_attn_dim", None) is None
        and not encoder.gradient_checkpointing
        and all(0 <= probability < MAX_DROPOUT for probability in dropped)
    )


def _by_transformers(encoder: Any, hidden: Tensor, valid: Tensor | None) -> Any:
    if valid is not None:
        # transformers zeroes padding of its input in place; zeroed out of place here, so that the caller's tensor stays as it is.
        hidden = hidden.masked_fill(~valid[..., None], 0)
    return encoder(hidden, attention_mask=valid).last_hidden_state


def _packed(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Concatenate the valid rows of (B, T, hidden): (frames, hidden)."""
    flat = hidden.flatten(0, 1)
    if sum(lengths) == len(flat):
        return flat
    length = hidden.shape[1]
    pieces = [size for each in lengths for size in (each, length - each)]
    return torch.cat(torch.split(flat, pieces)[::2])


def _run(encoder: Any, hidden: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Run the encoder over packed rows (frames, hidden), with matrix products in `dtype`."""
    config, training = encoder.config, encoder.training
    stable = type(encoder).__name__ == "Wav2Vec2EncoderStableLayerNorm"
    hidden = hidden + _positions(encoder.pos_conv_embed, hidden, lengths)
    if not stable:
        hidden = encoder.layer_norm(hidden)
    hidden = F.dropout(hidden, config.hidden_dropout, training)
    # Layer drop: one random number per layer, as in transformers, drawn before the seed of the dropout masks.
    layers = [layer for layer in encoder.layers if not (training and config.layerdrop > 0 and float(torch.rand([])) < config.layerdrop)]
    dropout_bits = DropoutBits.seeded() if training else None
    for layer in layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        first = (lengths, attention.num_heads, attention.dropout, layer.dropout.p, dropout_bits, dtype)
        second = (feed_forward.intermediate_dropout.p, feed_forward.output_dropout.p, dropout_bits, dtype)
        if stable:
            hidden = _attend(attention, hidden, layer.layer_norm(hidden), first)
            hidden = _feed_forward(feed_forward, hidden, layer.final_layer_norm(hidden), second)
        else:
            hidden = layer.layer_norm(_attend(attention, hidden, hidden, first))
            hidden = layer.final_layer_norm(_feed_forward(feed_forward, hidden, hidden, second))
    if stable:
        hidden = encoder.layer_norm(hidden)
    return hidden


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
    """Return the (negative) number that random bits of `dtype` are at or below with `probability` (at most MAX_DROPOUT)."""
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
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    weights = [each for projection in projections for each in (projection.weight, projection.bias)]
    output: Tensor = _Attention.apply(options, residual, hidden, *weights)  # type: ignore[no-untyped-call]
    return output


def _feed_forward(block: Any, residual: Tensor, hidden: Tensor, options: tuple[Any, ...]) -> Tensor:
    inner, outer = block.intermediate_dense, block.output_dense
    weights = (inner.weight, inner.bias, outer.weight, outer.bias)
    output: Tensor = _FeedForward.apply(options, residual, hidden, *weights)  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    """residual + dropout(out_proj(attention(hidden))) on packed rows (frames, hidden)."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], residual: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        lengths, heads, inner, outer, dropout_bits, dtype = options
        inner, outer = (inner, outer) if dropout_bits is not None else (0.0, 0.0)
        x = hidden.to(dtype)
        wq, bq, wk, bk, wv, bv, wo, bo = (each.to(dtype) for each in weights)
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
        ctx.save_for_backward(x, q, k, v, merged, bits, wq, wk, wv, wo, *probabilities, *kept)
        ctx.facts = (lengths, heads, inner, outer, scaling)
        return torch.add(residual, output, alpha=1 / (1 - outer))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        lengths, heads, inner, outer, scaling = ctx.facts
        x, q, k, v, merged, bits, wq, wk, wv, wo, *saved = ctx.saved_tensors
        probabilities, kept = saved[: len(lengths)], saved[len(lengths) :]
        scale, inner_scale = 1 / (1 - outer), 1 / (1 - inner)
        g = _dropped(gradient.to(x.dtype), bits, outer)
        dwo, dbo = _scaled_product(g.t(), merged, scale), g.sum(0) * scale
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
        dx = torch.mm(dq, wq).addmm_(dk, wk).addmm_(dv, wv)
        inputs = [each for d in (dq, dk, dv) for each in (torch.mm(d.t(), x), d.sum(0))]
        return None, gradient, dx.to(gradient.dtype), *(each.to(gradient.dtype) for each in (*inputs, dwo, dbo))


class _FeedForward(torch.autograd.Function):
    """residual + dropout(output_dense(dropout(gelu(intermediate_dense(hidden))))) on packed rows (frames, hidden)."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], residual: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        inner, outer, dropout_bits, dtype = options
        inner, outer = (inner, outer) if dropout_bits is not None else (0.0, 0.0)
        x = hidden.to(dtype)
        w1, b1, w2, b2 = (each.to(dtype) for each in weights)
        u = torch.addmm(b1, x, w1.t())
        inner_bits = dropout_bits.bits(tuple(u.shape), dtype) if inner else None
        h = _drop(F.gelu(u), inner_bits, inner)
        outer_bits = dropout_bits.bits(tuple(x.shape), dtype) if outer else None
        output = _drop(torch.addmm(b2, h, w2.t(), alpha=1 / (1 - inner)), outer_bits, outer)
        ctx.save_for_backward(x, u, h, inner_bits, outer_bits, w1, w2)
        ctx.facts = (inner, outer)
        return torch.add(residual, output, alpha=1 / (1 - outer))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inner, outer = ctx.facts
        x, u, h, inner_bits, outer_bits, w1, w2 = ctx.saved_tensors
        scale = 1 / (1 - outer)
        both = scale / (1 - inner)
        g = _dropped(gradient.to(x.dtype), outer_bits, outer)
        dw2, db2 = _scaled_product(g.t(), h, both), g.sum(0) * scale
        du = _drop(_scaled_product(g, w2, both), inner_bits, inner)
        aten.gelu_backward.grad_input(du, u, grad_input=du)
        dx = torch.mm(du, w1)
        return None, gradient, *(each.to(gradient.dtype) for each in (dx, torch.mm(du.t(), x), du.sum(0), dw2, db2))


def _heads(rows: Tensor, lengths: Sequence[int], heads: int) -> list[Tensor]:
    """Return a view (heads, frames, head size) of each utterance in packed rows (frames, hidden)."""
    return [each.view(len(each), heads, -1).transpose(0, 1) for each in torch.split(rows, list(lengths))]


def _positions(embedding: Any, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Positional embedding gelu(convolution) of packed rows (frames, hidden), each utterance zero-padded."""
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
    taps = weight.view(groups, size, size, kernel).permute(3, 0, 2, 1).reshape(kernel, -1)
    w = torch.mm(analysis, taps).view(2, count * groups, size, size)
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
