"""What runs, where and how far it is; why stages wait; the newest result."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.commands.activity import Activity, RunningRow, activity_lines, last_progress, newest_result, read_running, waiting_rows
from jobs.control.controller import Report, read_facts
from jobs.control.executor_protocol import Limits
from jobs.control.facts import InFlight, Pending, Phase, StageFacts
from jobs.control.plan import make_plan
from jobs.control.remaining import Hours, Remaining
from jobs.experiment.graph import Graph
from jobs.store.attempts import new_claim
from jobs.store.layout import Layout
from jobs.store.records import claim_attempt
from tests.jobs.fake_registry import make_graph

KEY = "0123456789abcdef0123"
NAME = f"2026-11-29 12:00:00 finetune vft fold 1 seed 0 [{KEY[:8]}]:"
OTHER = "2026-11-29 12:00:00 finetune vft fold 1 seed 1 [11234567]:"


def report_of(graph: Graph, facts: dict[str, StageFacts], in_flight: dict[str, InFlight] | None = None) -> Report:
    known, flights = {key: StageFacts() for key in graph.nodes} | facts, in_flight or {}
    return Report(make_plan(graph, known, flights, runs_per_task={}, limits=Limits(), now=time.time()), graph, known, flights)


def test_the_last_progress_of_a_log_is_taken() -> None:
    """Of this stage and attempt; with the seconds to go if they are stated."""
    lines = [f"{NAME} attempt 1 on node1, process 7", f"{NAME} front end: utterance 68/384", f"{OTHER} finetune: step 9/10, 1 s to go"]
    assert last_progress("\n".join(lines), KEY) == ("utterance 68/384", None)
    lines.append(f"{NAME} finetune: step 340/1000, epoch 4/10, loss 0.5, 0.1 s a step, 66 s to go")
    assert last_progress("\n".join(lines), KEY) == ("step 340/1000, epoch 4/10", 66.0)


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("step 3/10",),
        (f"{OTHER} finetune: step 3/10",),
        (f"{NAME} finetune: step 3/10", f"{NAME} attempt 2 on node1, process 8", f"{NAME} reads /data/1/2 and run vft/1/0"),
    ],
)
def test_progress_of_something_else_is_not_taken(lines: tuple[str, ...]) -> None:
    """No line, one without a name, another stage of the same task, an earlier attempt, a path."""
    assert last_progress("\n".join(lines), KEY) == ("", None)


def test_a_running_stage_has_its_node_and_progress(tmp_path: Path) -> None:
    """From its claim and the end of its log, of which only the last part is read."""
    graph, layout = make_graph(methods=("vft",), folds=("1",), seeds=2), Layout(tmp_path, "exp")
    first, second = (graph.nodes[run.key] for run in graph.runs)
    log = tmp_path / "task.out"
    log.write_text("x" * 100_000 + f"\n{first.name}: finetune: step 3/10, epoch 1/2, loss 0.1, 8 s to go\n{second.name}: attempt 1 on n\n")
    claim = new_claim(1, log=str(log))
    assert claim_attempt(layout.stage("finetune", first.key), 1, claim)
    report = report_of(graph, read_facts(graph, layout), {second.key: InFlight(Phase.running, "7_1")})
    one, two = read_running(report, layout)
    assert one == RunningRow(first.key, first.name, socket.gethostname(), "", claim.started, 1, "step 3/10, epoch 1/2", 8.0)
    assert two == RunningRow(second.key, second.name, "", "7_1", 0.0)
    log.unlink()
    assert read_running(report, layout)[0].progress == ""
    facts = {**report.facts, second.key: StageFacts(attempts=1, ended=1, error="stopped")}
    (_, leaving) = activity_lines(Activity(0.0, 1, 0, read_running(replace(report, facts=facts), layout)))[1:3]
    assert leaving == f"running: {second.name}: attempt 1 has ended, its job is still in the queue, job 7_1"


def test_why_stages_wait() -> None:
    """Slurm's reason with the earliest submission; what will never start is not waiting, nor is what follows later."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1",), seeds=6)
    vft = [run.key for run in graph.runs if run.method == "vft"]
    flights = {key: InFlight(Phase.queued, f"7_{index}") for index, key in enumerate(vft[:4])}
    flights[vft[4]] = InFlight(Phase.running, "7_4")
    pending = {vft[0]: Pending("Priority", 50.0), vft[1]: Pending("Priority", 40.0), vft[2]: Pending("", 60.0), vft[3]: Pending("x", 1.0)}
    facts = {vft[5]: StageFacts(not_before=time.time() + 100)}
    rows = waiting_rows(report_of(graph, facts, flights), pending, time.time(), {vft[3]: "held"})
    assert {(row.reason, row.stages, row.since) for row in rows} == {
        ("pending in Slurm (Priority)", 2, 40.0),
        ("pending in Slurm", 1, 60.0),
        ("paused after an error of the file system", 1, None),
    }


def test_the_newest_result_is_that_of_a_run() -> None:
    """By the time at which it was finished; a pretraining has no UA."""
    graph = make_graph(methods=("tapt",), folds=("1",), seeds=3)
    upstream = next(key for key, node in graph.nodes.items() if node.stage == "tapt")
    one, two, _ = (run.key for run in graph.runs)
    assert newest_result(graph, {upstream: (99.0, None)}) is None
    newest = newest_result(graph, {one: (50.0, 61.0), two: (40.0, 72.0), upstream: (99.0, None)})
    assert newest is not None
    assert (newest.run, newest.seed, newest.ua) == ("tapt/1/0", 0, 61.0)


def test_lines_of_activity() -> None:
    """Many running stages are a number; the end has its basis; the time of the look is there."""
    rows = tuple(RunningRow(str(index), f"finetune {index}", "node7", f"7_{index}", 900.0, 1, "step 1/2") for index in range(12))
    left = Remaining(40, Hours(gpu=2.0), Hours(gpu=8.0), 3600.0, "12 stages at once, as now; times by finished siblings")
    now = Activity(1000.0, 50, 10, rows, (), None, left)
    lines = activity_lines(now)
    assert lines[0] == "10 of 50 runs done"
    assert lines[1] == "running: finetune 0: on node7, job 7_0, for 1 min 40 s, step 1/2"
    assert "running: 2 more" in lines
    assert "used 2.0 GPU-hours; left about 8.0 GPU-hours for 40 stages; ends in about 1 h 0 min" in lines[-2]
    assert lines[-1].startswith("looked at ")
    assert "end not known: nothing is running" in "\n".join(
        activity_lines(replace(now, remaining=replace(left, seconds=None, basis="nothing is running")))
    )
    assert os.linesep.join(lines).count("running:") == 11
