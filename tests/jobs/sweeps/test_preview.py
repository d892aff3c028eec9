"""Stages and points of a sweep, counted before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.experiment.sweep_section import Search, Stopping, SweepSettings
from jobs.sweeps.preflight import preview, preview_lines
from tests.jobs.sweeps.fake_registry import compute, make_sweep


def needed(folder: Path, settings: SweepSettings) -> dict[str, tuple[int, int]]:
    sweep = make_sweep(folder, settings)
    return {each.stage: (each.needed, each.finished) for each in preview(sweep).stages}


def test_shared_stages_are_counted_once(tmp_path: Path) -> None:
    """States once a fold, each k-means once a fold and k, P-TAPT once a fold and set, fine-tunings for every seed."""
    found = needed(tmp_path, SweepSettings(counts=[16, 64], seeds=2))
    assert found == {"states": (3, 0), "cluster": (6, 0), "ptapt": (9, 0), "finetune": (18, 0)}


@pytest.mark.slow
def test_finished_stages_are_not_counted_as_work(tmp_path: Path) -> None:
    """After one fold of one set its stages are finished, and the others are estimated from their times."""
    sweep = make_sweep(tmp_path, SweepSettings(counts=[16, 64], seeds=1))
    only = replace(sweep, experiment=replace(sweep.experiment, sweep=replace(sweep.experiment.sweep, sets=[[16]], counts=[], folds=["1"])))
    assert compute(only).report.complete
    found = preview(sweep)
    assert {each.stage: (each.needed, each.finished) for each in found.stages} == {
        "states": (3, 1),
        "cluster": (6, 1),
        "ptapt": (9, 1),
        "finetune": (9, 1),
    }
    assert {each.source.value for each in found.stages} == {"finished siblings"}
    before = sorted(tmp_path.rglob("*"))
    assert "states: 3 needed, 1 there, 2 to compute: 0.0 GPU-hours" in "\n".join(preview_lines(sweep, found))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("search", "trials", "points"), [(Search.grid, 2, 7), (Search.random, 4, 4), (Search.optuna, 4, 4), (Search.random, 99, 7)]
)
def test_points_of_each_search(search: Search, trials: int, points: int, tmp_path: Path) -> None:
    """A grid has all points; random and Optuna the requested number, at most all. Optuna's points are examples."""
    sweep = make_sweep(tmp_path, SweepSettings(search=search, trials=trials, stopping=Stopping.none))
    found = preview(sweep)
    assert len(found.points) == len(set(found.points)) == points
    assert found.example is (search is Search.optuna)
    lines = preview_lines(sweep, found)
    assert ("  16" in lines or "  64" in lines or "  256" in lines) is not found.example
    assert "none is stopped early" in lines[0]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "after 1, 2 and 4 of 5 folds one point in 2 continues (ASHA)"),
        ({"reduction": 3}, "after 1 and 3 of 5 folds one point in 3 continues (ASHA)"),
        ({"grace_folds": 3}, "after 3 of 5 folds one point in 2 continues (ASHA)"),
        ({"grace_folds": 5}, "none is stopped early"),
    ],
)
def test_preview_lists_the_rungs_of_early_stopping(asked: dict[str, int], told: str, tmp_path: Path) -> None:
    """At the rungs of ASHA, which are not all folds."""
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[16]], **asked), folds=("1", "2", "3", "4", "5"))  # type: ignore[arg-type]
    assert preview_lines(sweep, preview(sweep))[0].endswith(told)


def test_the_validation_speakers_of_each_fold_are_named(tmp_path: Path) -> None:
    """The preview names the speakers that are excluded from training."""
    sweep = make_sweep(tmp_path, SweepSettings(folds=["3", "1"]))
    lines = preview_lines(sweep, preview(sweep))
    assert [line for line in lines if "held out" in line and "scored" in line] == [
        "  fold 3 held out: scored on speaker of 1",
        "  fold 1 held out: scored on speaker of 2",
    ]
    resources = {"default": replace(sweep.experiment.resources["default"], gpus=2, minutes=60)}
    dear = replace(sweep, experiment=replace(sweep.experiment, resources=resources))
    assert "states: 2 needed, 0 there, 2 to compute: 4.0 GPU-hours" in "\n".join(preview_lines(dear, preview(dear)))
