"""Checks after a chaos run: the table of the undisturbed run, and no two executions of one stage at the same time."""

from __future__ import annotations

import difflib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path


def table(results: Path, source: Path) -> str:
    """The product's tables (CSV, LaTeX, JSON), and every run, superseded ones too, with its seed and the digest of what it computed."""
    command = [sys.executable, str(source / "launch.py"), "table", "chaos", "--results", str(results)]
    return subprocess.run(command, check=True, cwd=source, capture_output=True, text=True).stdout


def differences(calm: str, wild: str) -> list[str]:
    """Lines in which two tables differ."""
    return list(difflib.unified_diff(calm.splitlines(), wild.splitlines(), "undisturbed", "disturbed", lineterm="", n=0))


def overlaps(traces: Path) -> list[str]:
    """Stages whose executions overlapped: the steps of an attempt must follow one another without another attempt's in between."""
    found = []
    for path in sorted(traces.iterdir()):
        attempts = [line.split()[0] for line in path.read_text().splitlines()]
        begun = attempts[:1] + [after for before, after in pairwise(attempts) if after != before]
        if len(begun) != len(set(begun)):
            found.append(f"stage {path.name}: attempts ran at the same time: {' '.join(begun)}")
    return found
