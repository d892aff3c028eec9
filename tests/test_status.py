"""`status` as a user runs it: the list of all experiments, and --watch on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

import launch as program
from jobs.errors import UsageError
from jobs.experiment.config import load_experiment
from jobs.experiment.launched import Corpus, Launched, launch, store
from jobs.store.attempts import new_claim
from jobs.store.layout import Layout
from jobs.store.records import claim_attempt
from ser_core.registry import REGISTRY
from ser_core.settings.recipe import Recipe
from tests.command_line import ROOT, CommandLine

status = next(each.callback for each in program.app.registered_commands if each.callback and each.callback.__name__ == "status")
SMALL = ("methods=[vft]", "folds=[1,2]", "seeds=2", "policy.controller=false")


def launched(results: Path, name: str, *settings: str) -> Launched:
    """An experiment that is on record as launched; nothing is computed."""
    experiment = load_experiment("demo", (*SMALL, f"name={name}", *settings), configs=ROOT / "configs", recipe_schema=Recipe)
    corpus = Corpus("demo", "d1", ("1", "2"), str(results))
    found = launch(experiment, corpus, REGISTRY, Layout(results, name), "demo", ("grid", "demo", f"name={name}"))
    store(found)
    return found


def running(found: Launched) -> str:
    """Let this process compute the first run of an experiment, with a log; returns the name of its stage."""
    node = next(iter(found.graph.nodes.values()))
    log = found.layout.log_of(node.stage, node.key)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"2026-11-29 12:00:00 {node.name}: finetune: step 3/10, epoch 1/2, loss 0.5, 8 s to go\n")
    assert claim_attempt(found.layout.stage(node.stage, node.key), 1, new_claim(1, log=str(log)))
    return node.name


def squeue_that(folder: Path, does: str) -> Path:
    """A program `squeue` that counts its calls in the file `calls` beside it; its folder is to come first in PATH."""
    folder.mkdir()
    script = folder / "squeue"
    script.write_text(f"#!/bin/sh\necho call >> {folder}/calls\n{does}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder / "calls"


@pytest.mark.slow
@pytest.mark.parametrize(("does", "problem"), [("true", ""), ("exit 1", "Slurm does not answer")])
def test_all_experiments_are_listed_with_one_call_of_squeue(
    does: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of this machine and of Slurm, running and stopped, and one whose record is damaged; also where Slurm does not answer."""
    results = tmp_path / "results"
    running(launched(results, "here"))
    for name in ("one", "two"):
        launched(results, name, "cluster=slurm")
    (results / "torn").mkdir()
    (results / "torn" / "experiment.json").write_text("{")
    calls = squeue_that(tmp_path / "bin", does)
    monkeypatch.setenv("PATH", f"{calls.parent}:{os.environ['PATH']}")
    status(None, results=results, as_json=True)
    value = json.loads(capsys.readouterr().out)
    assert calls.read_text().split() == ["call"]
    assert (value["schema"], value["looked"] == pytest.approx(time.time(), abs=60)) == (1, True)
    rows = {row["experiment"]: row for row in value["experiments"]}
    # The run that is claimed is one of each experiment: the store is shared.
    assert {name: row["state"] for name, row in rows.items()} == {**dict.fromkeys(("here", "one", "two"), "running"), "torn": "unreadable"}
    assert (rows["here"]["runs"], rows["here"]["runs_done"], rows["here"]["running"], rows["here"]["place"]) == (4, 0, 1, "local")
    assert rows["one"]["place"] == "slurm"
    assert "experiment.json" in rows["torn"]["problem"]
    assert all(problem in rows[name]["problem"] for name in ("one", "two"))
    status(None, results=results)
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["experiment", "state", "runs"]
    assert [line.split()[:2] for line in lines] == [[name, row["state"]] for name, row in rows.items()]
    assert lines[0].split()[2] == "0/4"
    assert last.startswith("looked at ")


def test_without_experiments_the_list_names_a_first_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In words, and as an empty list of --json; --watch needs a name."""
    status(None, results=tmp_path)
    assert "grid demo" in capsys.readouterr().out
    status(None, results=tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out)["experiments"] == []
    with pytest.raises(UsageError, match="--watch is of one experiment"):
        status(None, results=tmp_path, watch=True)


def test_status_shows_what_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Node, step and epoch of a running stage, the end with its basis, and the time of the look; the same in --json."""
    name = running(launched(tmp_path, "here"))
    status("here", results=tmp_path)
    text = capsys.readouterr().out
    assert f"running: {name}: on {os.uname().nodename}, for " in text
    assert "step 3/10, epoch 1/2" in text
    assert "4 stages; ends in about " in text
    assert "1 stage at once, as now; times by progress of running stages" in text
    assert "\nlooked at " in text
    status("here", results=tmp_path, as_json=True)
    activity = json.loads(capsys.readouterr().out)["activity"]
    assert activity["running"][0]["progress"] == "step 3/10, epoch 1/2"
    assert activity["remaining"]["stages"] == 4


@pytest.mark.slow
def test_watch_on_a_terminal_ends_with_ctrl_c(tmp_path: Path) -> None:
    """A live table that fits the terminal, drawn again in place; Ctrl-C leaves the last one and exit code 0, without a traceback."""
    name = running(launched(tmp_path, "here", "policy.poll_seconds=0.2"))
    environment = {**CommandLine(tmp_path, tmp_path).environment, "TERM": "xterm", "LINES": "40"}
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, str(ROOT / "launch.py"), "status", "here", "--watch"], environment)  # noqa: S606
    shown = ""
    while shown.count("looked at ") < 3:
        shown += os.read(terminal, 65536).decode(errors="replace")
    os.write(terminal, b"\x03")
    while True:
        try:
            more = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        shown += more.decode(errors="replace")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
    assert name.partition(" [")[0] in shown
    assert "\x1b[1A" in shown  # the cursor moves up: drawn in place
    assert "Traceback" not in shown


@pytest.mark.slow
def test_watch_in_a_pipe_repeats_plain_lines(tmp_path: Path) -> None:
    """No escape sequences; SIGINT ends it with exit code 0."""
    running(launched(tmp_path, "here", "policy.poll_seconds=0.2"))
    process = CommandLine(tmp_path, tmp_path).start("status", "here", "--watch")
    assert process.stdout is not None
    lines: list[str] = []
    while sum(line.startswith("looked at ") for line in lines) < 2:
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate()
    assert process.returncode == 0, rest
    assert "\x1b" not in "".join(lines) + rest
    assert "Traceback" not in rest
