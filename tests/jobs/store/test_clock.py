"""Machines whose clocks differ: times are those of the file system, and what belongs to a launch is known by its number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.control.facts import Departure
from jobs.control.failure_policy import decide, ended_attempts, failed_starts
from jobs.store import clock
from jobs.store.attempts import AttemptFiles, new_claim
from jobs.store.cancellations import record_cancellation
from jobs.store.clock import AGREES_SECONDS, file_time, measure
from jobs.store.launches import launched_at, next_launch
from jobs.store.layout import Layout
from jobs.store.records import Ending, Outcome, claim_attempt, read_claim, write_json
from jobs.worker.main import run_task
from tests.jobs.worker.places import Place

SKEW = 400.0  # seconds: longer than a claim may be without a heartbeat
real_time = time.time


@pytest.fixture
def skewed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Sets the clock of this machine so many seconds ahead of that of the file system, which the kernel keeps."""
    yield lambda seconds: monkeypatch.setattr(time, "time", lambda: real_time() + seconds)
    clock._ZEROS.clear()


@pytest.mark.parametrize("skew", [-3600.0, -SKEW, SKEW, 3600.0])
def test_times_are_those_of_the_file_system(tmp_path: Path, skewed: Callable[[float], None], skew: float) -> None:
    """Whatever this machine's clock says, also if it is set right later."""
    skewed(skew)
    measure(tmp_path)
    (tmp_path / "file").touch()
    assert abs(file_time(tmp_path) - (tmp_path / "file").stat().st_mtime) < 0.5
    skewed(0.0)
    assert abs(file_time(tmp_path) - real_time()) < 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_measurement_this_machines_clock_is_used(tmp_path: Path, skewed: Callable[[float], None]) -> None:
    """By processes that only look, and where nothing can be written."""
    skewed(SKEW)
    measure(tmp_path / "missing")
    assert abs(file_time(tmp_path / "missing") - real_time() - SKEW) < 0.5
    assert abs(file_time(tmp_path) - real_time() - SKEW) < 0.5


def test_a_difference_within_the_resolution_of_file_times_is_none(tmp_path: Path, skewed: Callable[[float], None]) -> None:
    skewed(AGREES_SECONDS / 2)
    measure(tmp_path)
    assert abs(file_time(tmp_path) - time.time()) < AGREES_SECONDS / 8


def test_a_live_claim_is_respected_by_a_machine_whose_clock_is_ahead(tmp_path: Path, skewed: Callable[[float], None]) -> None:
    """Its heartbeat is seconds old by the file server's clock, minutes by this machine's."""
    place = Place(tmp_path)
    folder = place.folder(place.tapt)
    claim_attempt(folder, 1, replace(new_claim(1), host="elsewhere", process_start="other/kernel/1"))
    skewed(SKEW)
    assert run_task(place.process(place.tapt), 0) == 3
    assert any("works on it" in line for line in place.said)
    assert place.starts(place.tapt) == 0


def test_a_claim_has_the_time_of_the_file_system_and_the_number_of_the_launch(tmp_path: Path, skewed: Callable[[float], None]) -> None:
    place = Place(tmp_path)
    write_json(place.layout.experiment_file, {"launched": 17.5})
    skewed(SKEW)
    assert run_task(place.process(place.tapt), 0) == 0
    claim = read_claim(place.folder(place.tapt).attempt(1))
    assert claim is not None
    assert abs(claim.started - real_time()) < 30
    assert (claim.experiment, claim.launch) == ("exp", 17.5)


def test_numbers_of_launches_grow_whatever_the_clocks_say(tmp_path: Path, skewed: Callable[[float], None]) -> None:
    """A launch from a machine an hour behind comes after the launch and the cancellation before it."""
    layout = Layout(tmp_path, "exp")
    first = next_launch(layout)
    write_json(layout.experiment_file, {"launched": first})
    skewed(-3600.0)
    assert next_launch(layout) > first == launched_at(layout)
    record_cancellation(layout, None, first + 10)
    assert next_launch(layout) > first + 10


@pytest.mark.parametrize(
    ("launch", "experiment", "started", "counts"),
    [
        (100.0, "exp", 90.0, True),  # the clock of its node was behind
        (50.0, "exp", 110.0, False),  # the clock of its node was ahead
        (50.0, "other", 110.0, True),  # another experiment's launches have other numbers
        (0.0, "", 110.0, True),  # of an older version
        (0.0, "", 90.0, False),
    ],
)
def test_a_failure_counts_if_it_belongs_to_the_last_launch(launch: float, experiment: str, started: float, counts: bool) -> None:
    """A launch forgives the failures before it: by number where that is known, by time otherwise."""
    claim = replace(new_claim(1, started=started), experiment=experiment, launch=launch)
    outcome = Outcome(1, Ending.failed, "ValueError", "broken", "", "host", 1.0, kind="code")
    (ended,) = ended_attempts([AttemptFiles(1, claim, outcome, alive=False)], [], 0.0, "exp")
    assert bool(decide([ended], since=100.0, max_attempts=12).stopped) is counts


@pytest.mark.parametrize(
    ("launch", "submitted", "counts"), [(100.0, 90.0, True), (50.0, 110.0, False), (0.0, 110.0, True), (0.0, 90.0, False)]
)
def test_a_failed_start_counts_if_it_belongs_to_the_last_launch(launch: float, submitted: float, counts: bool) -> None:
    departure = Departure("key", "1_0", "FAILED", submitted, 200.0, launch=launch)
    assert bool(failed_starts([], [departure], 100.0)) is counts
