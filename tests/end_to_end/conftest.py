"""One sweep on this machine, for all tests of a run that look at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.built_once import built_once
from tests.end_to_end.sweeps import Swept, read_swept, sweep_here


@pytest.fixture(scope="session")
def swept(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A sweep on this machine that was interrupted and finished. Read only, but for other experiments in its results."""
    return read_swept(small_data, built_once(tmp_path_factory, "swept", lambda folder: sweep_here(small_data, folder)))
