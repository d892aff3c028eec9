"""The convolutional feature extractor of wav2vec 2.0 with transformers' weights, as matrix products over concatenated utterances.

Equal to transformers' `Wav2Vec2FeatureEncoder` up to rounding, and faster for three reasons:

- A convolution is a sum of matrix products on strided views (`conv1d_matmul.py`).
- Utterances are concatenated, each starting at a multiple of the product of the strides. A valid frame depends on valid frames of its own
  utterance only, so the gaps between utterances do not reach it, and nothing is computed on padding. The group norm over time of the first
  convolution is computed for each utterance: mean and variance of a channel follow from the second moments (k x k) of the wave's windows,
  and the norm is folded into convolution weights for each utterance. It needs no pass over the frames.
- A chunk of frames is normalised, activated and multiplied while it is in the cache. Only the values before each activation are saved for
  the backward pass; those of the first convolution, half of the total, are recomputed.

Layer-norm models are normalised frame by frame.

The feature store holds output of this module: a change that may alter a bit of it must increment `VERSION` in ser_core/features/store.py.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ser_core.models.conv1d_matmul import Conv1dMatmul, ConvolutionShape, chunk_rows, row_chunks


@dataclass(frozen=True)
class _Plan:
    """Layout of the concatenated utterances. Level n is the output of convolution n."""

    shapes: tuple[ConvolutionShape, ...]
    rows: tuple[int, ...]  # of each level, gaps included
    slack: tuple[int, ...]  # additional rows of zeros, read by the last rows of the next convolution
    segments: tuple[int, ...]  # first row in level 0 of each utterance's weights, and the end
    norm_epsilon: float | None  # of the layer norms; None: no layer norms
    dtype: torch.dtype  # of matrix products from the second convolution on
    keep: bool  # whether to save values for the backward pass
    chunk: int  # rows per matrix product

    def segments_of(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index of the weights, first row, end) for rows `low` to `high` of level 0."""
        number = bisect.bisect_right(self.segments, low) - 1
        while low < high:
            stop = min(high, self.segments[number + 1])
            yield number, low, stop
            number, low = number + 1, stop


def supports(extractor: Any) -> bool:
    """Whether `convolve` is equivalent to this transformers feature extractor: GELU, plain convolutions, one kind of norm."""
    layers = list(getattr(extractor, "conv_layers", ()))
    norms = [getattr(layer, "layer_norm", None) for layer in layers]
    return (
        bool(layers)
        and all(_is_plain(layer.conv) and is_gelu(layer.activation) for layer in layers)
        and (_is_group_norm(norms) or all(isinstance(norm, nn.LayerNorm) and norm.elementwise_affine for norm in norms))
    )


def convolve(extractor: Any, waves: Sequence[Tensor]) -> list[Tensor]:
    """Return the features (frames, channels) of each wave (samples,), computed as if each were alone: no norm sees others or padding.

    `extractor` is a `Wav2Vec2FeatureEncoder` of transformers (see `supports`). No wave may be shorter than one frame.
    """
    layers = list(extractor.conv_layers)
    shapes = tuple(ConvolutionShape.of(layer.conv) for layer in layers)
    grouped = isinstance(layers[0].layer_norm, nn.GroupNorm)
    device, parameters = waves[0].device, [parameter for layer in layers for parameter in layer.parameters()]
    lengths = [[(len(wave) - shapes[0].kernel) // shapes[0].stride + 1] for wave in waves]
    for shape in shapes[1:]:
        for counts in lengths:
            counts.append((counts[-1] - shape.kernel) // shape.stride + 1)
    hop = math.prod(shape.stride for shape in shapes[1:])
    slots = [-(-counts[0] // hop) for counts in lengths]
    starts = list(itertools.accumulate(slots, initial=0))
    rows, slack = [starts[-1]], [0]
    for shape in reversed(shapes[1:]):
        rows.append(rows[-1] * shape.stride)
        slack.append((shape.matmuls - 1) * shape.stride)
    plan = _Plan(
        shapes=shapes,
        rows=tuple(reversed(rows)),
        slack=tuple(reversed(slack)),
        segments=(*(start * hop for start in starts[:-1]), rows[-1] + slack[-1]) if grouped else (0, rows[-1] + slack[-1]),
        norm_epsilon=None if grouped else layers[0].layer_norm.eps,
        dtype=torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else parameters[0].dtype,
        keep=torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters),
        chunk=chunk_rows(device),
    )
    with torch.autocast(device.type, enabled=False):
        windows = _windows(waves, shapes[0], [counts[0] for counts in lengths])
        laid = windows.new_zeros(rows[-1] + slack[-1], shapes[0].kernel + 1)
        for row, (start, counts) in enumerate(zip(starts, lengths, strict=False)):
            laid[start * hop : start * hop + counts[0], :-1] = windows[row, : counts[0]]
            laid[start * hop : start * hop + counts[0], -1] = 1
        first = _first_weights(layers[0], windows, [counts[0] for counts in lengths]) if grouped else _plain_weights(layers[0].conv)
        values: list[Tensor | None] = []
        for layer in layers:
            values.append(None if layer is layers[0] else layer.conv.weight.transpose(1, 2).flatten(1))
            values.append(None if layer is layers[0] else layer.conv.bias)
            values.extend((None, None) if grouped else (layer.layer_norm.weight, layer.layer_norm.bias))
        packed: Tensor = _Convolutions.apply(plan, laid, first, *values)  # type: ignore[no-untyped-call]
    return [packed[start : start + counts[-1]] for start, counts in zip(starts, lengths, strict=False)]


def _is_plain(conv: Any) -> bool:
    return type(conv) is nn.Conv1d and conv.padding == (0,) and conv.dilation == (1,) and conv.groups == 1


def is_gelu(activation: Any) -> bool:
    """Whether an activation module is the exact GELU, not one of its approximations."""
    return isinstance(activation, nn.GELU) or (type(activation).__name__ == "GELUActivation" and activation.act is F.gelu)


def _is_group_norm(norms: Sequence[Any]) -> bool:
    """Whether the only norm is a group norm over time for each channel, after the first convolution."""
    first = norms[0]
    return isinstance(first, nn.GroupNorm) and first.num_groups == first.num_channels and not any(norms[1:])


def _windows(waves: Sequence[Tensor], shape: ConvolutionShape, counts: Sequence[int]) -> Tensor:
    """Windows (B, longest, kernel) that the first convolution reads, zero after a wave's last frame."""
    windows = pad_sequence(list(waves), batch_first=True).unfold(1, shape.kernel, shape.stride)
    valid = torch.arange(windows.shape[1], device=windows.device) < torch.tensor(counts, device=windows.device)[:, None]
    return windows * valid[..., None]


def _first_weights(layer: Any, windows: Tensor, counts: Sequence[int]) -> Tensor:
    """Weights (B, kernel + 1, channels) of convolution and group norm of each utterance in one product; the last row is the bias.

    Computed in float64: a filter may cancel most of a loud wave.
    """
    lengths = torch.tensor(counts, dtype=torch.float64, device=windows.device)[:, None, None]
    taps = layer.conv.weight[:, 0].double()  # (channels, kernel)
    doubled = windows.double()
    middle = doubled.sum(1, keepdim=True) / lengths  # (B, 1, kernel)
    # E[xx'] - E[x]E[x]'; both means divide by the utterance's own number of windows, so the zeros after a wave's end do not count.
    moments = (doubled.transpose(1, 2) @ doubled) / lengths - middle.transpose(1, 2) @ middle
    variance = torch.einsum("ck,bkl,cl->bc", taps, moments, taps).clamp(min=0)
    scale = layer.layer_norm.weight.double() * torch.rsqrt(variance + layer.layer_norm.eps)
    mean = (middle @ taps.T)[:, 0]
    bias = 0 if layer.conv.bias is None else layer.conv.bias.double()
    offset = layer.layer_norm.bias.double() + scale * (bias - (mean + bias))
    return torch.cat([taps.T * scale[:, None], offset[:, None]], dim=1).to(windows.dtype)


def _plain_weights(conv: nn.Conv1d) -> Tensor:
    """Weights (1, kernel + 1, channels) of the first convolution, the same for all utterances; the last row is the bias."""
    taps = conv.weight[:, 0].T
    return torch.cat([taps, torch.zeros_like(taps[:1]) if conv.bias is None else conv.bias[None]])[None]


class _Norm:
    """Optional layer norm followed by GELU, on chunks of rows, with their gradients."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, epsilon: float | None) -> None:
        self.weight, self.bias, self.epsilon = weight, bias, epsilon
        self.gradients = None if weight is None else (torch.zeros_like(weight), torch.zeros_like(weight))

    def forward(self, sums: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Write the activations to `out`; return the layer norm's output and statistics, which `backward` needs."""
        if self.epsilon is None:
            _gelu(sums, out)
            return None
        normed = torch.native_layer_norm(sums.to(self.weight), [sums.shape[1]], self.weight, self.bias, self.epsilon)
        _gelu(normed[0], out)
        return normed

    def backward(self, gradient: Tensor, sums: Tensor, normed: tuple[Tensor, Tensor, Tensor] | None, out: Tensor) -> None:
        """Write the gradient of `sums` (rows, channels) to `out`, given that of the activations; both may have additional rows."""
        if normed is None or self.gradients is None:
            if gradient.dtype == sums.dtype == out.dtype:
                torch.ops.aten.gelu_backward.grad_input(gradient, sums, grad_input=out)
            else:
                out.copy_(torch.ops.aten.gelu_backward(gradient.to(sums), sums))
            return
        values, mean, scale = (each[: len(sums)] for each in normed)
        inner = torch.ops.aten.gelu_backward(gradient.to(values), values)
        found = torch.ops.aten.native_layer_norm_backward(
            inner, sums.to(values), [sums.shape[1]], mean, scale, self.weight, self.bias, [True, True, True]
        )
        out.copy_(found[0])
        self.gradients[0].add_(found[1])
        self.gradients[1].add_(found[2])


def _gelu(values: Tensor, out: Tensor) -> None:
    if out.dtype == values.dtype:
        torch.ops.aten.gelu.out(values, out=out)
    else:
        out.copy_(F.gelu(values))


def _first_sums(plan: _Plan, windows: Tensor, first: Tensor, start: int, out: Tensor) -> None:
    """Write the normalised output of the first convolution from row `start` on to `out`; each utterance has its own weights."""
    for number, low, high in plan.segments_of(start, start + len(out)):
        torch.mm(windows[low:high], first[number], out=out[low - start : high - start])


class _Convolutions(torch.autograd.Function):
    """All convolutions. `windows` (rows, kernel + 1) and the first weights (utterances or 1, kernel + 1, channels) give level 0.

    `values` holds four entries per convolution: weight (outputs, kernel * inputs), bias, weight and bias of the layer norm; None if absent.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, windows: Tensor, first: Tensor, *values: Tensor | None) -> Tensor:
        ctx.plan = plan
        layers, norms = _parts(plan, values)
        last = len(plan.shapes) - 1
        kept: list[Tensor] = []
        sums = windows  # values before activation of the previous level; level 0 is computed chunk by chunk
        scratch = _Scratch(windows)
        for level in range(1, last + 1):
            shape, before = plan.shapes[level], sums
            sums = windows.new_empty((plan.rows[level] + plan.slack[level], shape.outputs), dtype=plan.dtype)
            sums[plan.rows[level] :] = 0
            for start, stop in row_chunks(plan.rows[level], plan.chunk):
                low, high = start * shape.stride, (stop + shape.matmuls - 1) * shape.stride
                chunk = _level(plan, level - 1, windows, first, before, low, high, scratch)
                active = scratch.take("active", high - low, shape.inputs, plan.dtype)
                norms[level - 1].forward(chunk, active)
                layers[level].multiply(active.view(-1, shape.stride * shape.inputs), sums[start:stop])
            kept.append(sums)
        final = _level(plan, last, windows, first, sums, 0, plan.rows[last], scratch)
        out = torch.empty_like(final, dtype=plan.dtype)
        norms[last].forward(final, out)
        if plan.keep:
            ctx.save_for_backward(windows, first, *values, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        saved = ctx.saved_tensors
        windows, first, values = saved[0], saved[1], saved[2 : 2 + 4 * len(plan.shapes)]
        kept = (windows, *saved[2 + 4 * len(plan.shapes) :])
        layers, norms = _parts(plan, values)
        last = len(plan.shapes) - 1
        scratch = _Scratch(windows)
        weights = [None if value is None else torch.zeros_like(value) for value in values[::4]]
        biases = [None if value is None else torch.zeros_like(value) for value in values[1::4]]
        first_gradient = torch.zeros_like(first)

        def add_first(start: int, found: Tensor) -> None:
            for number, low, high in plan.segments_of(start, start + len(found)):
                first_gradient[number].addmm_(windows[low:high].T, found[low - start : high - start])

        # Preceded by rows of zeros, for the matrix products that read rows before a chunk.
        sums = _level(plan, last, windows, first, kept[last], 0, plan.rows[last], scratch)
        normed = norms[last].forward(sums, torch.empty_like(sums, dtype=plan.dtype)) if norms[last].epsilon is not None else None
        before = layers[last].before if last else 0
        found = windows.new_empty((before + plan.rows[last], sums.shape[1]), dtype=plan.dtype if last else sums.dtype)
        found[:before] = 0
        norms[last].backward(gradient, sums, normed, found[before:])
        if not last:
            add_first(0, found)
        for level in range(last, 0, -1):
            shape, layer, above = plan.shapes[level], layers[level], found
            before = layers[level - 1].before if level > 1 else 0
            below = before + plan.rows[level - 1] if level > 1 else 0
            found = windows.new_empty((below, shape.inputs), dtype=plan.dtype)
            found[:before] = 0
            bias = biases[level]
            if bias is not None:
                bias.add_(above.sum(0))
            for start, stop in row_chunks(plan.rows[level], plan.chunk):
                low, middle, high = start * shape.stride, stop * shape.stride, (stop + shape.matmuls - 1) * shape.stride
                sums = _level(plan, level - 1, windows, first, kept[level - 1], low, high, scratch)
                active = scratch.take("active", high - low, shape.inputs, plan.dtype)
                normed = norms[level - 1].forward(sums, active)
                rows = above[layer.before + start : layer.before + stop]
                layer.add_gradient(active.view(-1, shape.stride * shape.inputs), rows, weights[level])
                back = scratch.take("active", middle - low, shape.inputs, plan.dtype)  # the activations are no longer needed
                layer.multiply_back(above[start : layer.before + stop], back.view(-1, shape.stride * shape.inputs))
                if level > 1:
                    norms[level - 1].backward(back, sums[: middle - low], normed, found[before + low : before + middle])
                else:
                    own = scratch.take("first", middle - low, shape.inputs, sums.dtype)
                    norms[0].backward(back, sums[: middle - low], normed, own)
                    add_first(low, own)
        results: list[Tensor | None] = []
        for level in range(last + 1):
            results.extend((weights[level], biases[level], *(norms[level].gradients or (None, None))))
        return (None, None, first_gradient, *results)


def _parts(plan: _Plan, values: Sequence[Tensor | None]) -> tuple[list[Any], list[_Norm]]:
    """Matrix products (None for the first convolution) and norms of all convolutions."""
    layers: list[Any] = [None]
    for level in range(1, len(plan.shapes)):
        weight, bias = values[4 * level], values[4 * level + 1]
        if weight is None:
            raise ValueError(f"convolution {level} has no weights")
        layers.append(Conv1dMatmul(plan.shapes[level], weight, bias, plan.dtype))
    return layers, [_Norm(values[4 * level + 2], values[4 * level + 3], plan.norm_epsilon) for level in range(len(plan.shapes))]


def _level(plan: _Plan, level: int, windows: Tensor, first: Tensor, kept: Tensor, low: int, high: int, scratch: _Scratch) -> Tensor:
    """Rows `low` to `high` of a level before norm and activation: recomputed for level 0, saved for the others."""
    if level:
        return kept[low:high]
    sums = scratch.take("sums", high - low, plan.shapes[0].outputs, windows.dtype)
    _first_sums(plan, windows, first, low, sums)
    return sums


class _Scratch:
    """Buffers for the rows of a chunk, allocated once per call of `convolve`."""

    def __init__(self, like: Tensor) -> None:
        self._device = like.device
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        found = self._kept.get(name)
        if found is None or found.numel() < rows * columns or found.dtype != dtype:
            found = self._kept[name] = torch.empty(rows * columns, dtype=dtype, device=self._device)
        return found[: rows * columns].view(rows, columns)
