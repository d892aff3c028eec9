"""Fixtures that every part of the suite may use."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def emodb_source() -> Path:
    """Recorded speech: EmoDB, the first two seconds of every utterance. It is not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "emodb-2s"
    if not folder.is_dir():
        pytest.skip(f"no recorded speech at {folder}")
    return folder
