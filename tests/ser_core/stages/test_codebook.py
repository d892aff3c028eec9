"""A collapsed codebook is warned of, once a stage, and nothing else is."""

from __future__ import annotations

import pytest

from ser_core.settings.recipe import Recipe
from ser_core.stages.codebook import Codebook
from tests.ser_core.stages.conftest import Bench, curves, stage_calls

BOOK = Codebook(2, 320)


def rows(*entries: tuple[int, float, float, float]) -> list[list[object]]:
    """Entries of the curves: step, loss, code perplexity of each group."""
    return [
        [step, {"train/loss": loss, "codebook/group_1/code_perplexity": one, "codebook/group_2/code_perplexity": two}]
        for step, loss, one, two in entries
    ]


@pytest.mark.parametrize(
    ("entries", "collapsed"),
    [
        ([], False),
        ([(10, 0.0, 1.0, 1.0), (20, 0.0, 1.2, 1.0)], True),
        ([(10, 4.6, 200.0, 90.0), (20, 0.05, 1.2, 1.0), (30, 0.0, 1.0, 1.0)], True),
        ([(10, 4.6, 200.0, 90.0), (20, 0.05, 1.2, 1.6), (30, 0.0, 1.0, 1.0)], False),
        ([(20, 0.0, 1.0, 1.0), (30, 0.2, 1.0, 1.0)], False),
        ([(20, 0.0, 1.0, 1.0), (30, 0.0, 1.0, 50.0)], False),
        ([(10, 0.0, 1.0, 1.0)], False),
    ],
    ids=["none", "always", "later", "not yet an epoch", "a loss", "one group", "before the first epoch ends"],
)
def test_a_collapse(entries: list[tuple[int, float, float, float]], collapsed: bool) -> None:
    """Both groups have one code and there is no loss, in all entries of the last 20 steps."""
    found = BOOK.collapse(rows(*entries), 20, 0.1)
    assert ("has collapsed" in found) is collapsed
    assert not collapsed or "was at most 1.20 of 320 in every group, and the loss at most 0" in found
    assert not collapsed or "recipe.tapt.diversity_weight (now 0.1," in found


def test_curves_of_an_earlier_version_do_not_count() -> None:
    """A training that was resumed from a checkpoint whose curves have no perplexities."""
    assert BOOK.collapse([[10, {"train/loss": 0.0}], [20, {"train/loss": 0.0}]], 20, 0.1) == ""


@pytest.mark.slow
def test_a_training_with_a_collapsed_codebook_is_told_once(recipe: Recipe, bench: Bench) -> None:
    """One entry in each group: every frame has the same codes. The result has the warning, and so has one line; others have none."""
    plain, _ = bench.run(stage_calls(recipe)["tapt"])
    assert "warnings" not in plain
    assert not any("warning" in line for line in bench.lines)
    recipe.backbone.config["num_codevectors_per_group"] = 1
    recipe.tapt.steps, recipe.execution.log_every = 9, 1
    found, output = bench.run(stage_calls(recipe)["tapt"])
    (warning,) = found["warnings"]
    assert warning.startswith("the codebook has collapsed: over the last epoch the perplexity of its codes was at most 1.00 of 1")
    (line,) = (line for line in bench.lines if "warning" in line)
    first = next(step for step, _ in curves(output)["train/loss"] if f"step {step}: " in line)
    assert 1 < first < 9
    assert line == f"tapt: step {first}: warning: {warning}"
