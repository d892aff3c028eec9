"""The command that executes a task, in a process of its own: arguments, signals, two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.signals import STOP_SIGNALS, WARNING_SIGNAL, StopRequest
from jobs.store.records import Ending
from jobs.worker.stage import Verdict
from jobs.worker.task import describe, write_description
from tests.jobs.worker.places import Place, failing
from tests.waiting import until

REQUESTED = {"submitted": 1e9, "minutes": 30}
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def _start(place: Place, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    file = place.layout.root / "tasks.json"
    description = describe(place.place, place.graph, [[place.tapt.key], [node.key for node in place.runs]])
    write_description(file, replace(description, requested=REQUESTED))
    values = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-m", "jobs.worker.main", str(file), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=values, cwd=REPOSITORY)


@pytest.mark.slow
def test_the_command_runs_one_task_of_a_file(place: Place) -> None:
    """Index from the argument or from Slurm's array; the claim records the array task, the result its request and its waiting."""
    before = time.time()
    with _start(place, "0") as first:
        assert first.wait(60) == 0
    environment = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77", "SLURM_JOB_ID": "78", "SLURM_CPUS_PER_TASK": "1"}
    with _start(place, **environment) as second:
        assert second.wait(60) == 0
    result = place.result(place.runs[2])
    assert result.provenance["slurm_job"] == "77_1"
    assert result.provenance["slurm"]["job_id"] == "78"
    assert result.provenance["threads"] == 1
    assert result.provenance["requested"] == REQUESTED
    queue = result.provenance["queue"]
    assert before < queue["eligible"] == pytest.approx(place.folder(place.tapt).result.stat().st_mtime, abs=0.001)
    assert queue["eligible"] < queue["started"] < time.time()
    assert queue["waited"] == pytest.approx(queue["started"] - queue["eligible"], abs=0.002)
    assert (queue["submitted"], queue["before"]) == (1e9, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("2",), ("-1",), ("x",), ()])
def test_the_command_rejects_wrong_arguments(place: Place, arguments: tuple[str, ...]) -> None:
    """One line on stderr and exit code 2."""
    with _start(place, *arguments) as process:
        output, error = process.communicate()
        assert process.returncode == 2
        assert output == ""
        assert len(error.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_after_a_stop_signal_the_next_attempt_resumes_from_the_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 3, an outcome that records whether it was the time limit, and a second attempt that finds the checkpoint."""
    place = failing(tmp_path, "sleep:60")
    with _start(place, "0") as process:
        until(lambda: place.starts(place.tapt), step=0.02)
        process.send_signal(number)
        assert process.wait() == 3
    outcome = place.outcome(place.tapt)
    assert outcome.ending is Ending.interrupted
    assert outcome.kind == ("time_limit" if number is WARNING_SIGNAL else "interrupted")
    assert (place.folder(place.tapt).checkpoint / "state.json").is_file()
    assert place.execute(place.tapt) is Verdict.done
    assert place.result(place.tapt).attempt == 2


def test_the_first_signal_is_the_reason(tmp_path: Path) -> None:
    """At its time limit a job is warned, then terminated while it writes a checkpoint."""
    stop = StopRequest()
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        stop.install()
        assert not stop()
        signal.raise_signal(WARNING_SIGNAL)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    assert stop.signal == WARNING_SIGNAL


def test_two_workers_at_once_compute_once(tmp_path: Path) -> None:
    """Started together on the same stage, one computes it and the other does not."""
    place = Place(tmp_path, {"seconds": 1.5})
    first, second = _start(place, "0"), _start(place, "0")
    for process in (first, second):
        process.communicate()
    assert sorted([first.returncode, second.returncode]) in ([0, 3], [0, 0])
    assert place.starts(place.tapt) == 1
