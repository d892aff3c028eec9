"""Part 2: the tests of the suite that need a GPU (marker `gpu`), if pytest and what the suite's plugins need are installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.runner import ROOT

NEEDED = ("pytest", "pytest_timeout", "hypothesis", "tensorboard")
FOLDERS = ("tests/ser_core/stages",)  # where the marked tests are: the others need not be imported


def run(record: Record, plan: Plan) -> None:
    """Record one proof for each test. Without a GPU all of them must be skipped."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        record.note(f"left out: {', '.join(missing)} not installed; the part `stages` compares the same stages")
        return
    report = plan.folder / "suite.xml"
    # Without the options of pyproject.toml, which load plugins for Slurm.
    options = ["-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
    found = subprocess.run([sys.executable, "-m", "pytest", *options, *FOLDERS], cwd=ROOT, check=False)
    if not report.exists():
        record.proof("pytest", False, f"exit code {found.returncode} and no report")
        return
    outcomes = read_report(report)
    if plan.device == "cuda":
        for name, outcome in outcomes.items():
            record.proof(name, outcome == "passed", outcome)
        record.proof("tests that need a GPU", bool(outcomes), f"{len(outcomes)} tests")
    else:
        skipped = [outcome for outcome in outcomes.values() if outcome == "skipped"]
        record.proof("tests that need a GPU are skipped", 0 < len(skipped) == len(outcomes), f"{len(skipped)} of {len(outcomes)} skipped")


def read_report(path: Path) -> dict[str, str]:
    """Return test name -> "passed", "skipped", or the first line of its failure, from a JUnit report of pytest."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):  # noqa: S314 - written by our own pytest
        outcome = "passed"
        for child in case:
            if child.tag == "skipped":
                outcome = "skipped"
            elif child.tag in ("failure", "error"):
                outcome = f"{child.tag}: {(child.get('message') or '').splitlines()[0] if child.get('message') else ''}"
        found[case.get("name", "")] = outcome
    return found
