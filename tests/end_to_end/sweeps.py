"""A small sweep, run to its end on this machine, and how tests look at what a sweep left."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.store.records import write_json
from tests.command_line import CommandLine
from tests.waiting import wait_until

FOLDS, SETS = ("1", "2"), ("8", "8+16")
SMALL = (
    *(
        "corpus=small",
        "methods=[ptapt]",
        "folds=[1,2]",
        "seeds=1",
        "policy.poll_seconds=0.2",
        "policy.poll_minutes=0.1",
        "resources.default.memory_gb=1",
    ),
    *("sweep.folds=[]", "sweep.sets=[[8],[8,16]]", "sweep.stopping=none"),
    *("recipe.finetune.epochs=3", "recipe.finetune.batch_size=8", "recipe.states.batch_size=29"),  # less, and it has not learnt
    *("recipe.states.steps=3", "recipe.ptapt.steps=3", "recipe.ptapt.warmup_steps=1"),
)
STAGES = {name: len(FOLDS) * count for name, count in (("states", 1), ("cluster", 2), ("ptapt", 2), ("finetune", 2))}  # each once


@dataclass(frozen=True)
class Swept:
    """A sweep that was interrupted by a signal and then finished, on this machine."""

    run: CommandLine
    refused: str  # standard error of the same command beside it, which ends with exit code 2
    interrupted: str  # what was printed until the signal had its effect
    finished: str

    @property
    def report(self) -> Path:
        return self.run.results / "demo" / "sweep"


def sweep_here(data: Path, folder: Path) -> None:
    """Begun, refused beside itself, interrupted when it has computed something, and run again; `folder` keeps what was printed."""
    run = CommandLine(data, folder / "results")
    process = run.start("sweep", "demo", *SMALL)
    try:
        assert wait_until(lambda: len(list(run.results.glob("demo/sweep/*/driver/*.json"))) > 0)
        refused = run("sweep", "demo", *SMALL)
        assert refused.returncode == 2, refused.stdout
        assert wait_until(lambda: len(list(run.results.glob("store/ptapt/*/attempts/*/claim.json"))) > 0)
        os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and systemd do, and a terminal with Ctrl-C: the whole group hears it
        output, _ = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 3, output
    assert wait_until(lambda: not processes_of(run)), processes_of(run)
    finished = run("sweep", "demo", *SMALL)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    write_json(folder / "printed.json", {"refused": refused.stderr, "interrupted": output, "finished": finished.stdout})


def read_swept(data: Path, folder: Path) -> Swept:
    """What `sweep_here` left."""
    return Swept(CommandLine(data, folder / "results"), **json.loads((folder / "printed.json").read_text()))


def processes_of(run: CommandLine) -> list[str]:
    """Command lines of all processes that work for these results, orphans included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(run.results).encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:  # ended, or not ours
            continue
    return found


def table(report: Path, name: str) -> list[dict[str, str]]:
    """The rows of a file of the report."""
    with (report / name).open(newline="") as file:
        return list(csv.DictReader(file))


def show(run: CommandLine) -> dict[str, Any]:
    """What `--show --json` prints."""
    done = run("sweep", "demo", "--show", "--json")
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def claims(run: CommandLine) -> list[Path]:
    return list((run.results / "store").glob("*/*/attempts/*/claim.json"))
