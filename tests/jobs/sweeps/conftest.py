"""One Ray for the tests of a module: starting it takes seconds, and it is busy as long as it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.sweeps.ray import cluster as ray_cluster
from jobs.worker.machine import Capacity

REPOSITORY = Path(__file__).resolve().parents[3]
CAPACITY = Capacity(2, ("5", "7"), 8.0)  # GPUs by name only: nothing here computes on one


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Capacity]:
    """A Ray of this process, with two cores and two GPUs that are not there."""
    with ray_cluster.ray_here(CAPACITY, REPOSITORY):
        yield CAPACITY
