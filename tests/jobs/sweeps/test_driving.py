"""The driver lock: never two drivers, and the next one when the last has ended or is dead."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.store.attempts import QUIET_SECONDS, new_claim
from jobs.store.records import write_json
from jobs.sweeps import driver_lock as driving
from jobs.sweeps.driver_lock import driver_of

DRIVER = """
import sys
from pathlib import Path
from jobs.sweeps.driver_lock import driving
with driving(Path(sys.argv[1])):
    print("drives", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that drives a sweep until its stdin is closed."""
    program = [sys.executable, "-c", DRIVER, str(folder)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "drives\n"
            yield process
        finally:
            process.kill()


def test_a_second_driver_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    """The error names the driver in one line; when that was killed, the lock is free at once."""
    folder = tmp_path
    with another(folder) as process:
        with pytest.raises(UsageError, match=rf"under way in process {process.pid} on .*--cancel") as refused, driving.driving(folder):
            pass
        assert "\n" not in str(refused.value)
        process.kill()
        process.wait()
        assert driver_of(folder) is None
        with driving.driving(folder):
            holder = driver_of(folder)
            assert holder is not None
            assert holder.pid == os.getpid()


def test_the_lock_is_free_when_its_driver_has_ended(tmp_path: Path) -> None:
    """Also by an exception."""
    with contextlib.suppress(ZeroDivisionError), driving.driving(tmp_path):
        assert driver_of(tmp_path) is not None
        raise ZeroDivisionError
    assert driver_of(tmp_path) is None
    with driving.driving(tmp_path):
        assert driver_of(tmp_path) is not None


def test_one_of_many_concurrent_drivers_gets_the_lock(tmp_path: Path) -> None:
    """With any interleaving there is never a second driver."""
    folder, inside, most, refused = tmp_path, 0, 0, 0
    guard, start = threading.Lock(), threading.Barrier(8)

    def drive() -> None:
        nonlocal inside, most, refused
        start.wait()
        try:
            with driving.driving(folder):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.2)
                with guard:
                    inside -= 1
        except UsageError:
            with guard:
                refused += 1

    threads = [threading.Thread(target=drive) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused >= 1


@pytest.mark.parametrize(("quiet", "alive"), [(0.0, True), (QUIET_SECONDS - 20, True), (QUIET_SECONDS + 5, False)])
def test_a_driver_on_another_machine_lives_by_its_heartbeat(quiet: float, alive: bool, tmp_path: Path) -> None:
    turn = tmp_path / "driver" / "0001.json"
    write_json(turn, asdict(replace(new_claim(1), host="elsewhere", process_start="other/kernel/1")))
    then = time.time() - quiet
    os.utime(turn, (then, then))
    assert (driver_of(tmp_path) is not None) is alive


def test_a_damaged_lock_file_is_free_and_its_number_is_not_reused(tmp_path: Path) -> None:
    """An empty file after a full disk neither blocks a sweep nor is overwritten."""
    folder = tmp_path
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "0007.json").write_text("")
    with driving.driving(folder):
        assert sorted(path.name for path in (tmp_path / "driver").glob("*.json")) == ["0007.json", "0008.json"]
