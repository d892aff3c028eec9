"""What is on record of a sweep: what was launched, and how far every trial has come. The one writer of the files in a sweep's folder.

A record says which points were tried. What was computed is in the results of the store, and a record names them by their keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum, IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, resolved_values, restore_experiment
from jobs.experiment.launched import Corpus
from jobs.store.layout import Layout
from jobs.store.records import DamagedRecordError, Decoder, report_damage, write_json, write_text
from jobs.sweeps.space import Point, Space, point_from_json, space_of
from jobs.worker.task import Workplace, load_object

SCHEMA = 1
DIGITS = 12  # of a sweep's name
AGAIN = "launch `sweep` again to renew it"


@dataclass(frozen=True)
class SweepFolder:
    """The folder of one sweep."""

    path: Path

    @property
    def sweep(self) -> Path:
        """What was launched."""
        return self.path / "sweep.json"

    @property
    def submission(self) -> Path:
        """The record of its last submission to Slurm (jobs.slurm.submissions); there is none for a sweep that never was submitted."""
        return self.path / "submission.json"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def ray(self) -> Path:
        """What Ray Tune keeps for itself."""
        return self.path / "ray"

    @property
    def proxies(self) -> Path:
        """What was found out about single stages, by their keys: may be removed, and is found out again."""
        return self.path / "proxies"

    @property
    def stop(self) -> Path:
        """Asks the sweep to stop, as long as it is there, whatever it says."""
        return self.path / "stop"

    @property
    def stopping(self) -> Path:
        """What its driver wants of trials that were asked to stop."""
        return self.path / "stopping"


@dataclass(frozen=True)
class Sweep:
    """One sweep, ready to be run, here or by another process that reads its file."""

    experiment: Experiment
    config: str  # what the experiment's file in configs/experiment/ is called
    corpus: Corpus
    layout: Layout
    place: Workplace
    recipe_schema: str  # `module:attribute`
    validation: Mapping[str, tuple[str, ...]]  # fold -> the speakers that its trials are scored on
    launched: float  # seconds since the epoch
    digest: str  # of all that determines it: its name
    code: str  # folder that workers import from
    preload: tuple[str, ...] = ()

    @property
    def folder(self) -> SweepFolder:
        return SweepFolder(self.layout.sweep / self.digest)

    @property
    def folds(self) -> tuple[str, ...]:
        """The held-out folds that every trial is evaluated on, in this order."""
        return tuple(self.experiment.sweep.folds or self.experiment.folds or self.corpus.folds)

    @property
    def own_layout(self) -> Layout:
        """Of what its stages leave beside the store: logs, the index. What is cancelled of the experiment is not cancelled of its sweep."""
        return Layout(self.layout.root, self.folder.path.relative_to(self.layout.root).as_posix())

    @property
    def own_place(self) -> Workplace:
        """Where its stages are computed."""
        return replace(self.place, experiment=self.own_layout.experiment, launched=self.launched)

    @cached_property
    def space(self) -> Space:
        return space_of(self.experiment)


class TrialState(Enum):
    """Where a trial stands."""

    running = "running"
    complete = "complete"  # every fold is done
    stopped = "stopped"  # by the scheduler, before its last fold
    failed = "failed"
    interrupted = "interrupted"  # goes on when the sweep is launched again


class StopLevel(IntEnum):
    """What a sweep that is under way is asked for."""

    none = 0
    stop = 1  # stages write checkpoints
    hurry = 2  # they are ended
    leave = 3  # the driver has seen every trial stop: their processes may end


@dataclass(frozen=True)
class RunRecord:
    """One fine-tuning that counts, and its scores on the validation speakers, in percent."""

    fold: str
    slot: int
    seed: int
    key: str
    ua: float
    wa: float | None = None  # None: its stage gives no confusion matrix
    macro_f1: float | None = None
    diverged: str = ""  # why it would not count; of a run on record always ""


@dataclass(frozen=True)
class FoldRecord:
    """One evaluated fold of a trial."""

    fold: str
    runs: tuple[RunRecord, ...]
    stages: Mapping[str, str]  # key -> name of the stage: all that the fold of this point needs
    proxies: Mapping[str, Any]  # what was seen on the way there: {"k": {"16": {...}}, "ptapt_loss": ..., ...}
    ua: float  # mean of the runs


@dataclass(frozen=True)
class TrialRecord:
    """One point, and how far its evaluation has come. `trial` is the point's name, so a point is on record once."""

    trial: str
    point: Point
    state: TrialState
    folds: tuple[FoldRecord, ...] = ()
    error: str = ""  # of a failed one, in one line
    began: float = 0.0  # seconds since the epoch
    ended: float = 0.0  # 0: it has not

    @property
    def ua(self) -> float | None:
        """The objective: mean over the folds done; None before the first."""
        return running_means(self.folds)[-1] if self.folds else None


@dataclass(frozen=True)
class _StoredSweep:
    """The record of a sweep."""

    config: Mapping[str, Any]
    file: str
    corpus: Corpus
    place: Workplace
    recipe_schema: str
    validation: Mapping[str, tuple[str, ...]]
    launched: float
    code: str
    preload: tuple[str, ...]


@dataclass(frozen=True)
class _StoredTrial:
    """The record of a trial."""

    trial: str
    point: Mapping[str, Any]
    state: TrialState
    folds: tuple[FoldRecord, ...]
    error: str
    began: float
    ended: float


_SWEEPS, _TRIALS, _FOLDS = Decoder(_StoredSweep, SCHEMA), Decoder(_StoredTrial, SCHEMA), Decoder(FoldRecord, None)


def running_means(folds: tuple[FoldRecord, ...]) -> tuple[float, ...]:
    """The objective after each fold."""
    return tuple(sum(fold.ua for fold in folds[:count]) / count for count in range(1, len(folds) + 1))


def store_sweep(sweep: Sweep) -> None:
    """Remember a sweep as the last one launched, which lifts a request that it stop."""
    value = {
        "schema": SCHEMA,
        "config": resolved_values(sweep.experiment),
        "file": sweep.config,
        "corpus": {**asdict(sweep.corpus), "folds": list(sweep.corpus.folds)},
        "place": {**asdict(sweep.place), "packages": list(sweep.place.packages)},
        "recipe_schema": sweep.recipe_schema,
        "validation": {fold: list(speakers) for fold, speakers in sweep.validation.items()},
        "launched": sweep.launched,
        "digest": sweep.digest,
        "code": sweep.code,
        "preload": list(sweep.preload),
    }
    write_json(sweep.folder.sweep, value)
    store_latest(sweep)
    lift_stop(sweep.folder)


def store_latest(sweep: Sweep) -> None:
    """Remember a sweep as the last one launched, and nothing else."""
    write_text(latest_file(sweep.layout), f"{sweep.digest}\n")


def load_sweep(path: Path) -> Sweep:
    """The sweep whose folder this is. Raises UsageError where its file is missing, damaged, or of another version of the program."""
    folder = SweepFolder(path.resolve())
    try:
        stored = _SWEEPS.load(folder.sweep)
        if stored is None:
            raise UsageError(f"{folder.sweep}: no such sweep; {AGAIN}")
        schema = load_object(stored.recipe_schema)
    except (DamagedRecordError, ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{folder.sweep}: damaged ({error}); {AGAIN}") from error
    layout = Layout(folder.path.parents[2], folder.path.parents[1].name)
    return Sweep(
        experiment=restore_experiment(stored.config, recipe_schema=schema),
        config=stored.file,
        corpus=stored.corpus,
        layout=layout,
        place=replace(stored.place, results=str(layout.root)),
        recipe_schema=stored.recipe_schema,
        validation=stored.validation,
        launched=stored.launched,
        digest=folder.path.name,
        code=stored.code,
        preload=stored.preload,
    )


def latest_file(layout: Layout) -> Path:
    """Holds the name of the last sweep launched."""
    return layout.sweep / "latest"


def latest_sweep(layout: Layout) -> Sweep | None:
    """The last sweep launched of an experiment; None if there was none. Raises UsageError where it is not there any more, or damaged."""
    try:
        digest = latest_file(layout).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise UsageError(f"{latest_file(layout)}: damaged; {AGAIN}") from error
    if not digest.isalnum():
        raise UsageError(f"{latest_file(layout)}: damaged; {AGAIN}")
    return load_sweep(layout.sweep / digest)


def write_trial(folder: SweepFolder, record: TrialRecord) -> None:
    """State how far a trial has come. Its own process does while it evaluates, the driver before and after: never both at once."""
    value = {
        "schema": SCHEMA,
        "trial": record.trial,
        "point": record.point.to_json(),
        "state": record.state.value,
        "folds": [asdict(fold) for fold in record.folds],
        "error": record.error,
        "began": record.began,
        "ended": record.ended,
    }
    write_json(_trial_file(folder, record.trial), value)


def read_trial(folder: SweepFolder, trial: str) -> TrialRecord | None:
    """The record of one trial; None where there is no whole one."""
    file = _trial_file(folder, trial)
    stored = _TRIALS.read(file)
    if stored is None:
        return None
    try:
        point = point_from_json(stored.point)
    except ValueError as error:
        report_damage(file, str(error))
        return None
    if stored.trial != trial:
        report_damage(file, f"the record of another trial, {stored.trial}")
        return None
    return TrialRecord(trial, point, stored.state, stored.folds, stored.error, stored.began, stored.ended)


def read_trials(folder: SweepFolder) -> tuple[TrialRecord, ...]:
    """All records, in the order in which the trials began; torn ones are left out."""
    try:
        names = [name.removesuffix(".json") for name in os.listdir(folder.trials) if name.endswith(".json") and name[0] != "."]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    found = filter(None, (read_trial(folder, name) for name in names))
    return tuple(sorted(found, key=lambda record: (record.began, record.trial)))


def interrupt_trials(folder: SweepFolder) -> None:
    """State of every trial that counts as running that it is not: whoever ran it is gone."""
    for record in read_trials(folder):
        if record.state is TrialState.running:
            write_trial(folder, replace(record, state=TrialState.interrupted))


def ask_to_stop(folder: SweepFolder) -> None:
    """Let the sweep that runs in this folder stop, wherever it runs."""
    folder.stop.parent.mkdir(parents=True, exist_ok=True)
    folder.stop.touch()


def press(folder: SweepFolder, level: StopLevel) -> None:
    """The driver's word to trials that were asked to stop."""
    write_text(folder.stopping, f"{level.name}\n")


def stop_asked(folder: SweepFolder) -> StopLevel:
    """What the trials of a sweep are asked for."""
    if not folder.stop.exists():
        return StopLevel.none
    try:
        name = folder.stopping.read_text(encoding="utf-8").strip()
    except OSError:
        return StopLevel.stop
    return StopLevel.__members__.get(name, StopLevel.stop)


def lift_stop(folder: SweepFolder) -> None:
    """Let a sweep run in this folder again."""
    folder.stop.unlink(missing_ok=True)
    folder.stopping.unlink(missing_ok=True)


def fold_from_json(value: Mapping[str, Any]) -> FoldRecord:
    """Inverse of `dataclasses.asdict`. Raises ValueError where the value is not a fold."""
    return _FOLDS.decode(json.dumps(value).encode())


def _trial_file(folder: SweepFolder, trial: str) -> Path:
    return folder.trials / f"{trial}.json"
