"""examples/digits: a grid whose registry is not of this project, from a missing corpus to tables. On Slurm: test_package.py."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from tests.command_line import ROOT, CommandLine

FILE = "examples/digits/digits.yaml"
WORDS_OF_SPEECH = re.compile(r"\b(?:UA|(?i:utterances?|speakers?|emotions?|recordings?|fine-tuning))\b|\"(?:mean_|newest_)?ua\"(?=:)")
FEW = ("seeds=2", "folds=[a,b]", "recipe.epochs=3")


def runs_of(run: CommandLine) -> list[dict[str, str]]:
    with (run.results / "digits" / "tables" / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_example_runs_here(tmp_path: Path) -> None:
    """Its corpus is made, an upstream stage is computed once a fold, tables and report have its score, and later commands know it."""
    assert len((ROOT / "examples" / "digits" / "digits.py").read_text().splitlines()) < 120
    run = CommandLine(tmp_path / "data", tmp_path / "results")
    done = run("grid", "--config", FILE, *FEW)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 runs, 10 stages: 0 reused, 10 to compute (8 classify, 2 project)" in done.stdout
    assert "Recognised digits (accuracy, %) on digits" in done.stdout
    rows = runs_of(run)
    assert [row["method"] for row in rows] == ["pixels"] * 4 + ["components"] * 4
    assert all(30 < float(row["accuracy"]) <= 100 for row in rows)  # chance: 10
    report = (run.results / "digits" / "tables" / "report.html").read_text()
    assert "Highest mean accuracy on digits" in report
    status = run("status", "digits", "--json").stdout
    shown = json.loads(status)
    assert shown["complete"] is True
    newest = shown["activity"]["newest"]
    assert newest["score"] == f"accuracy {newest['accuracy']:.1f}"
    story = run("explain", "digits", "components/a/0").stdout
    assert "project" in story
    files = {file.name: file.read_text() for file in (run.results / "digits" / "tables").iterdir() if file.is_file()}
    for name, text in {"grid": done.stdout, "status": status, "explain": story, **files}.items():
        assert WORDS_OF_SPEECH.findall(text) == [], name
    assert ", accuracy " in story
    refused = run("grid", "--config", FILE, "recipe.components=65")
    assert (refused.returncode, refused.stderr) == (2, "recipe.components=65: from 1 to 64, the number of pixels\n")
