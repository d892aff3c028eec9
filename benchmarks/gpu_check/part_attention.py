"""Part 10: attention over utterances of different lengths, forward and backward: padded with a mask against variable-length kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.timing import half_type, seconds_of
from ser_core.errors import first_line

HEADS, HEAD_SIZE = 12, 64  # wav2vec2-base
PART_SECONDS = (72.0, 300.0)
FRAMES_A_SECOND = 50
SLOW_SECONDS = 4.0

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values in one of the layouts -> output in the same layout
PRESENT = "padded, SDPA with a mask"  # as transformers' encoder does it; the others are compared with it
WITH_DROPOUT = "padded, SDPA with a mask, dropout 0.1"


def run(record: Record, plan: Plan) -> None:
    """Every kernel that this build has, on a part of each length; one that fails is named."""
    for seconds in (12.0,) if plan.small else PART_SECONDS:
        lengths = part_lengths(seconds)
        generator = torch.Generator().manual_seed(0)
        dtype = half_type(plan.device)
        packed = [torch.randn(sum(lengths), HEADS, HEAD_SIZE, generator=generator).to(plan.device, dtype) for _ in range(3)]
        padded = [pad_sequence(list(torch.split(each, lengths)), batch_first=True).transpose(1, 2).contiguous() for each in packed]
        valid = valid_frames(lengths, plan.device)
        for each in (*packed, *padded):
            each.requires_grad_()
        expected: Tensor | None = None
        for name, (is_padded, attend) in kernels(lengths, plan.device).items():
            if not record.has_time(SLOW_SECONDS, f"{name}, {seconds:g} s"):
                return
            inputs = padded if is_padded else packed
            try:
                output = attend(*inputs).detach().float()
                work = functools.partial(forward_and_backward, attend, inputs)
                taken = seconds_of(work, plan.device, inner=3)
            except (RuntimeError, ImportError, ValueError, TypeError, AssertionError) as error:
                record.note(f"{name}, {seconds:g} s: not available: {type(error).__name__}: {first_line(error)}")
                continue
            output = output.transpose(1, 2)[valid] if is_padded else output
            expected = output if expected is None else expected
            # With dropout the outputs are random.
            difference = None if name == WITH_DROPOUT else float((output - expected).abs().max())
            record.row("attention", kernel=name, part_seconds=seconds, utterances=len(lengths), seconds=taken, difference=difference)


def part_lengths(seconds: float) -> list[int]:
    """Frames of the utterances of a part of a sorted step: as many as fit into `seconds` when padded, like IEMOCAP's, longest first."""
    rng = np.random.default_rng(0)
    drawn = sorted(np.clip(rng.lognormal(np.log(4.5) - 0.55**2 / 2, 0.55, size=512), 0.6, 10.0).tolist(), reverse=True)
    drawn = drawn[150:]  # the middle of the step: 4 to 5 s
    count = max(1, int(seconds / drawn[0]))
    return [max(1, int(FRAMES_A_SECOND * each)) for each in drawn[:count]]


def valid_frames(lengths: Sequence[int], device: str) -> Tensor:
    """Return (utterances, longest) bool, True for the frames of each utterance."""
    return torch.arange(max(lengths), device=device)[None] < torch.tensor(lengths, device=device)[:, None]


def forward_and_backward(attend: Attend, inputs: Sequence[Tensor]) -> None:
    """One pass with gradients of queries, keys and values."""
    for each in inputs:
        each.grad = None
    torch.autograd.backward(attend(*inputs).sum())


def kernels(lengths: Sequence[int], device: str) -> dict[str, tuple[bool, Attend]]:
    """Return name -> (whether the layout is padded, the way to attend), the present way first.

    Padded tensors are (utterances, heads, longest, head size), packed ones (all frames, heads, head size).
    """
    offsets = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
    wide_offsets, longest = offsets.long(), max(lengths)
    mask = valid_frames(lengths, device)[:, None, None]

    def with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1)

    def by_utterance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(torch.split(each, list(lengths)) for each in (q, k, v)), strict=True)
        found = [F.scaled_dot_product_attention(*(each.transpose(0, 1)[None] for each in part))[0].transpose(0, 1) for part in parts]
        return torch.cat(found)

    def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (torch.nested.nested_tensor_from_jagged(each, wide_offsets).transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).values()

    def torch_varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(q, k, v, offsets, offsets, longest, longest)
        if not isinstance(output, Tensor):
            raise TypeError("varlen_attn returned more than the output")
        return output

    def flash_varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        output: Tensor = flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest)
        return output

    return {
        PRESENT: (True, with_mask),
        WITH_DROPOUT: (True, with_dropout),
        "each utterance alone, SDPA": (False, by_utterance),
        "nested tensors, SDPA": (False, nested),
        "torch.nn.attention.varlen": (False, torch_varlen),
        "flash_attn, variable length": (False, flash_varlen),
    }
