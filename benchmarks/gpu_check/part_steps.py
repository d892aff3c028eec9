"""Part 7: steps of every stage at base size, ours and the authors' way of computing, against the machine's own limits."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check import flops
from benchmarks.gpu_check.base_steps import BaseBench, Measured, release, transformer_config
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.recipes import STAGES, WHOLE, base_recipe
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.timing import copy_bandwidth, half_type, matrix_peak
from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.errors import first_line, is_memory_error
from ser_core.models.shapes import parse_config
from ser_core.settings.recipe import Recipe
from ser_core.training.device import AUTO_PART_SECONDS

REFERENCE_STAGES = ("finetune", "ptapt", "tapt")
SLOW_SECONDS = 12.0
FEWER_ROWS = 8  # of a part of the reference, where its whole batch does not fit


def run(record: Record, plan: Plan) -> None:
    """Ours for every stage first, then the reference; a stage that runs out of memory leaves the others."""
    dtype = half_type(plan.device)
    peak, bandwidth = matrix_peak(plan.device, dtype), copy_bandwidth(plan.device)
    release()
    record.row("machine", type=str(dtype).removeprefix("torch."), matrix_tflops=peak / 1e12, copy_gb_a_second=bandwidth / 1e9)
    base = BaseBench(plan, "steps")
    ours: dict[str, Measured] = {}
    for stage in STAGES:
        if record.has_time(SLOW_SECONDS, stage):
            ours[stage] = base.measure(stage)
            record.row("steps", **described(stage, "ours", ours[stage], plan, peak, bandwidth))
    for stage in REFERENCE_STAGES[:1] if plan.small else REFERENCE_STAGES:
        if stage in ours and record.has_time(SLOW_SECONDS, f"reference of {stage}"):
            theirs = reference(record, base, stage)
            if theirs is not None:
                record.row("steps", **described(stage, "reference", theirs, plan, peak, bandwidth))
                record.row(
                    "ratios", stage=stage, step=theirs.seconds / ours[stage].seconds, epoch=theirs.epoch_seconds / ours[stage].epoch_seconds
                )


def reference(record: Record, base: BaseBench, stage: str) -> Measured | None:
    """Measure the authors' way in one part, or in parts of a few utterances if memory runs out."""
    for rows in (WHOLE, FEWER_ROWS):
        try:
            return base.measure(stage, reference=True, micro_batch=rows)
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            record.note(f"reference of {stage}, parts of {'all' if rows == WHOLE else rows} utterances: {first_line(error)}")
        release()
    return None


def described(stage: str, setting: str, measured: Measured, plan: Plan, peak: float, bandwidth: float) -> dict[str, Any]:
    """Return the row of a stage: seconds, frames a second, shares of the machine's limits, memory, wait for data."""
    recipe = base_recipe(steps=1, small=plan.small)
    frames = measured.frames_a_step
    operations = step_operations(stage, recipe, measured)
    row: dict[str, Any] = {
        "stage": stage,
        "setting": setting,
        "step_seconds": measured.seconds,
        "frames_a_second": frames / measured.seconds,
        "tflop_a_step": operations / 1e12,
        "share_of_matrix_peak": operations / measured.seconds / peak,
        "peak_allocated_gib": measured.allocated / 2**30,
        "peak_reserved_gib": measured.reserved / 2**30,
        "data_wait_share": measured.data_wait,
        "front_end_seconds": measured.front_end,
        "first_loss": measured.losses[0],
        "last_loss": measured.losses[-1],
    }
    if stage != "states":
        config = transformer_config(recipe)
        seconds = sum(map(sum, measured.samples)) / len(measured.samples) / SAMPLE_RATE
        parts = max(1.0, seconds / AUTO_PART_SECONDS[plan.device]) if setting == "ours" else 1.0
        moved = flops.step_bytes(parameters(config), parts, config, round(frames))
        row["share_of_bandwidth"] = moved / measured.seconds / bandwidth
    if measured.test_utterance:
        row["test_utterance_seconds"] = measured.test_utterance
    return row


def step_operations(stage: str, recipe: Recipe, measured: Measured) -> float:
    """Mean operations of a measured step, on valid frames."""
    config = transformer_config(recipe)
    if stage == "states":
        shape = parse_config(recipe.states.wav2vec.config)
        found = [flops.states_step(shape, recipe.states.rnn_units, samples) for samples in measured.samples]
    elif stage == "tapt":
        found = [flops.tapt_step(config, *both) for both in zip(measured.samples, measured.frames, strict=True)]
    else:
        found = [flops.finetune_step(config, frames) for frames in measured.frames]
    return sum(found) / len(found)


def parameters(config: Any) -> int:
    """Weights of the transformer: 4 h^2 + 2 h i a layer, and the positional convolution."""
    hidden = config.hidden_size
    layer = 4 * hidden * hidden + 2 * hidden * config.intermediate_size
    positions = hidden * (hidden // config.num_conv_pos_embedding_groups) * config.num_conv_pos_embeddings
    return int(config.num_hidden_layers * layer + positions)
