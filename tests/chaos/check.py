"""Checks after a chaos run: the table of the undisturbed run, and no two executions of one stage at the same time."""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def table(results: Path, source: Path) -> str:
    """The product's tables (CSV, LaTeX, JSON), and every run, superseded ones too, with its seed and the digest of what it computed."""
    command = [sys.executable, str(source / "launch.py"), "table", "chaos", "--results", str(results)]
    return subprocess.run(command, check=True, cwd=source, capture_output=True, text=True).stdout


def differences(calm: str, wild: str) -> list[str]:
    """Lines in which two tables differ."""
    return list(difflib.unified_diff(calm.splitlines(), wild.splitlines(), "undisturbed", "disturbed", lineterm="", n=0))


def overlaps(traces: Path, zombies: Sequence[tuple[str, float, float]] = (), lapses: Sequence[tuple[float, float]] = ()) -> list[str]:
    """Stages whose executions overlapped: the steps of an attempt must follow one another without another attempt's in between.

    `zombies`: nodes that were cut off while their jobs lived on, with the time from and to: what ran there may overlap. `lapses`: times
    from and to in which a slurmctld that was killed may have forgotten starts of jobs, and started them again: of executions of one job,
    the earlier ones may overlap.
    """
    found = []
    for path in sorted(traces.iterdir()):
        steps = [line.split() for line in path.read_text().splitlines()]
        last = {job: max(attempt for attempt, *_, of in steps if of == job) for *_, job in steps}
        attempts = [
            attempt
            for attempt, _, moment, host, job in steps
            if not any(host == node and begin <= float(moment) <= end for node, begin, end in zombies)
            and not (attempt < last[job] and any(begin <= float(moment) <= end for begin, end in lapses))
        ]
        begun = attempts[:1] + [after for before, after in pairwise(attempts) if after != before]
        if len(begun) != len(set(begun)):
            found.append(f"stage {path.name}: attempts ran at the same time: {' '.join(begun)}")
    return found
