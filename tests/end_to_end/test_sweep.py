"""A whole sweep on this machine: corpus to chosen set, interrupted on the way; a dry run."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.end_to_end.sweeps import FOLDS, SETS, SMALL, STAGES, Swept, table


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_computes_each_stage_once(swept: Swept) -> None:
    """After a signal nothing is left running, the same command finishes; every stage of every set has one result and one whole attempt."""
    assert "stopped; nothing is lost" in swept.interrupted
    assert "under way in process" in swept.refused.splitlines()[-1]  # where a sbatch is found, a line before says where it computes
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
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "table.tex"], cwd=swept.report, check=True, capture_output=True)
    assert (swept.report / "table.pdf").stat().st_size > 10_000
    assert (swept.report / "plot.png").read_bytes().startswith(b"\x89PNG")

    shown = swept.run("sweep", "demo", "--show", "--json")
    assert shown.returncode == 0, shown.stderr
    value = json.loads(shown.stdout)
    assert (value["standing"], value["under_way"], value["best"] in SETS) == ("complete", False, True)
    assert value["validation"] == {"1": ["2F", "2M"], "2": ["3F", "3M"]}

    line = value["choice"]["grid"]
    assert line in swept.finished.splitlines()
    assert line in (swept.report / "choice.txt").read_text().splitlines()
    program, script, *arguments = shlex.split(line)
    assert (program, script) == ("python", "launch.py")
    chosen = swept.run(*arguments, "folds=[1]")
    assert chosen.returncode == 0, chosen.stdout + chosen.stderr
    name = next(text.partition("=")[2] for text in arguments if text.startswith("name="))
    summary = json.loads((swept.run.results / name / "tables" / "summary.json").read_text())
    assert [(method["method"], method["n"]) for method in summary["methods"]] == [("ptapt", 1)]


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
