"""Figures of the GPU check: operations against torch's own counter, comparisons, recommendations, the page."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_check import compare, flops
from benchmarks.gpu_check.advice import advice, goals
from benchmarks.gpu_check.base_steps import StepClock, step_samples
from benchmarks.gpu_check.part_attention import part_lengths
from benchmarks.gpu_check.part_waits import covered, lines_of
from benchmarks.gpu_check.recipes import SMALL_BACKBONE, SMALL_WAV2VEC
from benchmarks.gpu_check.report import table
from benchmarks.gpu_check.runner import ROOT
from ser_core.models.backbone import frame_count, load_encoder
from ser_core.models.shapes import parse_config, state_count
from ser_core.models.trained import below, train_only
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.execution import Attention

SAMPLES = 16_000 * 3


def counted(work: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 4])
def test_operations_of_the_transformer_are_those_that_torch_counts(layers: int) -> None:
    """Forward, and forward and backward with the gradient of the input."""
    # A single group: torch counts the gradient of a grouped convolution's weights as often as it has groups.
    config = {**SMALL_BACKBONE, "num_hidden_layers": layers, "num_conv_pos_embedding_groups": 1, "layerdrop": 0.0}
    model = load_encoder(BackboneSettings(checkpoint=None, config=config), attention=Attention.eager)
    frames = frame_count(model.config, SAMPLES)
    hidden = torch.randn(1, frames, model.config.hidden_size, requires_grad=True)
    forward = counted(lambda: model.encoder(hidden))
    assert forward == pytest.approx(flops.transformer_forward(model.config, [frames]), rel=0.01)
    trained = counted(lambda: torch.autograd.backward(model.encoder(hidden).last_hidden_state.sum()))
    assert trained == pytest.approx(flops.finetune_step(model.config, [frames]), rel=0.01)
    grouped = load_encoder(
        BackboneSettings(checkpoint=None, config={**config, "num_conv_pos_embedding_groups": 4}), attention=Attention.eager
    )
    assert counted(lambda: grouped.encoder(hidden)) == pytest.approx(flops.transformer_forward(grouped.config, [frames]), rel=0.01)


def test_dropped_layers_are_taken_off() -> None:
    """Layer drop 0.5 computes half of the layers, and the positional convolution as before."""
    found = []
    for layers, dropped in ((4, 0.0), (4, 0.5), (2, 0.0)):
        config = {**SMALL_BACKBONE, "num_hidden_layers": layers, "layerdrop": dropped}
        found.append(flops.transformer_forward(load_encoder(BackboneSettings(checkpoint=None, config=config)).config, [100, 50]))
    assert found[0] > found[1] == pytest.approx(found[2])


def test_operations_of_the_front_end_are_those_that_torch_counts() -> None:
    """Forward, and trained but for the gradient of the wave, which the formula counts too."""
    model = load_encoder(BackboneSettings(checkpoint=None, config=SMALL_BACKBONE))
    waves = torch.randn(1, SAMPLES)

    def front_end() -> torch.Tensor:
        projected: torch.Tensor = model.feature_projection(model.feature_extractor(waves).transpose(1, 2))[0]
        return projected

    assert counted(front_end) == pytest.approx(flops.front_end_forward(model.config, [SAMPLES]), rel=0.01)
    first = counted(lambda: model.feature_extractor.conv_layers[0].conv(waves[:, None]))
    trained = flops.tapt_step(model.config, [SAMPLES], []) - first
    assert counted(lambda: torch.autograd.backward(front_end().sum())) == pytest.approx(trained, rel=0.01)


def test_operations_of_the_emotion_states_are_those_that_torch_counts() -> None:
    """The same convolutions as plain modules: frozen ones forward, the aggregator (padded on the left) and the last one trained."""
    shape = parse_config(SMALL_WAV2VEC)
    wave = torch.randn(1, 1, SAMPLES)

    def convolved(inputs: torch.Tensor, layers: Sequence[tuple[int, int, int]], *, padded: bool) -> torch.Tensor:
        for channels, kernel, stride in layers:
            inputs = torch.nn.functional.pad(inputs, (kernel - 1 if padded else 0, 0))
            inputs = torch.nn.Conv1d(inputs.shape[1], channels, kernel, stride)(inputs)
        return inputs

    def step() -> None:
        with torch.no_grad():
            extracted = convolved(wave, shape.conv_feature_layers, padded=False)
        aggregated = convolved(extracted.requires_grad_(), shape.conv_aggregator_layers, padded=True)
        torch.autograd.backward(convolved(aggregated, [(32, 4, 2)], padded=False).sum())

    assert flops.states_step(shape, 0, [SAMPLES]) == pytest.approx(counted(step), rel=0.01)
    recurrent = flops.states_step(shape, 8, [SAMPLES]) - flops.states_step(shape, 0, [SAMPLES])
    weights = sum(each.numel() for name, each in torch.nn.LSTM(32, 8, bidirectional=True).named_parameters() if name.startswith("weight"))
    assert recurrent == 3 * 2 * weights * state_count(shape, SAMPLES)


def test_bytes_of_a_step_grow_with_parts_and_frames() -> None:
    model = load_encoder(BackboneSettings(checkpoint=None, config={**SMALL_BACKBONE, "layerdrop": 0.0}))
    train_only(model, below(model, "encoder"))
    base = flops.step_bytes(1_000, 1, model.config, 0)
    assert base == 1_000 * (28 + 18)
    assert flops.step_bytes(1_000, 3, model.config, 0) - base == 1_000 * 2 * 18
    assert flops.step_bytes(1_000, 1, model.config, 10) - base == 2 * 34 * 64 * 2 * 10


def test_curves_agree_within_the_tolerance_or_not() -> None:
    tolerance = compare.Tolerance(first=0.01, loss=0.1, probability=0.1)
    assert compare.same_losses([1.0, 2.0], [1.0, 2.1], tolerance)[0]
    assert not compare.same_losses([1.0, 2.0], [1.02, 2.0], tolerance)[0]
    assert not compare.same_losses([1.0, 2.0], [1.0, 2.3], tolerance)[0]
    for wrong in ([1.0], [], [1.0, math.nan], [math.inf, 2.0]):
        assert not compare.same_losses([1.0, 2.0], wrong, tolerance)[0]
    assert not compare.same_losses([], [], tolerance)[0]


def test_arrays_that_are_not_finite_or_of_another_shape_differ() -> None:
    values = np.array([1.0, -4.0])
    assert compare.array_difference(values, values + 0.4) == pytest.approx(0.1)
    assert compare.norm_difference(values, 2 * values) == pytest.approx(1.0)
    for wrong in (np.array([1.0]), np.array([1.0, np.nan])):
        assert math.isinf(compare.array_difference(values, wrong))
        assert math.isinf(compare.norm_difference(values, wrong))


def test_overlapping_kernels_count_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4
    assert covered([]) == 0


def test_synchronising_lines_are_counted_by_file_and_line() -> None:
    def warning(text: str, name: str, line: int) -> warnings.WarningMessage:
        return warnings.WarningMessage(text, UserWarning, name, line)

    told = "called a synchronizing CUDA operation"
    own = str(ROOT / "ser_core/models/ptapt.py")
    found = lines_of([warning(told, own, 7), warning(told, own, 7), warning(told, "/lib/a/b/c.py", 1), warning("other", own, 8)])
    assert found == {"ser_core/models/ptapt.py:7": 2, "a/b/c.py:1": 1}


def test_a_clock_that_did_not_reach_its_steps_says_so() -> None:
    clock = StepClock(first=1, count=2)
    clock.on_step(0)
    clock.on_step(1)
    with pytest.raises(ValueError, match="fewer than 4 steps"):
        _ = clock.seconds
    clock.on_step(3)
    assert clock.seconds >= 0


def test_a_step_computes_what_its_stage_cuts() -> None:
    parts = [([2, 0], 3), ([1], 3)]
    assert step_samples("states", parts, [5, 3, 9], 4) == [3, 3, 3]
    assert step_samples("tapt", parts, [5, 3, 9], 4) == [4, 4, 3]
    lengths = part_lengths(72.0)
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) * max(lengths) <= 72 * 50


def part(stage: str, length: float, seconds: float, memory: float = 1.0) -> dict[str, Any]:
    return {"stage": stage, "part_seconds": length, "step_seconds": seconds, "peak_reserved_gib": memory}


def recommended(tables: dict[str, Sequence[dict[str, Any]]]) -> dict[str, str]:
    return {each.setting.split(" ")[0]: each.recommended for each in advice(tables)}


def test_the_shortest_parts_that_are_nearly_the_fastest_for_every_stage_are_recommended() -> None:
    rows = [part("finetune", 36, 1.2), part("finetune", 72, 1.01), part("finetune", 300, 1.0)]
    assert recommended({"part_seconds": rows}) == {'AUTO_PART_SECONDS["cuda"]': "72"}
    slow = [part("tapt", 36, 2.0), part("tapt", 72, 1.5), part("tapt", 300, 1.0)]
    assert recommended({"part_seconds": [*rows, *slow]}) == {'AUTO_PART_SECONDS["cuda"]': "300"}
    unfinished = [*rows, part("tapt", 72, 1.0), part("tapt", 36, 1.0)]  # 300 s was not measured for TAPT
    assert recommended({"part_seconds": unfinished}) == {'AUTO_PART_SECONDS["cuda"]': "72"}
    assert recommended({"part_seconds": rows[:1]}) == {}


def test_a_kernel_is_recommended_only_if_it_is_right_and_gains_for_every_length() -> None:
    def kernel(name: str, length: float, seconds: float, difference: float | None = 0.0) -> dict[str, Any]:
        return {"kernel": name, "part_seconds": length, "seconds": seconds, "difference": difference}

    now = [kernel("now", 72, 1.0), kernel("now", 300, 4.0), kernel("dropout", 72, 0.1, None)]
    assert recommended({"attention": [*now, kernel("new", 72, 0.5), kernel("new", 300, 2.0)]}) == {"attention": "new"}
    assert recommended({"attention": [*now, kernel("new", 72, 0.5), kernel("new", 300, 4.0)]}) == {"attention": "now"}
    assert recommended({"attention": [*now, kernel("new", 72, 0.5)]}) == {"attention": "now"}
    assert recommended({"attention": [*now, kernel("new", 72, 0.1, 0.5), kernel("new", 300, 0.1, 0.5)]}) == {"attention": "now"}


def test_other_choices_follow_from_their_figures() -> None:
    def way(name: str, seconds: float, warm_up: float) -> dict[str, Any]:
        return {"way": name, "pass_seconds": seconds, "warm_up_seconds": warm_up, "new_shapes_seconds": 0.0}

    assert recommended({"compile": [way("as it is", 1.0, 0.1), way("torch.compile", 0.5, 60.0)]}) == {"the": "torch.compile"}
    assert recommended({"compile": [way("as it is", 1e-3, 0.1), way("torch.compile", 5e-4, 60.0)]}) == {"the": "as it is"}
    adam = [{"implementation": "fused", "step_seconds": 1e-3}, {"implementation": "foreach", "step_seconds": 2e-3}]
    assert recommended({"adam": adam}) == {"Adam": "fused"}
    k_means = [
        {"k": k, "device": device, "pass_seconds": 1 / k if device == "cuda" else 0.1} for k in (4, 64) for device in ("cuda", "cpu")
    ]
    assert recommended({"k_means": k_means}) == {"device": "cuda"}
    assert recommended({"k_means": k_means[:2]}) == {"device": "cpu"}
    together = [{"at_once": 1, "gain": 1.0}, {"at_once": 2, "gain": 1.5}, {"at_once": 4, "gain": 1.52}]
    assert recommended({"together": together}) == {"resources.finetune.at_once": "2"}
    assert recommended({"together": [together[0], {"at_once": 2, "gain": 1.05}]}) == {"resources.finetune.at_once": "1"}


def test_goals_are_judged_from_the_fine_tuning_steps() -> None:
    steps = [
        {"stage": "finetune", "setting": "ours", "share_of_matrix_peak": 0.6, "data_wait_share": 0.2, "step_seconds": 0.1},
        {"stage": "finetune", "setting": "reference", "share_of_matrix_peak": 0.1, "data_wait_share": 0.0, "step_seconds": 1.0},
    ]
    ratios = [{"stage": "finetune", "step": 10.0, "epoch": 9.0}]
    assert [goal.reached for goal in goals({"steps": steps, "ratios": ratios})] == [True, False, False]
    batch = [
        {"way": "laid out, pinned", "seconds": 0.02},
        *({"way": f"copied, {kind}", "seconds": 0.01} for kind in ("pageable", "pinned")),
    ]
    assert recommended({"steps": steps, "batch": batch}) == {"features": "on the GPU"}


def test_rows_with_other_columns_share_a_table() -> None:
    lines = table([{"stage": "tapt", "step_seconds": 0.12345678}, {"stage": "states", "share": None, "note": "x" * 100}])
    assert lines[0].split() == ["stage", "step", "seconds", "share", "note"]
    assert lines[1].split() == ["tapt", "0.1235"]
    assert lines[2].split() == ["states", "x" * 60]
