"""Real processes, killed by SIGKILL in the middle of a save."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ser_core.faults import INTERRUPTED, KILLS, PREEMPTION, SAVE

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, "-m", "tests.ser_core.faults", "kill", folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_save_that_is_killed_costs_one_step_at_most(moment: str, killed: dict[str, Any]) -> None:
    """The next attempt resumes from the newest intact checkpoint, ends with the same weights and means, and removes leftovers."""
    found = killed[moment]
    assert found["signal"] == signal.SIGKILL, found
    assert found["resumed_at"] == KILLS[moment]
    assert found["same_weights"]
    assert found["same_means"]
    assert found["kept"] == [f"step-{KILLS[moment]:09d}", "step-000000020"]


@pytest.mark.slow
def test_kills_happened_at_different_moments(killed: dict[str, Any]) -> None:
    """The processes were killed at the intended moments: with a temporary folder before the rename, without one after it."""
    for moment, step in KILLS.items():
        temporary = [name for name in killed[moment]["left"] if name.startswith(".")]
        assert bool(temporary) == (step < SAVE), (moment, temporary)


@pytest.mark.slow
def test_a_signal_during_a_save_takes_effect_after_it(killed: dict[str, Any]) -> None:
    """The checkpoint being written when the signal came is intact, and the next attempt resumes from it."""
    found = killed[PREEMPTION]
    assert (found["signal"], found["exit"]) == (0, INTERRUPTED)
    assert found["resumed_at"] == SAVE
    assert found["same_weights"]
    assert found["same_means"]
