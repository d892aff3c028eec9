"""What the end-to-end tests share: who types their commands, and one sweep on this machine for all tests of a run that look at it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.built_once import built_once
from tests.end_to_end.accounts import Account, open_account, write_interpreter
from tests.end_to_end.sweeps import Swept, read_swept, sweep_here


@pytest.fixture
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """An ordinary user, if the suite is root, with an empty home below a folder that every user may enter (those of pytest are closed)."""
    interpreter = built_once(tmp_path_factory, "interpreter", write_interpreter)
    with tempfile.TemporaryDirectory(prefix="ser-grid-account-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield open_account(Path(folder) / "home", interpreter)


@pytest.fixture(scope="session")
def swept(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A sweep on this machine that was interrupted and finished. Read only, but for other experiments in its results."""
    return read_swept(small_data, built_once(tmp_path_factory, "swept", lambda folder: sweep_here(small_data, folder)))
