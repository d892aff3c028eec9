"""Exploring counts its examples, draws what the suite draws from the same seed, and prints how a failure is replayed."""

from __future__ import annotations

import pytest
from hypothesis.stateful import invariant

from tests.simulation import explore
from tests.simulation.explore import Round, main, replay_command, run_round
from tests.simulation.test_state_machine import Laboratory


class Broken(Laboratory):
    """A state machine whose invariant fails at once."""

    @invariant()
    def never_open(self) -> None:
        assert self.world is None, "the promise broke"


@pytest.mark.slow
def test_rounds_are_counted_and_end_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    """One round for each process, with the seeds that follow from the one that is printed."""
    assert main(["--minutes", "0", "--seed", "7", "--processes", "1", "--round", "3"]) == 0
    printed = capsys.readouterr().out
    assert "seed 7" in printed
    assert "3 examples in 1 rounds" in printed


def test_a_failing_round_tells_the_broken_promise_and_its_steps() -> None:
    """The example is shortened, and the same seed finds it again."""
    found = run_round(5, 30, Broken)
    assert "the promise broke" in found.failure
    assert "state = Broken()" in found.failure
    assert run_round(5, 30, Broken).examples == found.examples


def test_a_failure_is_printed_with_its_replay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command runs the round as a test of the suite, with its seed."""
    monkeypatch.setattr(explore, "explore", lambda seeds, **options: [Round(next(seeds), 4, "AssertionError: it broke")])
    assert main(["--seed", "7", "--round", "4"]) == 1
    printed = capsys.readouterr().out
    (command,) = (line.removeprefix("replay: ") for line in printed.splitlines() if line.startswith("replay: "))
    seed = command.rpartition("=")[2]
    assert command == replay_command(int(seed), 4)
    assert "AssertionError: it broke" in printed
    assert "1 failed" in printed
