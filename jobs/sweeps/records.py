"""Records of a sweep: its configuration, the state of every trial, and requests to stop. Only this module writes these files.

A trial's record has its point and its scores by fold. Results of stages are in the store, and the record has their keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum, IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, resolved_values, restore_experiment
from jobs.experiment.launched import Corpus
from jobs.store.layout import Layout
from jobs.store.records import DamagedRecordError, Decoder, report_damage, write_json, write_text
from jobs.sweeps.space import Point, Space, space_of
from jobs.worker.task import Workplace, load_object

SCHEMA = 1
DIGITS = 12  # of the digest that names a sweep
AGAIN = "launch `sweep` again to renew it"


@dataclass(frozen=True)
class SweepFolder:
    """The folder of one sweep."""

    path: Path

    @property
    def sweep(self) -> Path:
        """The configuration of the sweep."""
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
        """Files of Ray Tune."""
        return self.path / "ray"

    @property
    def proxies(self) -> Path:
        """Cache of proxies by stage key. May be removed."""
        return self.path / "proxies"

    @property
    def stop(self) -> Path:
        """The sweep stops while this file exists, whatever its content."""
        return self.path / "stop"

    @property
    def stopping(self) -> Path:
        """The `StopLevel` that the driver requests from running trials."""
        return self.path / "stopping"


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What the record of a sweep holds besides the values of its experiment."""

    file: str  # name of the experiment's file in configs/experiment/
    corpus: Corpus
    place: Workplace
    recipe_schema: str  # `module:attribute`
    validation: Mapping[str, tuple[str, ...]]  # fold -> speakers that its trials are scored on
    launched: float  # seconds since the epoch
    digest: str  # its name: hash of everything that determines it
    code: str  # folder that workers import from
    preload: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _StoredSweep(_Recorded):
    """The record of a sweep."""

    config: Mapping[str, Any]  # the resolved values of its experiment


@dataclass(frozen=True, kw_only=True)
class Sweep(_Recorded):
    """One sweep, with everything that is needed to run it."""

    experiment: Experiment
    layout: Layout

    @property
    def folder(self) -> SweepFolder:
        return SweepFolder(self.layout.sweep / self.digest)

    @property
    def folds(self) -> tuple[str, ...]:
        return folds_of(self.experiment, self.corpus)

    @property
    def own_layout(self) -> Layout:
        """Layout of the logs and the index of its stages. Cancelling the experiment's grid does not cancel its sweep."""
        return Layout(self.layout.root, self.folder.path.relative_to(self.layout.root).as_posix())

    @property
    def own_place(self) -> Workplace:
        """The workplace of its stages."""
        return replace(self.place, experiment=self.own_layout.experiment, launched=self.launched)

    @cached_property
    def space(self) -> Space:
        return space_of(self.experiment)


def folds_of(experiment: Experiment, corpus: Corpus) -> tuple[str, ...]:
    """The held-out folds that every trial is evaluated on, in this order."""
    return tuple(experiment.sweep.folds or experiment.folds or corpus.folds)


class TrialState(Enum):
    """State of a trial."""

    running = "running"
    complete = "complete"  # every fold is evaluated
    stopped = "stopped"  # by the scheduler, before its last fold
    failed = "failed"
    interrupted = "interrupted"  # resumed by the next launch

    @property
    def text(self) -> str:
        """For messages and tables."""
        return {TrialState.running: "under way", TrialState.stopped: "stopped early"}.get(self, self.value)


class StopLevel(IntEnum):
    """What the driver requests from running trials."""

    none = 0
    stop = 1  # stages write checkpoints
    hurry = 2  # stages are killed
    leave = 3  # every trial has stopped: their processes may exit


@dataclass(frozen=True)
class RunRecord:
    """One fine-tuning and its scores on the validation speakers, in percent."""

    fold: str
    slot: int
    seed: int
    key: str
    ua: float
    wa: float | None = None  # None: no confusion matrix
    macro_f1: float | None = None
    diverged: str = ""  # why it diverged; always "" in a record, as diverged runs are replaced


@dataclass(frozen=True)
class FoldRecord:
    """One evaluated fold of a trial."""

    fold: str
    runs: tuple[RunRecord, ...]
    stages: Mapping[str, str]  # key -> name, of all stages of the point on this fold
    proxies: Mapping[str, Any]  # known before fine-tuning; those per cluster count under "k": {"16": {...}}
    ua: float  # mean of the runs


@dataclass(frozen=True)
class TrialRecord:
    """One point and its evaluated folds. `trial` is the name of the point, so a point has one record."""

    trial: str
    point: Point
    state: TrialState
    folds: tuple[FoldRecord, ...] = ()
    error: str = ""  # why it failed, one line
    began: float = 0.0  # seconds since the epoch
    ended: float = 0.0  # 0: not ended

    @property
    def ua(self) -> float | None:
        """The objective: mean over the evaluated folds; None before the first."""
        return running_means(self.folds)[-1] if self.folds else None


_SWEEPS, _TRIALS, _FOLDS = Decoder(_StoredSweep, SCHEMA), Decoder(TrialRecord, SCHEMA), Decoder(FoldRecord, None)


def running_means(folds: tuple[FoldRecord, ...]) -> tuple[float, ...]:
    """The objective after each fold."""
    return tuple(sum(fold.ua for fold in folds[:count]) / count for count in range(1, len(folds) + 1))


def store_sweep(sweep: Sweep) -> None:
    """Record a sweep as the last one launched, and remove a request to stop it."""
    recorded = {each.name: getattr(sweep, each.name) for each in fields(_Recorded)}
    stored = _StoredSweep(**recorded, config=resolved_values(sweep.experiment))
    write_json(sweep.folder.sweep, {"schema": SCHEMA, **asdict(stored)})
    store_latest(sweep)
    clear_stop(sweep.folder)


def store_latest(sweep: Sweep) -> None:
    """Record a sweep as the last one launched, without changing its files."""
    write_text(latest_file(sweep.layout), f"{sweep.digest}\n")


def load_sweep(path: Path) -> Sweep:
    """The sweep in a folder. Raises UsageError if its file is missing, damaged, or of another version of the program."""
    folder = SweepFolder(path.resolve())
    try:
        stored = _SWEEPS.load(folder.sweep)
        if stored is None:
            raise UsageError(f"{folder.sweep}: no such sweep; {AGAIN}")
        schema = load_object(stored.recipe_schema)
    except (DamagedRecordError, ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{folder.sweep}: damaged ({error}); {AGAIN}") from error
    layout = Layout(folder.path.parents[2], folder.path.parents[1].name)
    recorded = {each.name: getattr(stored, each.name) for each in fields(_Recorded)}
    recorded |= {"place": replace(stored.place, results=str(layout.root)), "digest": folder.path.name}
    return Sweep(**recorded, experiment=restore_experiment(stored.config, recipe_schema=schema), layout=layout)


def latest_file(layout: Layout) -> Path:
    """The file with the digest of the last sweep launched."""
    return layout.sweep / "latest"


def latest_sweep(layout: Layout) -> Sweep | None:
    """The sweep of an experiment that was launched last; None without one. Raises UsageError if it is missing or damaged."""
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
    """Write the record of a trial: its own process does while it runs, the driver before and after, never both at once."""
    value = {"schema": SCHEMA, **asdict(record), "point": record.point.to_json(), "state": record.state.value}
    write_json(_trial_file(folder, record.trial), value)


def read_trial(folder: SweepFolder, trial: str) -> TrialRecord | None:
    """The record of one trial; None if it is missing or damaged."""
    file = _trial_file(folder, trial)
    record = _TRIALS.read(file)
    if record is not None and record.trial != trial:
        report_damage(file, f"the record of another trial, {record.trial}")
        return None
    return record


def read_trials(folder: SweepFolder) -> tuple[TrialRecord, ...]:
    """All records, in the order in which the trials began; damaged ones are left out."""
    found = filter(None, (read_trial(folder, path.stem) for path in folder.trials.glob("[!.]*.json")))
    return tuple(sorted(found, key=lambda record: (record.began, record.trial)))


def interrupt_trials(folder: SweepFolder) -> None:
    """Record every running trial as interrupted, when its driver has ended."""
    for record in read_trials(folder):
        if record.state is TrialState.running:
            write_trial(folder, replace(record, state=TrialState.interrupted))


def ask_to_stop(folder: SweepFolder) -> None:
    """Request the sweep in this folder to stop, on whichever machine it runs."""
    folder.stop.parent.mkdir(parents=True, exist_ok=True)
    folder.stop.touch()


def set_stop_level(folder: SweepFolder, level: StopLevel) -> None:
    """Stop request from the driver to running trials."""
    write_text(folder.stopping, f"{level.name}\n")


def stop_level(folder: SweepFolder) -> StopLevel:
    """The current stop request."""
    if not folder.stop.exists():
        return StopLevel.none
    try:
        name = folder.stopping.read_text(encoding="utf-8").strip()
    except OSError:
        return StopLevel.stop
    return StopLevel.__members__.get(name, StopLevel.stop)


def clear_stop(folder: SweepFolder) -> None:
    """Remove a request to stop."""
    folder.stop.unlink(missing_ok=True)
    folder.stopping.unlink(missing_ok=True)


def fold_from_json(value: Mapping[str, Any]) -> FoldRecord:
    """Inverse of `dataclasses.asdict`. Raises ValueError for any other value."""
    return _FOLDS.decode(json.dumps(value).encode())


def _trial_file(folder: SweepFolder, trial: str) -> Path:
    return folder.trials / f"{trial}.json"
