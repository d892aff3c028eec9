"""What this user may not read or write: one line with path, owner and mode, and a check before anything is submitted."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.control.facts import StageFacts
from jobs.control.failure_policy import judge_stages
from jobs.control.observe import PassContext, observe
from jobs.errors import UsageError
from jobs.store.access import check_store, denied_line
from jobs.store.attempts import new_claim
from jobs.store.failures import FailureClass, class_of_exception
from jobs.store.layout import Layout
from jobs.store.records import claim_attempt, write_result
from jobs.worker.stage import Verdict, WorkerProcess, execute
from jobs.worker.task import describe
from tests.jobs.fake_registry import make_graph
from tests.jobs.local_launch import workplace
from tests.jobs.store.test_records import RESULT

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may write, as an ordinary user; root's rights are given up meanwhile."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    root = os.geteuid() == 0
    claim_attempt(Layout(path, "warm").stage("up", "first"), 1, new_claim(1))  # imports what an ordinary user may not read
    write_result(Layout(path, "warm").stage("up", "second"), replace(RESULT, key="second"))
    (path / "store").chmod(0o777)
    if root:
        os.seteuid(NOBODY)
    try:
        yield path
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(path, ignore_errors=True)


def user() -> str:
    return pwd.getpwuid(NOBODY).pw_name if os.getuid() == 0 else getpass.getuser()


def closed(path: Path, mode: int = 0) -> str:
    """Take away the permissions of a path; the line that then names it."""
    path.chmod(mode)
    return f"{path}: permission denied (owner {user()}, mode "


def test_the_store_is_tested_at_launch(folder: Path) -> None:
    """Writing into the store, into the folder of each kind of stage and of each unfinished stage; reading each result."""
    layout, stages = Layout(folder / "results", "exp"), [("up", "a"), ("up", "b"), ("down", "c")]
    check_store(layout, stages)
    done, begun = layout.stage("up", "a"), layout.stage("up", "b")
    write_result(done, replace(RESULT, key="a"))
    begun.path.mkdir()
    check_store(layout, stages)
    for path, mode in (
        (done.result, 0),
        (done.path, 0o300),
        (begun.path, 0o500),
        (begun.path.parent, 0o500),
        (layout.root / "store", 0o500),
    ):
        before = path.stat().st_mode
        line = closed(path, mode)
        with pytest.raises(UsageError) as caught:
            check_store(layout, stages)
        assert str(caught.value).startswith(line)
        path.chmod(before)
    done.path.chmod(0o500)  # a finished stage is only read
    check_store(layout, stages)
    check_store(layout, [("down", "c")])
    done.path.chmod(0o700)


def test_a_stage_that_cannot_be_read_stops_no_other(folder: Path) -> None:
    """It is refused with path and owner, and so is what needs it; the others are read."""
    graph = make_graph(methods=("vft",), folds=("1", "2"), seeds=1)
    layout, (first, second) = Layout(folder / "results", "exp"), (graph.nodes[run.key] for run in graph.runs)
    write_result(layout.stage(second.stage, second.key), replace(RESULT, key=second.key))
    shut = layout.stage(first.stage, first.key).path
    shut.mkdir()
    line = closed(shut)
    facts = judge_stages(graph, observe(graph, layout, PassContext()), PassContext())
    assert facts[second.key].done
    assert facts[first.key].stopped.startswith(line)
    assert facts[first.key].failure is FailureClass.refused
    shut.chmod(0o700)
    facts = judge_stages(graph, observe(graph, layout, PassContext()), PassContext())
    assert facts[first.key] == StageFacts()


def test_a_worker_that_may_not_read_its_upstream_names_path_and_owner(folder: Path) -> None:
    """The attempt is refused, not retried."""
    graph = make_graph(methods=("tapt",), folds=("1",), seeds=1)
    place = workplace(folder)
    run = graph.nodes[graph.runs[0].key]
    parent = graph.nodes[run.upstream["backbone"]]
    process = WorkerProcess(describe(place, graph, [[parent.key, run.key]]), 1, lambda line: None, lag_seconds=0.0)
    assert execute(process, parent) is Verdict.done
    output = place.layout.stage(parent.stage, parent.key).attempt(1).output
    line = closed(output)
    assert execute(process, run) is Verdict.refused
    record = place.layout.stage(run.stage, run.key).attempt(1).outcome.read_text()
    assert line in record
    output.chmod(0o700)


def test_permission_denied_is_refused(folder: Path) -> None:
    """The line names the first folder on the way that is closed; without a path it is the error's own."""
    (folder / "outer" / "inner").mkdir(parents=True)
    line = closed(folder / "outer")
    with pytest.raises(PermissionError) as caught:
        (folder / "outer" / "inner" / "file").read_text()
    assert denied_line(caught.value).startswith(line)
    assert class_of_exception(caught.value) is FailureClass.refused
    assert denied_line(PermissionError("no")) == "no"
