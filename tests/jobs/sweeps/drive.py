"""A driver of a sweep in a process of its own, for tests that kill it: FOLDER of the sweep."""

from __future__ import annotations

import sys
from pathlib import Path

from jobs.sweeps.ray.cluster import ray_here
from jobs.sweeps.records import load_sweep
from jobs.worker.machine import Capacity
from tests.jobs.sweeps.fake_registry import REPOSITORY

if __name__ == "__main__":
    with ray_here(Capacity(2, (), 8.0), REPOSITORY):
        from jobs.sweeps.driver import run_sweep

        complete = run_sweep(load_sweep(Path(sys.argv[1])), tell=lambda line: print(line, flush=True))  # noqa: T201
    sys.exit(0 if complete else 3)
