"""Predicted requests on a real Slurm: the second launch requests less, too small requests are raised, and the report counts both."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.commands.explain import explain_lines, read_histories
from jobs.commands.requests import RequestsRow, TaskUse, read_tasks, requests_lines, requests_to_json, rows_of
from jobs.control.controller import context_of, experience_of, look
from jobs.control.estimates import Bounds, asks_in_words
from jobs.control.executor_protocol import Limits
from jobs.control.facts import Asked, Shortage
from jobs.control.observe import PassContext
from jobs.control.plan import make_plan
from jobs.experiment.config import Resources
from jobs.experiment.lookup import find_target, stages_of
from jobs.store.failures import FailureClass
from tests.jobs.failure_trial import Trial
from tests.slurm_cluster import Cluster
from tests.waiting import wait_until

MINUTES, GIGABYTES = 60, 3.0  # as configured
TOO_LONG = 6  # slot


@pytest.mark.slurm
def test_the_second_launch_requests_what_the_first_one_used(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Four runs as configured; four more as predicted, one of which reaches its time limit and resumes with the configured time."""
    trial = Trial(tmp_path, {TOO_LONG: "sleep:600"}, seeds=4, minutes=MINUTES, memory_gb=GIGABYTES)
    given = Resources(cpus=1, gpus=0, minutes=MINUTES, memory_gb=GIGABYTES)
    bounds = Bounds({"finetune": given}, siblings=3, warning_seconds=120.0)
    trial.desired = replace(trial.desired, bounds=bounds)
    assert trial.settle().complete
    first = trial.script(trial.claims(0)[0].slurm_job)
    assert f"#SBATCH --time={MINUTES}\n" in first
    assert "#SBATCH --mem=3072M\n" in first

    trial.seeds = 8
    trial.desired = replace(trial.launched(), bounds=bounds)
    now = look(trial.desired, trial.arrays)
    predict = experience_of(trial.desired, now)
    assert predict is not None
    told = predict("finetune", "vft")
    assert (told.siblings, told.minutes) == (4, 6), "seconds of work, the start, and the warning"
    assert told.memory_gb is not None
    (batch,) = make_plan(now.graph, now.facts, {}, runs_per_task={}, limits=Limits(), predict=predict).batches
    said = asks_in_words(trial.arrays.asked(batch), told)
    assert said.startswith(f"requests 6 min and {told.memory_gb:g} GB a task (configured: 60 min, 3 GB), from 4 finished siblings: ")
    shown = trial.arrays.previews([batch], now.graph, {})[0].script
    report = trial.look()
    job = report.in_flight[trial.run(TOO_LONG).key].job
    second = trial.script(job)
    for script in (shown, second):
        assert "#SBATCH --time=6\n" in script
        assert f"#SBATCH --mem={told.memory_gb * 1024:.0f}M\n" in script
    assert slurm_cluster.run("squeue", "-h", "-j", job, "-o", "%l").split() == ["6:00"]

    assert wait_until(lambda: trial.starts(TOO_LONG) == 1)
    end_soon(slurm_cluster, job)
    report = trial.settle()
    assert report.complete
    first_claim, second_claim = trial.claims(TOO_LONG)
    assert (first_claim.slurm_job, second_claim.checkpoint > 0) == (job, True)
    assert trial.classes(TOO_LONG) == [FailureClass.time_limit.name]
    again = trial.script(second_claim.slurm_job)
    assert f"#SBATCH --time={MINUTES}\n" in again, "the whole of it"
    assert f"#SBATCH --mem={told.memory_gb * 1024:.0f}M\n" in again, "which was enough"
    result = trial.result(TOO_LONG)
    assert result is not None
    assert result.provenance["seconds_before"] > 0

    assert wait_until(lambda: not trial.arrays.in_flight(), step=0.3), "the last one has left the queue too"
    tasks = read_tasks(trial.arrays.submissions(), report.graph, report.facts, trial.layout, context(trial), lambda stage: given)
    (row,) = rows_of(tasks)
    assert (row.tasks, row.predicted_time, row.enough_time, row.predicted_memory, row.enough_memory) == (9, 4, 3, 5, 5)
    assert row.time_asked < row.time_configured
    assert 0 < row.memory_asked < row.memory_configured
    (line,) = requests_lines("trial", [row])
    assert line.startswith("finetune vft: 9 tasks; time predicted for 4, enough for 3 (75%); memory predicted for 5, enough for 5 (100%); ")
    target = find_target(report.graph, f"vft/1/{TOO_LONG}")
    stories = read_histories(stages_of(report.graph, target.node), trial.layout, context(trial))
    lines = explain_lines(target, report, stories, trial.policy)
    assert any("its job requests 6 min" in each and "(configured: 60 min" in each for each in lines)
    assert any("time limit: resumes from its checkpoint with the time and memory configured" in each for each in lines)


def end_soon(cluster: Cluster, job: str) -> None:
    """Shorten the time limit: Slurm warns at once, and ends the job within half a minute."""
    command = ["scontrol", "update", f"JobId={job}", "EndTime=now+60"]
    environment = dict(cluster.environment)
    assert wait_until(lambda: subprocess.run(command, env=environment, capture_output=True).returncode == 0, step=0.2)


def context(trial: Trial) -> PassContext:
    """Refresh what is known of the queue."""
    trial.arrays.in_flight()
    return context_of(trial.desired, trial.arrays)


ASKED = Asked(minutes=12, memory_mb=2048, configured_minutes=60, configured_mb=8192)
PLAIN = Asked(60, 8192, 60, 8192)


def test_the_report_counts_predictions_and_compares_all_tasks() -> None:
    """Numbers of predicted tasks; hours and bytes requested per unit used, and the same as configured."""
    tasks = [
        TaskUse("finetune", "vft", PLAIN, 360.0, 1024 << 20),
        *[TaskUse("finetune", "vft", ASKED, 360.0, 1024 << 20)] * 3,
        TaskUse("finetune", "vft", ASKED, 720.0, 0, Shortage.time),
        TaskUse("tapt", "tapt", ASKED, 60.0, 0, Shortage.memory),
    ]
    (either,) = rows_of([TaskUse("tapt", "tapt", ASKED, 60.0, 0, Shortage.time | Shortage.memory)])
    assert (either.predicted_time, either.enough_time, either.predicted_memory, either.enough_memory) == (1, 0, 1, 0)
    runs, tapt, every = rows_of(tasks)
    hours = (4 * 360 + 720) / 3600
    expected = RequestsRow("finetune", "vft", 5, 4, 3, 4, 4, round(108 / 60 / hours, 2), round(5 / hours, 2), 3.5, 8.0)
    assert runs == expected
    assert (tapt.enough_time, tapt.enough_memory, tapt.memory_asked) == (1, 0, 0.0)
    assert (every.stage, every.tasks, every.predicted_time, every.enough_time) == ("all", 6, 5, 4)
    value = json.loads(json.dumps(requests_to_json("exp", (runs, tapt, every))))
    assert (value["schema"], value["requests"][0]["enough_time"]) == (1, 3)
    assert requests_lines("exp", rows_of([])) == ["exp: no task has ended yet whose request is on record"]
