"""What a launch prints at once, and its progress: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from jobs.commands.grid import run_grid
from jobs.commands.progress import opening_line, stage_progress
from jobs.control.controller import Change, Event, Report
from jobs.control.executor_protocol import Limits
from jobs.control.facts import InFlight, Phase, StageFacts
from jobs.control.plan import make_plan
from jobs.experiment.graph import Graph
from tests.jobs.fake_registry import make_graph
from tests.jobs.local_launch import new_session


def report_of(graph: Graph, facts: dict[str, StageFacts], in_flight: dict[str, InFlight] | None = None) -> Report:
    known, flights = {key: StageFacts() for key in graph.nodes} | facts, in_flight or {}
    return Report(make_plan(graph, known, flights, runs_per_task={}, limits=Limits()), graph, known, flights)


def test_what_is_reused_and_computed_is_one_line() -> None:
    """By stage; what is given up or blocked is counted apart; a pretraining that nobody reads any more is neither."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1", "2"), seeds=2)
    vft = [run.key for run in graph.runs if run.method == "vft"]
    tapt = [key for key, node in graph.nodes.items() if node.stage == "tapt"]
    assert opening_line("exp", report_of(graph, {})) == "exp: 8 runs, 10 stages: 0 reused, 10 to compute (8 finetune, 2 tapt)"
    facts = {vft[0]: StageFacts(done=True), tapt[0]: StageFacts(attempts=1, failures=1, error="x", stopped="x")}
    line = opening_line("exp", report_of(graph, facts))
    assert line == "exp: 8 runs, 10 stages: 1 reused, 6 to compute (5 finetune, 1 tapt), 3 not possible (given up, held or cancelled)"
    done = {run.key: StageFacts(done=True) for run in graph.runs}
    assert opening_line("exp", report_of(graph, done)) == "exp: 8 runs, 10 stages: 8 reused, 0 to compute"


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """An event is a line; a pass is one if something is different. A job that is still ending, with its result there, is not running."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=3)
    one, two, three = (run.key for run in graph.runs)
    jobs = {one: InFlight(Phase.running, "6"), two: InFlight(Phase.running, "7_0"), three: InFlight(Phase.queued, "7_1")}
    report = report_of(graph, {one: StageFacts(done=True)}, jobs)
    with stage_progress("exp") as progress:
        progress.event(Event(Change.done, graph.nodes[one], "done in 1 s", 1, 3))
        progress.look(report)
        progress.look(report)
    assert capsys.readouterr().out.splitlines() == [
        f"[1/3] {graph.nodes[one].name} done in 1 s",
        "exp: 1 of 3 stages done, 1 running, 1 in the queue",
    ]


def test_a_bar_on_a_terminal() -> None:
    """It shows the number of stages, and leaves nothing behind."""
    stream = io.StringIO()
    graph = make_graph(methods=("vft",), folds=("1",), seeds=3)
    key = graph.runs[0].key
    with stage_progress("exp", Console(file=stream, force_terminal=True, width=100)) as progress:
        progress.look(report_of(graph, {key: StageFacts(done=True)}, {graph.runs[1].key: InFlight(Phase.running, "7_0")}))
    text = stream.getvalue()
    assert "exp: 1 running, 0 in the queue" in text
    assert "1/3" in text
    assert text.endswith("\x1b[2K"), "the line of the bar is erased"


@pytest.mark.slow
def test_a_grid_says_first_what_it_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Computed by real workers: the first line comes before the first event; launched again, everything is reused."""
    assert run_grid(new_session(tmp_path, seeds=2), wait=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "exp: 2 runs, 2 stages: 0 reused, 2 to compute (2 finetune)"
    assert re.match(r"\[[12]/2\] finetune vft fold 1 seed \d .* done in ", lines[1])  # both may end between two looks
    assert lines[2].startswith("[2/2] ")
    assert run_grid(new_session(tmp_path, seeds=2), wait=False)
    assert capsys.readouterr().out.startswith("exp: 2 runs, 2 stages: 2 reused, 0 to compute\n")
