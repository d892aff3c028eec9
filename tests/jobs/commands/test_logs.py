"""Logs: choice of the attempt, its lines in a shared file, and following a file that a real worker writes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.commands.logs import Log, attempt_over, choose_stage, find_log, follow_log, read_log, section
from jobs.errors import UsageError
from jobs.experiment.graph import Graph
from jobs.store.layout import Layout
from jobs.store.records import Claim, Ending, Outcome, claim_attempt, write_outcome
from jobs.worker.main import run_task
from jobs.worker.stage import WorkerProcess
from tests.jobs.fake_registry import make_graph
from tests.jobs.local_launch import workplace
from tests.waiting import until

KEY = "0123456789abcdef0123"
LINES = (
    "module load",
    f"finetune vft fold 1 seed 0 [{KEY[:8]}]: attempt 1 on n1, process 5",
    "epoch 1",
    f"finetune vft fold 1 seed 0 [{KEY[:8]}]: failed",
    f"finetune vft fold 1 seed 0 [{KEY[:8]}]: attempt 2 on n1, process 6",
    "epoch 2",
)


def claimed(tmp_path: Path, attempts: int) -> tuple[Layout, Graph]:
    """A run whose attempts this process has claimed."""
    graph, layout = make_graph(methods=("tapt",), folds=("1",), seeds=1), Layout(tmp_path / "results", "exp")
    folder = layout.stage("finetune", graph.runs[0].key)
    for number in range(1, attempts + 1):
        assert claim_attempt(folder, number, Claim(number, "n1", os.getpid(), "", time.time(), log=str(tmp_path / f"{number}.out")))
    return layout, graph


def test_a_shared_file_is_split_at_the_attempts() -> None:
    """The first attempt starts with the file, the next with its own line; a file without such a line is printed whole."""
    assert section(LINES, KEY, 1) == LINES[:4]
    assert section(LINES, KEY, 2) == LINES[4:]
    assert section(LINES, KEY, 3) == LINES
    assert section(LINES, "f" * 20, 1) == LINES


def test_lines_of_other_stages_in_the_same_log_are_left_out() -> None:
    """Packed stages write concurrently: lines that name another stage are left out, lines that name none stay."""
    others = [f"2026-11-21 06:00:00 finetune vft fold 1 seed {seed} [{seed}bcdef01]: epoch 1" for seed in (1, 2)]
    mixed = [LINES[0], others[0], LINES[1], others[1], *LINES[2:4], others[0], *LINES[4:]]
    assert section(mixed, KEY, 1) == LINES[:4]
    assert section(mixed, KEY, 2) == LINES[4:]


def test_the_newest_attempt_by_default(tmp_path: Path) -> None:
    """An unknown attempt is a usage error that lists the known ones; a stage that was never started has no log."""
    layout, graph = claimed(tmp_path, 2)
    last = graph.nodes[graph.runs[0].key]
    newest, first = find_log(layout, last), find_log(layout, last, 1)
    assert newest is not None
    assert first is not None
    assert (newest.attempt, newest.file) == (2, tmp_path / "2.out")
    assert first.file == tmp_path / "1.out"
    with pytest.raises(UsageError, match=r"--attempt 3: finetune tapt .* has had 1, 2"):
        find_log(layout, last, 3)
    assert find_log(layout, graph.nodes[last.upstream["backbone"]]) is None
    with pytest.raises(UsageError, match=r"has no log at .*2\.out"):
        read_log(newest)


def test_the_last_started_stage_by_default(tmp_path: Path) -> None:
    """A run whose fine-tuning is pending shows its pretraining; one that was never started its last stage."""
    graph, layout = make_graph(methods=("tapt",), folds=("1",), seeds=1), Layout(tmp_path, "exp")
    nodes = list(graph.nodes.values())
    assert choose_stage(layout, nodes, None).stage == "finetune"
    assert claim_attempt(layout.stage("tapt", nodes[0].key), 1, Claim(1, "n1", 1, "", 0.0))
    assert choose_stage(layout, nodes, None).stage == "tapt"
    assert choose_stage(layout, nodes, "finetune").stage == "finetune"
    with pytest.raises(UsageError, match=r"--stage cluster: this run has tapt, finetune"):
        choose_stage(layout, nodes, "cluster")


def test_following_ends_with_the_attempt_and_loses_no_line(tmp_path: Path) -> None:
    """A worker writes its log while another thread follows it: every line arrives in order, then following ends."""
    recipe = {"failing": {"finetune vft 1 0": "sleep:0.5"}}
    graph = make_graph(recipe, methods=("vft",), folds=("1",), seeds=1)
    place, file = workplace(tmp_path), tmp_path / "run.out"
    layout, node = Layout(tmp_path / "results", "exp"), graph.nodes[graph.runs[0].key]

    def tell(line: str) -> None:
        with file.open("a") as log:
            log.write(line + "\n")

    from jobs.worker.task import describe

    process = WorkerProcess(describe(place, graph, [[node.key]]), 1, tell, log=str(file))
    worker = threading.Thread(target=run_task, args=(process, 0))
    worker.start()
    until(lambda: find_log(layout, node), step=0.01)
    log = find_log(layout, node)
    assert log is not None
    found = list(follow_log(log, lambda: attempt_over(layout, log)))
    worker.join()
    assert attempt_over(layout, log) == "done"
    written = file.read_text().splitlines()
    assert len(written) == 3
    assert found == written
    assert list(read_log(log)) == written


def test_a_partially_written_line_is_printed_when_complete(tmp_path: Path) -> None:
    """A partial line is held back until its end, or the end of the attempt; of the lines already written only the last N are printed."""
    _, graph = claimed(tmp_path, 1)
    node = graph.nodes[graph.runs[0].key]
    file = tmp_path / "1.out"
    file.write_text("one\ntwo\nthr")
    steps: Iterator[str] = iter(["ee\nfour", "", " and more", "\nfive"])

    def pause(seconds: float) -> None:
        with file.open("a") as log:
            log.write(next(steps))

    ends = iter(["", "", "", "done", "done"])
    assert list(follow_log(Log(node, 1, file), lambda: next(ends), lines=1, pause=pause)) == ["two", "three", "four and more", "five"]


def test_how_an_attempt_ended(tmp_path: Path) -> None:
    """Running while its heartbeat is recent, then its recorded outcome; without a record if the process died."""
    layout, graph = claimed(tmp_path, 1)
    node = graph.nodes[graph.runs[0].key]
    log = find_log(layout, node)
    assert log is not None
    assert attempt_over(layout, log) == ""
    attempt = layout.stage("finetune", node.key).attempt(1)
    os.utime(attempt.claim, (1.0, 1.0))
    assert attempt_over(layout, log) == "ended without a record of how"
    write_outcome(attempt, Outcome(1, Ending.failed, "ValueError", "bad", "", "n1", 1.0, kind="code"))
    assert attempt_over(layout, log) == "failed: ValueError: bad"
