"""Part 5: a stage that runs out of memory is computed in halves until it fits, as the job system does, with the same losses.

On a GPU torch's allocator is limited to a share of what the stage needs. Without one, a forward pass of too many utterances asks the
allocator for more memory than there is.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_check import compare
from benchmarks.gpu_check.corpora import tones
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.recipes import WHOLE, calls_of, small_recipe
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.stage_runs import Bench, Ran, comparable, on
from ser_core.errors import first_line, is_memory_error
from ser_core.models.classifier import EmotionClassifier
from ser_core.registry import StageCall
from ser_core.settings.execution import Precision

MOST_RELIEF = 5
SHARE = 0.6  # of the memory that the whole batch needs
STEPS = 4
# On a GPU: wide enough that the activations of a batch, not the weights or cuBLAS's workspace, decide.
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
ROWS_THAT_FIT = 2  # without a GPU


def run(record: Record, plan: Plan) -> None:
    """Fine-tuning in a single part, with and without the limit."""
    corpus = tones(plan.folder)
    bench = Bench(corpus.folder, plan.folder / "memory", threads=1)
    recipe = small_recipe(Precision.float32, steps=STEPS, backbone=WIDE if plan.device == "cuda" else None)
    recipe.finetune.batch_size = 24
    recipe.finetune.epochs = STEPS
    recipe.execution.micro_batch = WHOLE
    call = calls_of(recipe)["finetune"]
    with comparable():
        needed, whole = _peak(lambda: bench.run(call, on(plan.device)), plan.device)
        with _limited(round(SHARE * needed), plan.device):
            relief, found, errors = _relieved(bench, call, on(plan.device))
    for line in dict.fromkeys(errors):
        record.note(f"out of memory: {line}")
    limit = f"{SHARE * needed / 2**20:.0f} MiB of {needed / 2**20:.0f}" if plan.device == "cuda" else f"{ROWS_THAT_FIT} utterances"
    record.proof("the whole batch does not fit", bool(errors), f"limit {limit}")
    record.proof("halving makes it fit", found is not None and relief > 0, f"relief {relief}, at most {MOST_RELIEF}")
    if found is not None:
        holds, text = compare.same_losses(whole.losses, found.losses, compare.TOLERANCES["float32"])
        record.proof("same losses", holds, text)


def _relieved(bench: Bench, call: StageCall, execution: dict[str, Any]) -> tuple[int, Ran | None, list[str]]:
    """Repeat the stage with ever smaller parts; return the relief, the run that had enough memory, and the errors until then."""
    errors: list[str] = []
    for relief in range(MOST_RELIEF + 1):
        try:
            return relief, bench.run(call, execution, relief=relief), errors
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            errors.append(first_line(error))
        _release()
    return MOST_RELIEF, None, errors


def _peak(compute: Any, device: str) -> tuple[int, Ran]:
    """Return the bytes that torch's allocator reserves at most on the GPU (0 without one), and the run."""
    if device != "cuda":
        return 0, compute()
    _release()
    torch.cuda.reset_peak_memory_stats()
    ran = compute()
    peak = torch.cuda.max_memory_reserved()
    _release()
    return peak, ran


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _limited(limit: int, device: str) -> Iterator[None]:
    """Context in which the allocator gives at most `limit` bytes; without a GPU at most ROWS_THAT_FIT utterances fit a forward pass."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    forward = EmotionClassifier.forward

    def limited(model: EmotionClassifier, features: Tensor, *more: Any) -> Tensor:
        if len(features) > ROWS_THAT_FIT:
            torch.empty(1 << 60)  # the allocator's own error
        return forward(model, features, *more)

    with mock.patch.object(EmotionClassifier, "forward", limited):
        yield
