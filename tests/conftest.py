"""Fixtures that every part of the suite may use."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.hypothesis_settings import load_settings

load_settings()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A property that fails is printed with the command that draws the same examples."""
    report = yield
    if report.when == "call" and report.failed and item.get_closest_marker("hypothesis"):
        command = f"{sys.executable} -m pytest '{item.nodeid}' --hypothesis-seed={item.config.getoption('--hypothesis-seed')}"
        report.sections.append(("Replay", command))
    return report


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
