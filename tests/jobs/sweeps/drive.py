"""Launches a sweep as `launch.py sweep` does, in a process of its own, for tests that interrupt or kill it: RESULTS, DIGEST."""

from __future__ import annotations

import sys
from pathlib import Path

from jobs.commands.sweep import launch, session_of
from jobs.store.layout import Layout
from jobs.sweeps.records import load_sweep
from tests.jobs.sweeps.fake_registry import REGISTRY, REPOSITORY, Recipe, launched_now, place_of


def main(results: Path, digest: str) -> int:
    """The exit code of `launch.py sweep`."""
    sweep = launched_now(load_sweep(Layout(results, "exp"), digest, REGISTRY, Recipe, REPOSITORY))
    return 0 if launch(session_of(sweep, place_of(sweep), REPOSITORY, new=True), wait=False) else 3


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
