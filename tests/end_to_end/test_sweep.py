"""Whole sweeps by the command line: corpus to chosen set, interrupted on the way, on this machine and on a real Slurm."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CommandLine
from tests.slurm_cluster.cluster import Cluster
from tests.slurm_cluster.processes import wait_until

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
    refused: subprocess.CompletedProcess[str]  # the same command beside it
    interrupted: str  # what was printed until the signal had its effect
    finished: subprocess.CompletedProcess[str]

    @property
    def report(self) -> Path:
        return self.run.results / "demo" / "sweep"


@pytest.fixture(scope="module")
def swept(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Begun, refused beside itself, interrupted when it has computed something, and run again."""
    run = CommandLine(small_data, tmp_path_factory.mktemp("sweep") / "results")
    process = run.start("sweep", "demo", *SMALL)
    try:
        assert wait_until(lambda: len(list(run.results.glob("demo/sweep/*/driver/*.json"))) > 0, 60)
        refused = run("sweep", "demo", *SMALL)
        assert wait_until(lambda: len(list(run.results.glob("store/ptapt/*/attempts/*/claim.json"))) > 0, 180)
        os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and systemd do, and a terminal with Ctrl-C: the whole group hears it
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 3, output
    assert wait_until(lambda: not processes_of(run), 10), processes_of(run)
    finished = run("sweep", "demo", *SMALL, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return Swept(run, refused, output, finished)


def processes_of(run: CommandLine) -> list[str]:
    """Command lines of all processes, whoever their parent is now, that work for these results."""
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


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_computes_each_stage_once(swept: Swept) -> None:
    """After a signal nothing is left running, the same command finishes; every stage of every set has one result and one whole attempt."""
    assert "stopped; nothing is lost" in swept.interrupted
    assert swept.refused.returncode == 2
    assert "under way in process" in swept.refused.stderr.splitlines()[-1]  # where a sbatch is found, a line before says where it computes
    store = swept.run.results / "store"
    assert Counter(path.parent.parent.name for path in store.glob("*/*/result.json")) == STAGES
    ended = {path.parent for path in store.glob("*/*/attempts/*/outcome.json")}
    whole = [path.parent.parents[2].name for path in store.glob("*/*/attempts/*/claim.json") if path.parent not in ended]
    assert Counter(whole) == STAGES
    assert all(json.loads((path / "outcome.json").read_text())["ending"] == "interrupted" for path in ended)


@pytest.mark.slow
def test_it_ends_in_tables_that_compile_and_in_a_choice_that_runs(swept: Swept) -> None:
    """Every set is in the table with every fold; the report compiles; the line that is printed is a grid, and `--show` tells the same."""
    found = table(swept.report, "trials.csv")
    assert sorted(row["point"] for row in found) == sorted(SETS)
    assert {(row["state"], row["folds"]) for row in found} == {("complete", str(len(FOLDS)))}
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "table.tex"], cwd=swept.report, check=True, capture_output=True, timeout=60)
    assert (swept.report / "table.pdf").stat().st_size > 10_000
    assert (swept.report / "plot.png").read_bytes().startswith(b"\x89PNG")

    shown = swept.run("sweep", "demo", "--show", "--json")
    assert shown.returncode == 0, shown.stderr
    value = json.loads(shown.stdout)
    assert (value["standing"], value["under_way"], value["best"] in SETS) == ("complete", False, True)
    assert value["validation"] == {"1": ["2F", "2M"], "2": ["3F", "3M"]}

    line = value["choice"]["grid"]
    assert line in swept.finished.stdout.splitlines()
    assert line in (swept.report / "choice.txt").read_text().splitlines()
    program, script, *arguments = shlex.split(line)
    assert (program, script) == ("python", "launch.py")
    chosen = swept.run(*arguments, "folds=[1]", timeout=300)
    assert chosen.returncode == 0, chosen.stdout + chosen.stderr
    name = next(text.partition("=")[2] for text in arguments if text.startswith("name="))
    summary = json.loads((swept.run.results / name / "tables" / "summary.json").read_text())
    assert [(method["method"], method["n"]) for method in summary["methods"]] == [("ptapt", 1)]


def show(run: CommandLine) -> dict[str, Any]:
    """What `--show --json` prints."""
    done = run("sweep", "demo", "--show", "--json")
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def controllers(cluster: Cluster) -> list[str]:
    """Jobs of running links of the controller chain."""
    lines = cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%i %j").splitlines()
    return [line.split()[0] for line in lines if ".control." in line]


def link_of_record(run: CommandLine) -> int:
    """Job of the last link that has made sure of its successors; 0 before the first one."""
    records = [json.loads(path.read_text()) for path in run.results.glob("demo/sweep/*/controller.json")]
    return int(records[0]["job"] or 0) if records else 0


def claims(run: CommandLine) -> list[Path]:
    return list((run.results / "store").glob("*/*/attempts/*/claim.json"))


@pytest.mark.slow
@pytest.mark.slurm
def test_arrays_of_slurm_give_the_same_numbers_whatever_happens_to_the_driver(slurm_cluster: Cluster, swept: Swept, tmp_path: Path) -> None:
    """One array for each kind of stage. A link is ended in its pass, and another one killed; the next ones end the sweep."""
    run = CommandLine(swept.run.data, tmp_path / "results")
    done = run("sweep", "demo", "--cluster", "slurm", *SMALL, "resources.ptapt.nodes=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 stages submitted, 14 in Slurm" in done.stdout
    for signal_name in ("TERM", "KILL"):  # the time limit, possibly before the link has submitted any; a dead node, after it has
        assert wait_until(lambda: len(controllers(slurm_cluster)) == 1, 60)
        (link,) = controllers(slurm_cluster)
        if signal_name == "KILL":  # two links in a row that end before they have submitted another one end the chain
            assert wait_until(lambda link=link: link_of_record(run) >= int(link), 60)  # type: ignore[misc]
        slurm_cluster.run("scancel", f"--signal={signal_name}", "--full", link, check=False)
        assert show(run)["standing"] in ("running", "waiting")
        assert wait_until(lambda link=link: link not in controllers(slurm_cluster), 60)  # type: ignore[misc]
    assert wait_until(lambda: show(run)["standing"] == "complete", 300), log_of(run)
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), 60)
    folder = next(run.results.glob("demo/sweep/*/submissions"))
    arrays = [json.loads(path.read_text()) for path in (*folder.glob("*.json"), *folder.glob("ended/*.json"))]
    assert Counter({record["stage"]: len(record["tasks"]) for record in arrays}) == STAGES
    assert len(arrays) == len(STAGES)
    assert Counter(path.parents[3].name for path in claims(run)) == STAGES  # nothing was computed twice
    ours = sorted(table(run.results / "demo" / "sweep", "runs.csv"), key=lambda row: (row["point"], row["fold"]))
    here = sorted(table(swept.report, "runs.csv"), key=lambda row: (row["point"], row["fold"]))
    assert [row["key"] for row in show(run)["points"][0]["folds"][0]["runs"]]
    assert [(row["point"], row["fold"], row["seed"]) for row in ours] == [(row["point"], row["fold"], row["seed"]) for row in here]
    assert [float(row["ua"]) for row in ours] == pytest.approx([float(row["ua"]) for row in here], abs=15)  # P-TAPT by two processes
    again = run("sweep", "demo", "--cluster", "slurm", *SMALL)
    assert "every trial has ended, nothing is left to compute" in again.stdout, again.stdout + again.stderr


@pytest.mark.slow
@pytest.mark.slurm
def test_a_cancelled_sweep_leaves_slurm_and_resumes(slurm_cluster: Cluster, swept: Swept, tmp_path: Path) -> None:
    """Arrays and links are cancelled. The next launch, here with `--wait`, decides rung by rung, and gives the numbers of this machine."""
    run = CommandLine(swept.run.data, tmp_path / "results")
    settings = ("sweep", "demo", "--cluster", "slurm", *(each for each in SMALL if each != "sweep.stopping=none"))
    assert run(*settings).returncode == 0
    assert wait_until(lambda: len(claims(run)) > 0, 120)
    cancelled = run("sweep", "demo", "--cancel")
    assert cancelled.returncode == 0, cancelled.stderr
    assert "withdrawn from Slurm" in cancelled.stdout
    assert "controller ended" in cancelled.stdout
    assert wait_until(lambda: not slurm_cluster.run("squeue", "--noheader"), 60)
    assert show(run)["standing"] == "interrupted"
    done = run(*settings, "--wait", timeout=700)
    assert done.returncode == 0, done.stdout + done.stderr
    value = show(run)
    assert (value["standing"], value["trials"]["complete"], value["trials"]["stopped"]) in (("complete", 1, 1), ("complete", 2, 0))
    ours = sorted(table(run.results / "demo" / "sweep", "runs.csv"), key=lambda row: (row["point"], row["fold"]))
    here = {(row["point"], row["fold"]): row["ua"] for row in table(swept.report, "runs.csv")}
    assert {(row["point"], row["fold"]): row["ua"] for row in ours}.items() <= here.items()
    assert "nothing to cancel" in run("sweep", "demo", "--cancel").stdout


def log_of(run: CommandLine) -> str:
    """The log of the controller chain."""
    return "".join(path.read_text() for path in run.results.glob("demo/sweep/*/logs/*.control.*.out"))


def test_a_dry_run_touches_nothing(small_data: Path, tmp_path: Path) -> None:
    """Points, validation speakers, stages and the scripts are shown; no file is written and Slurm is not asked."""
    run = CommandLine(small_data, tmp_path / "results", {"SLURM_CONF": str(tmp_path / "nowhere")})
    done = run(
        "sweep", "demo", "--cluster", "slurm", "--dry-run", "--scripts", *SMALL, "resources.ptapt.nodes=2", "resources.default.gpus=1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (
        "2 points",
        "  8+16\n",
        "fold 1 held out: scored on 2F, 2M",
        "#SBATCH --nodes=2",
        "#SBATCH --array=0-3",
        " control demo/sweep/",
    ):
        assert text in done.stdout
    assert "  ptapt: 4 needed, 0 there, 4 to compute: 1.0 GPU-hours and 1.0 CPU-hours (requested time)" in done.stdout
    assert not run.results.exists()
