"""Part 13: torch.compile and CUDA graphs on the transformer's layers, with the seconds until they are as fast as they get.

Last of the parts: compilation may take any time, and needs a C compiler. Without a GPU the layers are traced but not compiled.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.recipes import base_recipe
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.timing import half_type, seconds_of, synchronise
from ser_core.errors import first_line
from ser_core.models.backbone import load_encoder

SHAPES = ((16, 225), (14, 249), (32, 110))  # utterances, frames: parts of 72 s of padded audio
SMALL_SHAPES = ((2, 20), (3, 12))
SLOW_SECONDS = 10.0


class Layer(nn.Module):
    """A layer of transformers' encoder as a function of one tensor (B, T, hidden), all frames valid."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        output: Any = self.layer(hidden)
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found


def run(record: Record, plan: Plan) -> None:
    """The layers as they are, compiled for any shape, and captured as CUDA graphs of one shape."""
    measure(record, plan, "as it is", lambda layers, hidden: list(layers))
    backend = "inductor" if plan.device == "cuda" else "eager"
    if plan.device == "cuda" and record.has_time(SLOW_SECONDS, "CUDA graphs"):
        measure(record, plan, "CUDA graphs", captured)
    if record.has_time(SLOW_SECONDS, "torch.compile"):
        torch._dynamo.config.recompile_limit = 64  # the layers share their code
        compiled = functools.partial(torch.compile, dynamic=True, backend=backend)
        measure(record, plan, "torch.compile", lambda layers, hidden: [compiled(layer) for layer in layers])


Prepare = Callable[[list[Layer], Tensor], list[Any]]


def captured(layers: list[Layer], hidden: Tensor) -> list[Any]:
    """Return the layers as CUDA graphs for the shape of `hidden`."""
    samples = tuple((hidden.detach().clone().requires_grad_(),) for _ in layers)
    return list(torch.cuda.make_graphed_callables(tuple(layers), samples))


def measure(record: Record, plan: Plan, name: str, prepare: Prepare) -> None:
    """Record seconds of preparation and of a forward and backward pass for the first shape, and seconds for new shapes."""
    shapes = SMALL_SHAPES if plan.small else SHAPES
    settings = base_recipe(steps=1, small=plan.small).backbone
    settings.config = {**settings.config, "layerdrop": 0.0, "num_hidden_layers": 2 if plan.small else 12}
    encoder = load_encoder(settings).encoder.to(plan.device).train()
    layers = [Layer(layer) for layer in encoder.layers]
    hidden = [torch.randn(*shape, encoder.config.hidden_size, device=plan.device) for shape in shapes]
    # Captured graphs must not refer to autocast's copies of the weights.
    with torch.autocast(plan.device, dtype=torch.bfloat16 if plan.small else half_type(plan.device), cache_enabled=False):
        started = time.perf_counter()
        try:
            ready = prepare(layers, hidden[0])
            passed = functools.partial(forward_and_backward, ready, hidden[0])
            passed()
            synchronise(plan.device)
            first = time.perf_counter() - started
            taken = seconds_of(passed, plan.device)
            started = time.perf_counter()
            others = [] if name == "CUDA graphs" else hidden[1:]  # a graph has one shape
            for each in others:
                forward_and_backward(ready, each)
            synchronise(plan.device)
            later = time.perf_counter() - started
        except Exception as error:  # the compilers' errors have no common class
            record.note(f"{name}: not available: {type(error).__name__}: {first_line(error)}")
            return
    record.row("compile", way=name, warm_up_seconds=first, pass_seconds=taken, new_shapes=len(others), new_shapes_seconds=later)


def forward_and_backward(layers: list[Any], hidden: Tensor) -> None:
    """One pass through all layers, with gradients of the weights."""
    for layer in layers:
        layer.zero_grad(set_to_none=False)
    output = hidden.detach().requires_grad_()
    for layer in layers:
        output = layer(output)
    torch.autograd.backward(output.float().sum())
