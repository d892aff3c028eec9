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


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared corpora that holds the demo corpus."""
    from ser_core.corpora.demo import prepare_demo

    data = tmp_path_factory.mktemp("data")
    prepare_demo(data / "demo", data / "demo-source")
    return data
