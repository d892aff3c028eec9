"""Folders for simulations."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.world import new_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, removed at the end."""
    made = new_folder()
    yield made
    shutil.rmtree(made, ignore_errors=True)
