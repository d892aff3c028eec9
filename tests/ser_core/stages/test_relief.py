"""A stage that ran out of memory is computed in smaller micro-batches, with the same result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ser_core.errors import Interrupted
from ser_core.models.tapt import TaptLoss, tapt_loss
from ser_core.settings.execution import FeatureCache
from ser_core.settings.recipe import Recipe
from ser_core.stages import tapt
from tests.ser_core.models.rebuild import likeliest_softmax
from tests.ser_core.presets import with_preset
from tests.ser_core.stages.conftest import Bench, artifacts, curves, stage_calls
from tests.ser_core.stages.test_stages import stop_after

TRAINED = ("finetune", "states", "tapt", "ptapt")
DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "feat_quantizer_dropout", "layerdrop")
OTHER_CURVES = {
    "states": ("validation/loss",),
    "tapt": tuple(f"codebook/group_{group}/{which}_perplexity" for group in (1, 2) for which in ("code", "prob")),
    "ptapt": ("masked_accuracy/k_2", "masked_accuracy/k_5"),
}
BOUNDS = {"validation": (0, 100), "codebook": (1, 8), "masked_accuracy": (0, 1)}  # of the curves, by their first word
NETWORKS = ("EmotionClassifier", "PseudoLabelModel", "LSTM")  # one of them sees every utterance of every stage but TAPT, a row each


@pytest.fixture
def without_chance(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """No dropout, no Gumbel noise: what torch draws itself, in the order of the parts."""
    recipe.backbone.config |= dict.fromkeys(DROPOUTS, 0.0)
    recipe.execution.log_every = 1
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", likeliest_softmax)
    return recipe


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, int]]]:
    """Of every pass through a network: whether it trained, and its rows."""
    seen: list[tuple[bool, int]] = []

    def noted(model: Any, waves: Sequence[Tensor], *arguments: Any, **options: Any) -> TaptLoss:
        seen.append((model.training, len(waves)))
        return tapt_loss(model, waves, *arguments, **options)

    monkeypatch.setattr(tapt, "tapt_loss", noted)

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if type(module).__name__ in NETWORKS and isinstance(arguments[0], Tensor):
            seen.append((module.training, len(arguments[0])))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    yield seen
    hook.remove()


def curve(output: Path, name: str) -> list[float]:
    return [value for _, value in curves(output)[name]]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "published"])
@pytest.mark.parametrize("stage", TRAINED)
def test_relief_changes_memory_and_no_number(
    stage: str, preset: str, without_chance: Recipe, bench: Bench, passes: list[tuple[bool, int]]
) -> None:
    """Rows of a pass are halved each time, in training and in evaluation; curves and metrics stay, up to the order of sums."""
    call = stage_calls(with_preset(without_chance, preset))[stage]
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    largest: dict[bool, list[int]] = {True: [], False: []}
    found = []
    for relief in (0, 1, 2):
        passes.clear()
        found.append(bench.run(call, upstream=upstream, relief=relief))
        for training, sizes in largest.items():
            sizes.append(max((rows for trained, rows in passes if trained is training), default=1))
    for whole, half, quarter in largest.values():
        assert half == -(-whole // 2)
        assert quarter == -(-whole // 4)
    assert largest[True][0] >= 3
    (expected, reference), *others = found
    for outcome, output in others:
        assert outcome["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
        for tag in ("train/loss", "train/accuracy", *OTHER_CURVES.get(stage, ())):
            assert curve(output, tag) == pytest.approx(curve(reference, tag), rel=1e-4)
    for tag in OTHER_CURVES.get(stage, ()):
        assert all(low <= value <= high for low, high in [BOUNDS[tag.split("/")[0]]] for value in curve(reference, tag))
    assert len(curve(reference, "train/loss")) == expected["metrics"]["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINED)
def test_a_checkpoint_is_resumed_in_smaller_parts(stage: str, without_chance: Recipe, bench: Bench, tmp_path: Path) -> None:
    """Relief is not part of a checkpoint's identity: steps completed before memory ran out are not repeated."""
    without_chance.execution.feature_cache = FeatureCache.none  # so that the stop comes at a step
    call = stage_calls(without_chance)[stage]
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    expected, whole = bench.run(call, upstream=upstream)
    checkpoint = tmp_path / "resumable"
    with pytest.raises(Interrupted):
        bench.run(call, upstream=upstream, checkpoint=checkpoint, should_stop=stop_after(2))
    found, output = bench.run(call, upstream=upstream, checkpoint=checkpoint, relief=1)
    assert found["durations"]["resumed_at_step"] == 2
    assert curve(output, "train/loss")[:2] == curve(whole, "train/loss")[:2]
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    assert artifacts(output).keys() == artifacts(whole).keys()
