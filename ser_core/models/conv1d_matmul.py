"""A convolution without padding as matrix products: rows of (rows, channels), `stride` of them side by side, are one operand.

A convolution of kernel k and stride s is a sum of ceil(k / s) products: row t of the result reads the block of s rows at t, and the taps
behind the first s read the blocks further down. No operand is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_ROWS = 4096  # of a product on a CPU: its operands stay in the last cache


@dataclass(frozen=True)
class ConvolutionShape:
    """Kernel and stride of a convolution, channels in and out."""

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
        """First column and width, in the weights (outputs, kernel * inputs), of each product."""
        wide = self.stride * self.inputs
        return [(first, min(wide, self.kernel * self.inputs - first)) for first in range(0, self.kernel * self.inputs, wide)]


class Conv1dMatmul:
    """The products of one convolution behind the first, on chunks of rows, and their gradients."""

    def __init__(self, shape: ConvolutionShape, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.taps = shape.taps()
        self.weights = [weight[:, first : first + width].to(dtype) for first, width in self.taps]
        self.bias = None if bias is None else bias.to(dtype)
        self.before = len(self.taps) - 1

    def multiply(self, blocks: Tensor, out: Tensor) -> None:
        """(rows + products - 1, stride * inputs) -> (rows, outputs)."""
        for number, weight in enumerate(self.weights):
            part = blocks[number : number + len(out), : weight.shape[1]]
            if number:
                out.addmm_(part, weight.T)
            elif self.bias is None:
                torch.mm(part, weight.T, out=out)
            else:
                torch.addmm(self.bias, part, weight.T, out=out)

    def multiply_back(self, gradient: Tensor, out: Tensor) -> None:
        """(products - 1 + rows, outputs), the rows before included, -> (rows, stride * inputs)."""
        for number, weight in enumerate(self.weights):
            part, columns = gradient[self.before - number : self.before - number + len(out)], out[:, : weight.shape[1]]
            if number:
                columns.addmm_(part, weight)
            else:
                torch.mm(part, weight, out=columns)
        out[:, self.weights[0].shape[1] :].zero_()  # frames that the stride passes over

    def add_gradient(self, blocks: Tensor, gradient: Tensor, out: Tensor) -> None:
        """What a chunk adds to the gradient of the weights (outputs, kernel * inputs)."""
        for number, (first, width) in enumerate(self.taps):
            part = blocks[number : number + len(gradient), :width]
            if out.dtype == gradient.dtype:
                out[:, first : first + width].addmm_(gradient.T, part)
            else:
                out[:, first : first + width].add_(gradient.T @ part)


def chunk_rows(device: torch.device) -> int:
    """Rows of one product; 0: all at once."""
    return CHUNK_ROWS if device.type == "cpu" else 0


def row_chunks(rows: int, size: int) -> list[tuple[int, int]]:
    """(first, end) of chunks of `size` rows; 0: one."""
    return [(first, min(first + (size or rows), rows)) for first in range(0, rows, size or max(1, rows))]


@torch.no_grad()
def convolve_rows(conv: nn.Conv1d, rows: Tensor) -> Tensor:
    """What a plain `conv` makes of (B, T, channels): (B, frames, channels), without gradient, in the type of autocast if that is on."""
    shape, length = ConvolutionShape.of(conv), rows.shape[1]
    frames = (length - shape.kernel) // shape.stride + 1
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else conv.weight.dtype
    with torch.autocast(device, enabled=False):
        if shape.inputs == 1:
            windows = rows[..., 0].unfold(1, shape.kernel, shape.stride).to(dtype)
            return F.linear(windows, conv.weight[:, 0].to(dtype), None if conv.bias is None else conv.bias.to(dtype))
        slot = -(-length // shape.stride) * shape.stride  # each row begins a block
        blocks = F.pad(rows.to(dtype), (0, 0, 0, slot - length)).reshape(-1, shape.stride * shape.inputs)
        matmul = Conv1dMatmul(shape, conv.weight.transpose(1, 2).flatten(1), conv.bias, dtype)
        out = blocks.new_empty(len(blocks), shape.outputs)  # what reaches over a row's end is garbage
        count = len(blocks) - matmul.before
        for start, stop in row_chunks(count, chunk_rows(rows.device)):
            matmul.multiply(blocks[start : stop + matmul.before], out[start:stop])
    return out.view(len(rows), -1, shape.outputs)[:, :frames]
