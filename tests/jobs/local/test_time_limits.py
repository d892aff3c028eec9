"""Stages on this machine end at `resources.STAGE.minutes`, as on Slurm; real workers, with minutes of a few seconds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jobs.control.controller import Desired, Report, run_local
from jobs.local.executor import LocalExecutor
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout, StageFolder
from jobs.store.records import Outcome, attempt_numbers, read_outcome
from jobs.worker.machine import Capacity
from tests.jobs import fake_registry, local_launch

MINUTE = 3.0  # seconds


def limited(folder: Path, behaviour: str, *, grace: float) -> tuple[Report, StageFolder]:
    """One stage with a time limit of one such minute."""
    layout = Layout(folder / "results", "exp")
    recipe = {"failing": {"finetune vft 1 0": behaviour}}
    graph = fake_registry.make_graph(recipe, methods=("vft",), folds=("1",), seeds=1)
    capacity, preload = Capacity(1, (), 8.0), ["tests.jobs.fake_registry:preload"]
    executor = LocalExecutor(
        local_launch.workplace(folder), layout, lambda stage: local_launch.RESOURCES, capacity, preload, limit_grace=grace, minute=MINUTE
    )
    with executor:
        report = run_local(Desired(graph, layout, since=time.time()), executor)
    (node,) = graph.nodes.values()
    return report, layout.stage(node.stage, node.key)


def outcomes(folder: StageFolder) -> list[Outcome]:
    found = (read_outcome(folder.attempt(number)) for number in attempt_numbers(folder))
    return [outcome for outcome in found if outcome is not None]


@pytest.mark.slow
def test_a_stage_that_reaches_its_time_limit_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    """It is asked for a checkpoint as Slurm does before a time limit, and the next attempt ends with the result."""
    report, folder = limited(tmp_path, "sleep:600", grace=600.0)
    assert report.complete
    assert [outcome.kind for outcome in outcomes(folder)] == [FailureClass.time_limit.name]
    assert len(attempt_numbers(folder)) == 2


@pytest.mark.slow
def test_a_stage_that_hangs_is_killed_and_given_up(tmp_path: Path) -> None:
    """It leaves no checkpoint, so that the second time limit ends it, with the setting that would help."""
    report, folder = limited(tmp_path, "deaf:600", grace=0.5)
    assert not report.complete
    assert [outcome.kind for outcome in outcomes(folder)] == [FailureClass.time_limit.name] * 2
    assert "reached its time limit (`minutes`) and wrote no checkpoint in time" in outcomes(folder)[0].message
    (reason,) = report.plan.reasons.values()
    assert "two attempts ended at the time limit" in reason
