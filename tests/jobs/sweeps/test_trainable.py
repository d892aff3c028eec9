"""A trial restored by Tune: its record has what Tune had not saved, and a lost checkpoint costs nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ray.tune import Checkpoint

from jobs.sweeps.records import FoldRecord, Sweep, TrialRecord, TrialState, read_trial, write_trial
from jobs.sweeps.space import Point
from jobs.sweeps.trainable import FOLDER, FOLDS, OBJECTIVE, POINT, SweepTrial, point_text
from tests.jobs.sweeps.fake_registry import make_sweep

POINT_OF = Point((16,))


def _trial(sweep: Sweep) -> SweepTrial:
    """In this process, with an evaluation that tells of the fold alone."""

    class Quick(SweepTrial):
        def _evaluate(self, fold: str, notes: list[str]) -> FoldRecord:
            return FoldRecord(fold, (), {}, {}, 50.0 + int(fold))

    return Quick(config={FOLDER: str(sweep.folder.path), POINT: point_text(POINT_OF)})


def test_a_stopped_trial_is_not_resumed(tmp_path: Path) -> None:
    """Tune was killed before it saved that: no further fold is evaluated, with or without a checkpoint."""
    sweep, checkpoint = make_sweep(tmp_path), tmp_path / "checkpoint"
    first = _trial(sweep)
    assert (first.step()["done"], first.step()["done"]) == (False, False)
    checkpoint.mkdir()
    first.save_checkpoint(str(checkpoint))
    record = read_trial(sweep.folder, POINT_OF.name)
    assert record is not None
    for saved in (True, False):
        write_trial(sweep.folder, TrialRecord(record.trial, POINT_OF, TrialState.stopped, record.folds))
        again = _trial(sweep)
        if saved:
            again.load_checkpoint(str(checkpoint))
        else:
            assert not again.step()["done"]
        found = again.step()
        assert (found["done"], found[FOLDS], found[OBJECTIVE]) == (True, 2, 51.5)


@pytest.mark.parametrize("torn", [True, False])
def test_a_trial_starts_without_a_readable_checkpoint(tmp_path: Path, torn: bool) -> None:
    """The trial begins with its first fold, whose stages are in the store."""
    sweep, folder = make_sweep(tmp_path), tmp_path / "checkpoint"
    trial: Any = _trial(sweep)
    trial.step()
    folder.mkdir()
    trial.save_checkpoint(str(folder))
    whole: Any = _trial(sweep)
    whole.restore(Checkpoint.from_directory(str(folder)))
    assert whole.step()[FOLDS] == 2
    if torn:
        (folder / "folds.json").write_text('[{"fold"')
    else:
        shutil.rmtree(folder)
    broken: Any = _trial(sweep)
    broken.restore(Checkpoint.from_directory(str(folder)))
    assert broken.step()[FOLDS] == 1
