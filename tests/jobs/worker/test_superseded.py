"""An attempt whose node was cut off counts as dead and may still run: beside the attempt that followed it, it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

import pytest

from jobs.experiment.registry import StageArguments
from jobs.store.attempts import SUPERSEDED, new_claim
from jobs.store.layout import StageFolder
from jobs.store.records import SCHEMA, claim_attempt, read_claim, read_outcome, write_json
from jobs.worker.stage import Verdict
from tests.jobs.fake_registry import REGISTRY, FakeRegistry
from tests.jobs.worker.places import Place


class Meanwhile(FakeRegistry):
    """A registry whose first stage lets `happens` happen after it was computed."""

    happens: Callable[[StageArguments], None] | None = None

    def run(self, stage: str, **arguments: Unpack[StageArguments]) -> Mapping[str, Any]:
        happens, self.happens = self.happens, None
        returned = REGISTRY.run(stage, **arguments)
        if happens:
            happens(arguments)
        return returned


MEANWHILE = Meanwhile()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    made.place = replace(made.place, registry=f"{__name__}:MEANWHILE")
    return made


def cut_off(folder: StageFolder, number: int) -> None:
    """The claim of an attempt looks as that of a node without heartbeats, whose job Slurm has requeued."""
    claim = read_claim(folder.attempt(number))
    assert claim is not None
    write_json(folder.attempt(number).claim, {"schema": SCHEMA, **asdict(replace(claim, pid=1, process_start="boot/pid/1"))})


def error_of(folder: StageFolder, number: int) -> str:
    outcome = read_outcome(folder.attempt(number))
    return outcome.error if outcome else ""


def test_a_superseded_attempt_publishes_nothing_and_leaves_the_checkpoints_of_its_successor(place: Place) -> None:
    """It ends when a later attempt was claimed: its result would end that attempt, and its cleaning would remove its checkpoints."""
    folder = place.folder(place.tapt)
    saw: list[bool] = []

    def claimed(arguments: StageArguments) -> None:
        saw.append(arguments["superseded"]())
        assert claim_attempt(folder, 2, new_claim(2))
        saw.append(arguments["superseded"]())
        (arguments["checkpoint"] / "of-attempt-2").touch()

    MEANWHILE.happens = claimed
    assert place.execute(place.tapt) is Verdict.taken
    assert saw == [False, True]
    assert not folder.result.exists()
    assert error_of(folder, 1) == SUPERSEDED
    assert (folder.checkpoint / "of-attempt-2").exists()


def test_a_superseded_attempt_does_not_replace_the_result_of_its_successor(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requeued job computes the stage while the first attempt still runs: its result stays as it is."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    folder = place.folder(place.tapt)

    def requeued(arguments: StageArguments) -> None:
        assert arguments["attempt"] == 1
        cut_off(folder, 1)
        assert place.execute(place.tapt) is Verdict.done

    MEANWHILE.happens = requeued
    assert place.execute(place.tapt) is Verdict.already
    assert place.result(place.tapt).attempt == 2
    assert error_of(folder, 1) == SUPERSEDED


def test_an_error_of_a_superseded_attempt_is_not_held_against_the_stage(place: Place) -> None:
    """Its files belong to a later attempt, which may have removed them."""
    folder = place.folder(place.tapt)

    def claimed(arguments: StageArguments) -> None:
        assert claim_attempt(folder, 2, new_claim(2))
        (arguments["checkpoint"] / "gone").rename(arguments["checkpoint"] / "step")

    MEANWHILE.happens = claimed
    assert place.execute(place.tapt) is Verdict.interrupted
    assert error_of(folder, 1) == SUPERSEDED
