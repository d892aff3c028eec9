"""A trial as a Ray Tune Trainable: an actor without CPUs that evaluates one fold per step and submits its stages as Ray tasks.

All its state is in the store and the records: a trial that is killed repeats its fold, and reuses finished stages. Its configuration is
the folder of the sweep and the point as JSON text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune

from jobs.errors import UsageError
from jobs.experiment.config import resources_of
from jobs.experiment.graph import canonical_json
from jobs.sweeps.ray.executor import RayStages
from jobs.sweeps.records import (
    FoldRecord,
    StopLevel,
    Sweep,
    SweepFolder,
    TrialRecord,
    TrialState,
    fold_from_json,
    load_sweep,
    read_trial,
    running_means,
    stop_level,
    write_trial,
)
from jobs.sweeps.space import Point, point_from_json
from jobs.sweeps.trial import TrialFailedError, TrialStoppedError, evaluate_fold

FOLDER, POINT = "sweep", "point"  # keys of a trial's configuration
OBJECTIVE = "validation_ua"  # in a report: mean over the folds done, percent
FOLDS = "folds"  # in a report: number of evaluated folds
FAILED, NOTES = "failed", "notes"  # in a report: error message in place of a fold; log lines
STATE_FILE = "folds.json"
POLL_SECONDS = 0.5  # between looks at the stop file
GRACE_SECONDS = 60.0  # for checkpoints
LEAVE_SECONDS = 120.0  # a stopped trial waits so long for the driver to end it


def point_of(config: Mapping[str, Any]) -> Point:
    """The point in a trial's configuration."""
    return point_from_json(json.loads(config[POINT]))


def point_text(point: Point) -> str:
    """A point as text for a trial's configuration."""
    return canonical_json(point.to_json())


def folder_of(config: Mapping[str, Any]) -> SweepFolder:
    """The folder of the sweep in a trial's configuration."""
    return SweepFolder(Path(config[FOLDER]))


class StopPoll:
    """The stop request of a sweep, read from disk at most every `POLL_SECONDS`."""

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        self._looked = 0.0
        self._found = StopLevel.none

    def __call__(self) -> StopLevel:
        if time.monotonic() - self._looked >= POLL_SECONDS:
            self._looked, self._found = time.monotonic(), stop_level(self._folder)
        return self._found


class SweepTrial(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """Evaluates one point, one fold per step."""

    @classmethod
    def default_resource_request(cls, config: Mapping[str, Any]) -> Any:
        """No CPU, on the machine of the driver; the stages request their own resources."""
        return tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.001}])

    def setup(self, config: dict[str, Any]) -> None:
        self._point = point_of(config)
        self._sweep: Sweep = load_sweep(folder_of(config).path)
        self._stopped = StopPoll(self._sweep.folder)
        self._folds: tuple[FoldRecord, ...] = ()
        self._failure = ""
        former = read_trial(self._sweep.folder, self._point.name)
        self._began = former.began if former else time.time()
        # Tune saves its state with a delay: if the driver is killed before, only the record has the scheduler's decision.
        self._given_up_after = len(former.folds) if former and former.state is TrialState.stopped else 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Reuse this actor for another trial: starting one takes seconds."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self._failure:
            raise TrialFailedError(self._failure)
        if self._done:  # the process was killed after its last report
            return self._report([])
        notes: list[str] = []
        self._note(TrialState.running)
        try:
            self._folds += (self._evaluate(self._sweep.folds[len(self._folds)], notes),)
        except TrialStoppedError:
            self._note(TrialState.interrupted)
            self._wait_to_be_ended()
            raise
        except (TrialFailedError, UsageError) as error:
            # Reported, so that the driver does not restart the trial; the next step raises.
            self._failure = str(error)
            self._note(TrialState.failed)
            return {FAILED: self._failure, NOTES: notes}
        self._note(TrialState.running)
        return self._report(notes)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / STATE_FILE).write_text(json.dumps([asdict(fold) for fold in self._folds]), encoding="utf-8")

    def load_checkpoint(self, checkpoint: str) -> None:
        stated = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
        self._folds = tuple(map(fold_from_json, stated))

    def restore(self, checkpoint_path: Any) -> None:
        """Without a readable checkpoint the trial starts from its first fold, and finds the results in the store."""
        try:
            super().restore(checkpoint_path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._folds = ()

    def _evaluate(self, fold: str, notes: list[str]) -> FoldRecord:
        if self._stopped():
            raise TrialStoppedError(f"{self._point.label}: asked to stop before fold {fold}")
        sweep = self._sweep
        stages = RayStages(
            place=sweep.own_place,
            layout=sweep.own_layout,
            resources=lambda stage: resources_of(sweep.experiment, stage),
            code=Path(sweep.code),
            preload=sweep.preload,
        )
        with stages:
            return evaluate_fold(sweep, self._point, fold, stages, tell=notes.append, stopped=self._stopped, grace_seconds=GRACE_SECONDS)

    def _report(self, notes: list[str]) -> dict[str, Any]:
        means = running_means(self._folds)
        return {
            OBJECTIVE: means[-1],
            FOLDS: len(self._folds),
            "fold_ua": {fold.fold: fold.ua for fold in self._folds},
            "proxies": dict(self._folds[-1].proxies),
            NOTES: notes,
            "done": self._done,
        }

    @property
    def _done(self) -> bool:
        return len(self._folds) == len(self._sweep.folds) or 0 < self._given_up_after <= len(self._folds)

    def _note(self, state: TrialState) -> None:
        ended = time.time() if state is TrialState.failed else 0.0
        record = TrialRecord(self._point.name, self._point, state, self._folds, self._failure, self._began, ended)
        write_trial(self._sweep.folder, record)

    def _wait_to_be_ended(self) -> None:
        """Wait, as Tune would count a report or an exception as the end of the trial; a waiting trial stays unfinished."""
        end = time.monotonic() + LEAVE_SECONDS
        while self._stopped() not in (StopLevel.leave, StopLevel.none) and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 2)
