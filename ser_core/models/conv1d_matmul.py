"""Conv1d without padding as matrix products on (rows, channels), without copying windows (im2col).

Viewed as blocks of s rows, (rows / s, s * channels), a convolution with kernel k and stride s is a sum of ceil(k / s) matrix products:
output row t reads block t with the first s kernel taps, block t + 1 with the next s taps, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_ROWS = 4096  # rows per matrix product on a CPU, so that its operands stay in the last-level cache


@dataclass(frozen=True)
class ConvolutionShape:
    """Kernel size, stride, input and output channels of a convolution."""

    kernel: int
    stride: int
    inputs: int
    outputs: int

    @staticmethod
    def of(conv: nn.Conv1d) -> ConvolutionShape:
        return ConvolutionShape(conv.kernel_size[0], conv.stride[0], conv.in_channels, conv.out_channels)

    @property
    def matmuls(self) -> int:
        return -(-self.kernel // self.stride)

    def taps(self) -> list[tuple[int, int]]:
        """First column and width of each matrix product's weights in (outputs, kernel * inputs)."""
        wide = self.stride * self.inputs
        return [(first, min(wide, self.kernel * self.inputs - first)) for first in range(0, self.kernel * self.inputs, wide)]


class Conv1dMatmul:
    """Forward and backward products of one convolution on chunks of rows, with weights (outputs, kernel * inputs)."""

    def __init__(self, shape: ConvolutionShape, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.taps = shape.taps()
        self.weights = [weight[:, first : first + width].to(dtype) for first, width in self.taps]
        self.bias = None if bias is None else bias.to(dtype)
        self.before = len(self.taps) - 1

    def multiply(self, blocks: Tensor, out: Tensor) -> None:
        """Forward: `blocks` (rows + matmuls - 1, stride * inputs) -> `out` (rows, outputs)."""
        for number, weight in enumerate(self.weights):
            part = blocks[number : number + len(out), : weight.shape[1]]
            if number:
                out.addmm_(part, weight.T)
            elif self.bias is None:
                torch.mm(part, weight.T, out=out)
            else:
                torch.addmm(self.bias, part, weight.T, out=out)

    def multiply_back(self, gradient: Tensor, out: Tensor) -> None:
        """Gradient of the input: `gradient` (matmuls - 1 + rows, outputs), preceding rows included -> `out` (rows, stride * inputs)."""
        for number, weight in enumerate(self.weights):
            part, columns = gradient[self.before - number : self.before - number + len(out)], out[:, : weight.shape[1]]
            if number:
                columns.addmm_(part, weight)
            else:
                torch.mm(part, weight, out=columns)
        out[:, self.weights[0].shape[1] :].zero_()  # rows that the stride skips

    def add_gradient(self, blocks: Tensor, gradient: Tensor, out: Tensor) -> None:
        """Add a chunk's contribution to `out`, the gradient of the weights (outputs, kernel * inputs)."""
        for number, (first, width) in enumerate(self.taps):
            part = blocks[number : number + len(gradient), :width]
            if out.dtype == gradient.dtype:
                out[:, first : first + width].addmm_(gradient.T, part)
            else:
                out[:, first : first + width].add_(gradient.T @ part)


def chunk_rows(device: torch.device) -> int:
    """Rows per matrix product on `device`; 0: all."""
    return CHUNK_ROWS if device.type == "cpu" else 0


def row_chunks(rows: int, size: int) -> list[tuple[int, int]]:
    """Return (first, end) of chunks of `size` rows; 0: one chunk."""
    return [(first, min(first + (size or rows), rows)) for first in range(0, rows, size or max(1, rows))]


@torch.no_grad()
def convolve_rows(conv: nn.Conv1d, rows: Tensor) -> Tensor:
    """Apply `conv` (no padding, dilation or groups) to (B, T, channels) without gradient: (B, frames, channels), in the autocast type."""
    shape, length = ConvolutionShape.of(conv), rows.shape[1]
    frames = (length - shape.kernel) // shape.stride + 1
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else conv.weight.dtype
    with torch.autocast(device, enabled=False):
        if shape.inputs == 1:
            windows = rows[..., 0].unfold(1, shape.kernel, shape.stride).to(dtype)
            return F.linear(windows, conv.weight[:, 0].to(dtype), None if conv.bias is None else conv.bias.to(dtype))
        slot = -(-length // shape.stride) * shape.stride  # each sequence starts at a block
        blocks = F.pad(rows.to(dtype), (0, 0, 0, slot - length)).reshape(-1, shape.stride * shape.inputs)
        matmul = Conv1dMatmul(shape, conv.weight.transpose(1, 2).flatten(1), conv.bias, dtype)
        out = blocks.new_empty(len(blocks), shape.outputs)  # rows that read beyond a sequence's end are cut off below
        count = len(blocks) - matmul.before
        for start, stop in row_chunks(count, chunk_rows(rows.device)):
            matmul.multiply(blocks[start : stop + matmul.before], out[start:stop])
    return out.view(len(rows), -1, shape.outputs)[:, :frames]
