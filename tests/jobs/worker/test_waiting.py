"""When a job could start, and when it did: after its submission, its upstream stages and its last attempt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.store.attempts import new_claim
from jobs.store.layout import StageFolder
from jobs.store.records import claim_attempt, write_json
from jobs.worker.waiting import job_times, queue_facts

BEGAN = 5000.0


@pytest.fixture
def stage(tmp_path: Path) -> StageFolder:
    return StageFolder(tmp_path / "stage")


def at(file: Path, time: float) -> None:
    """A file that was written at a time."""
    write_json(file, {})
    os.utime(file, (time, time))


def times(stage: StageFolder, number: int = 1, *upstream: StageFolder, submitted: float = 1000.0, start: str = "") -> dict[str, float]:
    return job_times(submitted, stage, number, upstream, BEGAN, {"SLURM_JOB_START_TIME": start})


def test_a_job_is_eligible_when_nothing_but_the_queue_keeps_it(stage: StageFolder, tmp_path: Path) -> None:
    """From its submission; not before its upstream stages have results; when it was requeued, not before its last attempt ended."""
    assert times(stage) == {"submitted": 1000.0, "eligible": 1000.0, "job_started": BEGAN}
    early, late = StageFolder(tmp_path / "early"), StageFolder(tmp_path / "late")
    at(early.result, 900.0)
    at(late.result, 1500.0)
    assert times(stage, 1, early)["eligible"] == 1000.0
    assert times(stage, 1, early, late)["eligible"] == 1500.0
    at(stage.attempt(1).claim, 2000.0)
    assert times(stage, 2, early, late)["eligible"] == 2000.0, "its last heartbeat: it was killed"
    at(stage.attempt(1).outcome, 1990.0)
    assert times(stage, 2, early, late)["eligible"] == 1990.0
    assert times(stage, submitted=0.0) == {}, "outside of Slurm"


@pytest.mark.parametrize(("stated", "started"), [("4990", 4990.0), ("", BEGAN), ("soon", BEGAN), ("5001", BEGAN), ("4000", BEGAN)], ids=str)
def test_the_start_of_a_job(stage: StageFolder, stated: str, started: float) -> None:
    """As Slurm states it, unless its clock cannot be that of the file system; else that of the worker."""
    assert times(stage, start=stated)["job_started"] == started


def test_waiting_of_all_attempts(stage: StageFolder) -> None:
    """That of the last one and that of those before; a claim of an earlier version counts as none, and an own one says nothing."""
    assert claim_attempt(stage, 1, new_claim(1))
    assert queue_facts(stage, 1) == {}
    assert claim_attempt(stage, 2, new_claim(2, submitted=10.0, eligible=20.0, job_started=50.0))
    assert claim_attempt(stage, 3, new_claim(3, submitted=60.0, eligible=70.0, job_started=69.0))
    assert claim_attempt(stage, 4, new_claim(4, submitted=70.0, eligible=80.0, job_started=180.5))
    assert claim_attempt(stage, 5, new_claim(5, submitted=90.0, eligible=90.0, job_started=999.0))
    assert queue_facts(stage, 4) == {"submitted": 70.0, "eligible": 80.0, "started": 180.5, "waited": 100.5, "before": 30.0}
