"""The command line: what a user types, what is printed, which exit code comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ser_core.corpora.manifest import Utterance, write_manifest
from tests.command_line import ROOT, CommandLine


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("grid",), ("iemocap", "prepare iemocap --source", "grid demo")),
        (("grid", "iemocapp"), ("no experiment 'iemocapp'", "did you mean 'iemocap'?")),
        (("grid", "demo", "seed=3"), ("unknown key 'seed'", "did you mean 'seeds'?")),
        (("grid", "demo", "recipe.finetune.epoch=3"), ("did you mean 'recipe.finetune.epochs'?",)),
        (("grid", "demo", "seeds=many"), ("seeds", "many")),
        (("grid", "demo", "recipe.finetune.epochs=0"), ("recipe.finetune.epochs",)),
        (("grid", "demo", "site=nowhere"), ("no site profile 'nowhere'",)),
        (
            ("grid", "demo", "resources.finetun.cpus=1"),
            ("resources.finetun: no such stage", "default, states, cluster, tapt, ptapt, finetune"),
        ),
        (("grid", "demo", "recipe=null"), ("recipe",)),
        (("grid", "demo", "table=table9"), ("table 'table9'", "iemocap_table1")),
        (("status", "../demo"), ("'../demo'", "not a name")),
        (("grid", "demo", "savee"), ("one experiment at a time",)),
        (("grid", "demo", "--cluster", "cloud"), ("--cluster cloud",)),
        (("status", "demo"), ("was not launched",)),
        (("status", "demo", "--json", "--watch"), ("--json", "--watch")),
        (("explain", "demo", "vft/1/0"), ("was not launched",)),
        (("explain", "demo", "vft/1/0", "vft/1/1"), ("one run at a time",)),
        (("explain", "demo"), ("'demo' names no run", "METHOD/FOLD/SLOT")),
        (("logs", "demo", "vft/1/0"), ("was not launched",)),
        (("cancel", "demo"), ("was not launched",)),
        (("grid", "demo", "policy.outliers=cell"), ("outlier rule 'cell'", "at least 6 seeds")),
        (("grid", "demo", "policy.mail=somebody"), ("policy.mail", "name@example.org")),
        (("collect", "demo", "--format", "docx"), ("docx", "latex")),
        (("collect", "--from", "/nowhere/runs.csv"), ("/nowhere/runs.csv",)),
        (("collect", "demo", "--outliers", "cell"), ("--from", "policy.outliers")),
        (("doctor", "demo", "--cluster", "cloud"), ("--cluster cloud",)),
        (("prepare", "iemocap"), ("--source",)),
        (("prepare", "savee", "--source", "/nowhere/at/all"), ("/nowhere/at/all",)),
        (("prepare", "timit", "--source", "."), ("timit", "iemocap")),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path) -> None:
    """A mistake is answered by one line that says what, where and what to do; nothing is written."""
    done = CommandLine(tmp_path / "data", tmp_path / "results")(*arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for text in expected:
        assert text in done.stderr
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "results").exists()


DAMAGED = ("", "{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "launched": 0, "config": [], "corpus": []}')


@pytest.mark.parametrize(
    ("command", "text"), [*(("status", text) for text in DAMAGED), *((name, "{") for name in ("collect", "reconcile", "cancel", "control"))]
)
def test_a_damaged_experiment_is_one_line(command: str, text: str, tmp_path: Path) -> None:
    """The file is named, and what renews it."""
    file = tmp_path / "results" / "demo" / "experiment.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    done = CommandLine(tmp_path / "data", tmp_path / "results")(command, "demo")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "experiment.json" in done.stderr
    assert "grid" in done.stderr


def test_results_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    """A file where the folder should be, a full disk: what and where, and exit code 2."""
    (tmp_path / "results").write_text("")
    (tmp_path / "data" / "demo").mkdir(parents=True)
    write_manifest(tmp_path / "data" / "demo", "demo", ["1"], [Utterance("a", "a.wav", 16000, "happy", "1F", "1", audio_digest="0")])
    done = CommandLine(tmp_path / "data", tmp_path / "results")("grid", "demo")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert str(tmp_path / "results") in done.stderr


def test_results_from_elsewhere_become_tables(tmp_path: Path) -> None:
    """`collect --from` judges the rows of a file: an outlier without a rerun is named on stderr, and stays in the mean as unresolved."""
    source = tmp_path / "runs.csv"
    rows = [f"ours,vft,{fold},{slot},{slot},{60 + slot + fold}" for fold in (1, 2) for slot in range(5)]
    rows[3] = "ours,vft,1,3,3,20"
    source.write_text("\n".join(["corpus,method,fold,slot,seed,ua", *rows]) + "\n")
    done = CommandLine(tmp_path / "data", tmp_path / "results")("collect", "--from", str(source))
    assert done.returncode == 0, done.stderr
    assert "rerun with another seed, and add the row below: ours vft/1/3 seed 3" in done.stderr
    summary = json.loads((tmp_path / "runs-tables" / "summary.json").read_text())
    assert summary["methods"][0]["unresolved"] == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("arguments", [("--help",), ("status", "demo"), ("grid", "demo", "seed=3"), ("grid", "--help")])
def test_a_start_imports_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Help, `status` and a refused `grid` answer without torch, transformers, scikit-learn, pandas, submitit or matplotlib."""
    heavy = ("torch", "transformers", "sklearn", "pandas", "submitit", "matplotlib", "scipy", "numpy", "fairseq")
    program = (
        "import sys, launch\n"
        f"sys.argv = ['launch.py', *{list(arguments)!r}]\n"
        "try:\n    launch.main()\nexcept SystemExit:\n    pass\n"
        f"print('imported:', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    environment = {"SER_GRID_DATA": str(tmp_path / "d"), "SER_GRID_RESULTS": str(tmp_path / "r"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "imported: []"
