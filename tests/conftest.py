"""Fixtures that every part of the suite may use, and how its tests are spread over parallel processes (`make test`)."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.built_once import built_once
from tests.command_line import end_what_was_begun
from tests.hypothesis_settings import load_settings

TESTS = Path(__file__).resolve().parent
SPEECH = "SER_GRID_SPEECH"
KINDS = {"end_to_end": 2400, "slurm": 1200}  # in this order they begin; seconds before a test is aborted
COMPUTING = 3  # files without such tests that begin after each file with some

if "PYTEST_XDIST_WORKER" in os.environ:  # more processes than cores; read when torch is imported, here or in a process that a test starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

load_settings()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they need, and begin with those that take longest. The tests of a file run in one process.

    Tests of Slurm mostly wait, so files of them alternate with files that compute.
    """
    for item in items:
        if item.path.is_relative_to(TESTS / "end_to_end"):
            item.add_marker(pytest.mark.end_to_end)
        kind = kind_of(item)
        if kind and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(KINDS[kind]))
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting = sorted((file for file in files.values() if rank(file) < len(KINDS)), key=rank)
    computing = sorted((file for file in files.values() if rank(file) >= len(KINDS)), key=rank)
    items.clear()
    while waiting or computing:
        for file in (*waiting[:1], *computing[:COMPUTING]):
            items.extend(file)
        del waiting[:1], computing[:COMPUTING]


def rank(file: list[pytest.Item]) -> int:
    """Place of a file among others: by the first of `KINDS` that it has a test of, then those with slow tests, then the rest."""
    marks = (*KINDS, "slow")
    return next((place for place, mark in enumerate(marks) if any(item.get_closest_marker(mark) for item in file)), len(marks))


def kind_of(item: pytest.Item) -> str:
    """The first of `KINDS` that a test is marked with, "" for one that only computes."""
    return next((kind for kind in KINDS if item.get_closest_marker(kind)), "")


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
    given = os.environ.get(SPEECH)
    folder = Path(given) if given else TESTS.parents[1] / "shared" / "data" / "emodb-2s"
    if not folder.is_dir():
        pytest.skip(f"no recorded speech at {folder}: put EmoDB at ../shared/data/emodb-2s beside this checkout, or name it in {SPEECH}")
    return folder


@pytest.fixture(autouse=True)
def no_command_outlives_its_test() -> Iterator[None]:
    """A test that failed halfway must not leave a grid that computes beside all others."""
    yield
    end_what_was_begun()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared corpora that holds the demo corpus, for all test processes: read only."""
    from ser_core.corpora.demo import prepare_demo

    return built_once(tmp_path_factory, "data", lambda data: prepare_demo(data / "demo", data / "demo-source"))


@pytest.fixture(scope="session")
def small_data(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared corpora that holds `small`: three folds of the demo corpus, a third of their recordings. Read only."""
    return built_once(tmp_path_factory, "small-data", lambda data: prepare_small(demo_data, data))


def prepare_small(demo_data: Path, data: Path, most: int = 4) -> None:
    """Write the corpus `small` into `data`: at most `most` recordings of every speaker and class."""
    from ser_core.corpora.manifest import load_manifest
    from ser_core.corpora.prepare import prepare

    source = data / "small-source"
    source.mkdir()
    (source / "audio").symlink_to(demo_data / "demo" / "audio")
    kept: Counter[tuple[str, str]] = Counter()
    with (source / "small.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "speaker", "fold"])
        for one in load_manifest(demo_data / "demo").utterances:
            kept[one.speaker, one.label] += 1
            if one.fold in ("1", "2", "3") and kept[one.speaker, one.label] <= most:
                rows.writerow([one.audio, one.label, one.speaker, one.fold])
    prepare("csv", source / "small.csv", data / "small")
