"""Whether an utterance's part of a training step depends on its batch mates: it does with `published`, not with `paper`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ser_core.models.classifier import label_weight
from ser_core.settings.recipe import Recipe
from ser_core.stages import context as stage_context
from ser_core.training.batches import StepPlan
from ser_core.training.loop import LocalParts, Objective
from tests.ser_core.models.rebuild import likeliest_softmax
from tests.ser_core.presets import with_preset
from tests.ser_core.stages.conftest import SHORTEST, Bench, stage_calls
from tests.ser_core.stages.test_relief import DROPOUTS, TRAINED


class CapturedError(Exception):
    def __init__(self, objective: Objective) -> None:
        super().__init__("captured")
        self.objective = objective


@pytest.fixture
def prepared(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Nothing that torch draws by itself; masks in every utterance; no diversity, which is a term of the batch by definition."""
    recipe.backbone.config |= dict.fromkeys(DROPOUTS, 0.0)
    for settings in (recipe.finetune.spec_augment, recipe.states.spec_augment):
        settings.time_probability, settings.time_length, settings.feature_probability = 0.4, 5, 0.5
    recipe.tapt.diversity_weight = 0.0
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", likeliest_softmax)
    return recipe


def objective_of(stage: str, recipe: Recipe, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The objective of a stage, as the stage builds it."""

    def capture(objective: Objective, *arguments: Any) -> None:
        raise CapturedError(objective)

    call = stage_calls(recipe)[stage]
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    with monkeypatch.context() as patch:
        patch.setattr(stage_context, "train", capture)
        with pytest.raises(CapturedError) as captured:
            bench.run(call, upstream=upstream)
    return captured.value.objective


def step_sum(objective: Any, batch: list[int]) -> Tensor:
    """Loss and gradient of a step on a batch, as one vector: summed over utterances, not divided by the batch's weight or labels."""
    objective._plan = StepPlan(lambda epoch: [batch])
    objective.model.train()
    objective.model.zero_grad()
    parts = objective.plan(0).parts
    loaded = {number: objective.load(part) for number, part in enumerate(parts)}
    objective.before_step(LocalParts(loaded, len(parts), len(batch)))
    loss = sum(objective.loss(part).loss for part in loaded.values())
    first = parts[0]
    if hasattr(first, "labels"):
        labels = torch.cat([part.labels for part in parts])
        loss = loss * label_weight(labels, objective._weights)
    elif hasattr(first, "labelled"):
        loss = loss * first.labelled
    torch.autograd.backward(loss)
    gradients = [parameter.grad.flatten() for parameter in objective.parameters().values() if parameter.grad is not None]
    return torch.cat([loss.detach().reshape(1), *gradients])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "published"])
@pytest.mark.parametrize("stage", TRAINED)
def test_batch_mates(stage: str, preset: str, prepared: Recipe, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `paper`, two utterances contribute to a batch what each contributes beside a third one alone: loss and every gradient.

    The third is the shortest, because `states` crops the batch to its length. With `published`, padding, masks or negatives depend on the
    batch, so the same sums differ.
    """
    objective = objective_of(stage, with_preset(prepared, preset), bench, monkeypatch)
    split = getattr(objective, "_split", None) or objective._context.training
    long_enough = [position for position, samples in enumerate(split.samples) if samples > SHORTEST]
    third, *others = sorted(long_enough, key=lambda position: split.samples[position])
    first, second = others[-1], others[0]
    assert split.samples[first] > split.samples[second] > split.samples[third]
    whole = step_sum(objective, [first, second, third])
    apart = step_sum(objective, [first, third]) + step_sum(objective, [second, third]) - step_sum(objective, [third])
    difference = float((whole - apart).norm() / whole.norm())
    if preset == "paper":
        assert difference < 1e-5
    else:
        assert difference > 1e-3
