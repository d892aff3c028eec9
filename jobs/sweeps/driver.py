"""Runs a sweep with Ray Tune: starts or resumes it, stops it so that every trial can be resumed, and logs its progress.

Tune keeps the list of trials in files of its own. If they cannot be read, the sweep is restarted without loss, as all results are in the
store. A sweep is asked to stop by a file that the trials and the driver poll: once all trials have stopped, Tune is ended by its own
signal handler, which saves them as unfinished.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import ray
from ray import tune

from jobs.errors import InternalError
from jobs.experiment.config import at_once_of, resources_of
from jobs.experiment.registry import SweepRegistry
from jobs.signals import Interrupts
from jobs.store.records import read_json, write_json
from jobs.sweeps.ray.executor import fits, machines_of, needs_of
from jobs.sweeps.records import (
    StopLevel,
    Sweep,
    TrialRecord,
    TrialState,
    ask_to_stop,
    interrupt_trials,
    read_trial,
    read_trials,
    set_stop_level,
    stop_level,
    write_trial,
)
from jobs.sweeps.search import DistinctOptuna, scheduler_of, set_concurrency
from jobs.sweeps.space import Point, listed_points, number_of_points
from jobs.sweeps.trainable import FAILED, FOLDER, FOLDS, GRACE_SECONDS, NOTES, OBJECTIVE, POINT, SweepTrial, point_of, point_text
from jobs.sweeps.trial import fold_graph
from jobs.text import duration
from jobs.worker.task import load_registry

RUN_NAME = "tune"  # folder of Tune's files
MAX_DEATHS = 5  # restarts of a trial's process in one launch
AT_ONCE = (2, 16)  # minimum and maximum of concurrent trials, unless configured
LOOK_SECONDS = 0.5  # between polls of the stop file
ENDING_SECONDS = GRACE_SECONDS + 30.0  # after a request to stop, wait so long for the trials
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TUNE_SIGNAL = signal.SIGUSR1  # its handler saves Tune's state with unfinished trials
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the report of a failed trial has no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the driver logs them
}
ENDED = ("TERMINATED", "ERROR")  # states of trials in Tune


def run_sweep(sweep: Sweep, *, tell: Callable[[str], None], heard: Callable[[], bool] = lambda: False) -> bool:
    """Start or resume a sweep. True: every trial has ended; False: it was interrupted, and the same call resumes it.

    Call it in the main thread, inside `ray_here` or `ray_joined`, and in one process at a time per sweep. A request to stop that is newer
    than `store_sweep` is followed. `heard` returns whether a stop signal arrived before the driver's handlers were installed.
    """
    sweep.folder.stopping.unlink(missing_ok=True)
    interrupt_trials(sweep.folder)
    driver = Driver(sweep, tell, number_of_points(sweep.experiment))
    begun = time.monotonic()
    with driver:
        if heard() or stop_level(sweep.folder):  # checked after the driver's handlers are installed
            tell("asked to stop before it began")
            return False
        at_once = trials_at_once(sweep)
        try:
            with _quiet():
                (restored(sweep, at_once, tell) or new_tuner(sweep, at_once)).fit()
        finally:
            interrupt_trials(sweep.folder)
    tell(_summary(sweep, driver.total, stopped=driver.ended, seconds=time.monotonic() - begun))
    return not driver.ended


def trials_at_once(sweep: Sweep) -> int:
    """Number of concurrent trials: as configured, else twice the number of stages that fit on the machines."""
    asked, total = sweep.experiment.sweep.at_once, number_of_points(sweep.experiment)
    return min(asked or min(max(2 * _places(sweep), AT_ONCE[0]), AT_ONCE[1]), max(total, 1))


def _places(sweep: Sweep) -> int:
    """How many of the last stages of a sweep, or of their upstream stages, fit on the machines of this Ray cluster."""
    point, fold = Point(sweep.space.sets[0]), sweep.folds[0]
    registry = cast(SweepRegistry, load_registry(sweep.place))
    graph = fold_graph(sweep.experiment, sweep.corpus, point, fold, sweep.validation[fold], registry)
    last = {run.key for run in graph.runs}
    stages = {graph.nodes[key].stage for key in last} | {graph.nodes[up].stage for key in last for up in graph.nodes[key].upstream.values()}
    machines = machines_of(ray.nodes())
    most = 0
    for stage in stages:
        resources = resources_of(sweep.experiment, stage)
        needs = needs_of(resources, machines)
        share = max(1, at_once_of(resources)) if needs.gpus == 1 else 1
        places = 0
        for machine in machines:
            if fits(needs, machine):
                counts = [machine.cpus // max(1, needs.cpus), int(machine.memory_gb / needs.memory_gb)]
                places += min([*counts, len(machine.gpus) * share // needs.gpus] if needs.gpus else counts)
        most = max(most, places)
    return most


@dataclass
class Driver:
    """The driver while Tune runs: handles signals, logs progress, and writes the records of trials that end.

    Use it in a `with` block. Tune restores its callbacks from a file, so they get the driver of this process by `_driver`.
    """

    sweep: Sweep
    tell: Callable[[str], None]
    total: int
    ended: bool = False  # Tune was asked to end with unfinished trials
    _asked: StopLevel = StopLevel.none
    _since: float = 0.0
    _looked: float = 0.0
    _end_tune: Callable[[int, FrameType | None], Any] | None = None
    _renewed: bool = False
    _signals: Interrupts = field(default_factory=lambda: Interrupts(numbers=STOP_SIGNALS))

    def __post_init__(self) -> None:
        plain = self.tell

        def tell(line: str) -> None:
            try:
                plain(line)
            except OSError:  # the pipe or terminal was closed: stop, as an exception would break Tune
                if not self._signals.count:
                    self._signals.note()

        self.tell = tell

    def __enter__(self) -> Driver:
        global _current
        _current = self
        self._signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        global _current
        _current = None
        self._signals.__exit__(*error)

    def begin(self) -> None:
        """Replace the signal handlers that Tune has installed; the one that ends it is kept for `look`."""
        handler = signal.getsignal(TUNE_SIGNAL)
        if not callable(handler) or handler == self._signals.note:
            raise InternalError("Ray Tune has no signal handler that ends it: this version is not supported; see constraints.txt")
        self._end_tune = handler
        self._signals.install()

    def renew(self, trials: Sequence[Any]) -> None:
        """Reset the failure counts of trials once per launch."""
        if not self._renewed:
            self._renewed = True
            for trial in trials:
                trial.max_failures, trial.run_metadata.num_failures = MAX_DEATHS, 0

    def look(self, trials: Sequence[Any]) -> None:
        """Poll for requests to stop; end Tune once all trials have stopped."""
        if time.monotonic() - self._looked < LOOK_SECONDS and not (self._signals.count and not self._asked):
            return
        self._looked = time.monotonic()
        if not self.ended and not _ray_lives():
            raise InternalError("Ray's process on this machine has died: the same command resumes the sweep")
        wanted = max(stop_level(self.sweep.folder), StopLevel(min(self._signals.count, StopLevel.hurry.value)))
        if wanted and not self._asked:
            ask_to_stop(self.sweep.folder)
            self._since = time.monotonic()
            self.tell(f"stopping: stages write checkpoints, at most {GRACE_SECONDS:.0f} s (ask again to end them at once)")
        if wanted > max(self._asked, StopLevel.stop):
            set_stop_level(self.sweep.folder, wanted)
        self._asked = max(self._asked, wanted)
        if self._asked and not self.ended and (self._all_stopped(trials) or time.monotonic() - self._since > ENDING_SECONDS):
            self.ended = True
            if self._end_tune is not None:
                self._end_tune(TUNE_SIGNAL, None)
            set_stop_level(self.sweep.folder, StopLevel.leave)

    def _all_stopped(self, trials: Sequence[Any]) -> bool:
        records = [self.record(trial) for trial in trials if trial.status == "RUNNING"]
        return not any(record is not None and record.state is TrialState.running for record in records)

    def record(self, trial: Any) -> TrialRecord | None:
        return read_trial(self.sweep.folder, point_of(trial.config).name)

    def log(self, trials: Sequence[Any], trial: Any, line: str, *, over: bool = False) -> None:
        """Log a line on a trial, after the number of ended trials. `over`: this one has just ended."""
        ended = sum(each.status in ENDED or (over and each is trial) for each in trials)
        self.tell(f"[{ended}/{self.total}] {point_of(trial.config).label}: {line}")


_current: Driver | None = None  # of this process


def _ray_lives() -> bool:
    """Whether Ray still counts this machine as alive; otherwise Tune would wait forever to start a process here."""
    own = ray.get_runtime_context().get_node_id()
    return any(node["Alive"] and node["NodeID"] == own for node in ray.nodes())


def _driver() -> Driver:
    if _current is None:
        raise InternalError("this process is not the driver of a sweep")
    return _current


class Events(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Tune's events: starts and polls the driver, logs progress, and records trials that end."""

    def setup(self, **info: Any) -> None:
        _driver().begin()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        _driver().renew(trials)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        _driver().look(trials)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """A fold was evaluated."""
        for note in result.get(NOTES, ()):
            _driver().log(trials, trial, note)
        if FAILED in result:
            trial.max_failures = 0  # the next step raises
        elif OBJECTIVE in result:
            folds, (fold, ua) = int(result[FOLDS]), list(result["fold_ua"].items())[-1]
            mean = f", mean of {folds} {result[OBJECTIVE]:.1f}" if folds > 1 else ""
            _driver().log(trials, trial, f"fold {fold} validation UA {ua:.1f}{mean}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of a trial died and is restarted."""
        _driver().log(trials, trial, f"its process died and is restarted ({trial.run_metadata.num_failures} of {MAX_DEATHS})")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial is complete or was stopped by the scheduler."""
        driver, folds = _driver(), _driver().sweep.folds
        record = driver.record(trial)
        if record is None:
            return
        state = TrialState.complete if len(record.folds) == len(folds) else TrialState.stopped
        write_trial(driver.sweep.folder, replace(record, state=state, ended=time.time()))
        after = "" if state is TrialState.complete else f" after {len(record.folds)} of {len(folds)} folds"
        ua = "" if record.ua is None else f", validation UA {record.ua:.1f}"
        driver.log(trials, trial, f"{state.text}{after}{ua}", over=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed, or its process has died too often."""
        driver, point = _driver(), point_of(trial.config)
        record = driver.record(trial) or TrialRecord(point.name, point, TrialState.interrupted, began=time.time())
        if record.state is not TrialState.failed:
            record = replace(record, state=TrialState.failed, error=_error_of(trial), ended=time.time())
            write_trial(driver.sweep.folder, record)
        driver.log(trials, trial, f"failed: {record.error}", over=True)


def trial_name(trial: Any) -> str:
    """Name of a trial in Tune, and of its folder."""
    return f"{point_of(trial.config).name}-{trial.trial_id}"


def new_tuner(sweep: Sweep, at_once: int) -> tune.Tuner:
    """A new Tune run."""
    settings, points = sweep.experiment.sweep, listed_points(sweep.experiment)
    shutil.rmtree(sweep.folder.ray, ignore_errors=True)
    write_json(_state_file(sweep), _state(sweep))
    config: dict[str, Any] = {FOLDER: str(sweep.folder.path)}
    search = DistinctOptuna(sweep.space, sweep.folder.path, settings, len(sweep.folds)) if points is None else None
    if points is not None:
        config[POINT] = tune.grid_search([point_text(point) for point in points])
    return tune.Tuner(
        SweepTrial,
        param_space=config,
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            search_alg=search,
            scheduler=scheduler_of(settings, len(sweep.folds), at_once),
            num_samples=1 if points is not None else number_of_points(sweep.experiment),
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            name=RUN_NAME,
            storage_path=str(sweep.folder.ray),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
            # All are kept, a few kilobytes each: Tune removes older ones before it has saved the newer one in its state.
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            callbacks=[Events()],
        ),
    )


def restored(sweep: Sweep, at_once: int, tell: Callable[[str], None]) -> tune.Tuner | None:
    """The interrupted Tune run; None if there is none, or it cannot be resumed."""
    folder = sweep.folder.ray / RUN_NAME
    if not folder.is_dir():
        return None
    why = _unreadable(sweep, folder)
    if not why:
        try:
            set_concurrency(at_once)
            return tune.Tuner.restore(str(folder), SweepTrial, resume_unfinished=True, resume_errored=True)
        except Exception as error:  # a damaged pickle can raise anything
            why = f"{type(error).__name__}: {_last_line(str(error))}"
    tell(f"Ray Tune's state of this sweep cannot be used ({why}): the sweep is restarted; results in the store are reused")
    return None


def _unreadable(sweep: Sweep, folder: Path) -> str:
    """Why Tune's files cannot be restored; "" if it is worth a try."""
    stated = read_json(_state_file(sweep)) or {}
    for key, value in _state(sweep).items():
        if stated.get(key) != value:
            return f"it has another {key}"
    states = sorted(folder.glob("experiment_state-*.json"))
    if not states:
        return "it was never saved"
    try:
        json.loads(states[-1].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{states[-1].name} is damaged"
    return ""


def _state(sweep: Sweep) -> dict[str, str]:
    """Tune's files can be restored only with the same values."""
    return {"version of Ray": ray.__version__, "folder": str(sweep.folder.path)}


def _state_file(sweep: Sweep) -> Path:
    return sweep.folder.ray / "state.json"


def _summary(sweep: Sweep, total: int, *, stopped: bool, seconds: float) -> str:
    """The last line of the log."""
    records = read_trials(sweep.folder)
    states = Counter(record.state for record in records)
    counts = ", ".join(f"{states[state]} {state.text}" for state in TrialState if states[state])
    waiting = f", {total - len(records)} not started" if total > len(records) else ""
    best = max((record for record in records if record.state is TrialState.complete), key=lambda record: record.ua or 0.0, default=None)
    found = f"; best {best.point.label}, validation UA {best.ua:.1f}" if best is not None and best.ua is not None else ""
    head = "sweep interrupted, the same command resumes it" if stopped else "sweep ended"
    return f"{head} ({duration(seconds)}): {total} trials: {counts or 'none started'}{waiting}{found}"


def _error_of(trial: Any) -> str:
    """The error of a trial whose process died, in one line."""
    with contextlib.suppress(Exception):
        return _last_line(str(trial.get_error() or "")) or "its process ended without an error message"
    return "its process ended without an error message"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log output of Tune and Optuna; the driver logs instead."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air", "optuna")]
    former = [(logger, logger.level) for logger in loggers]
    missing = {name: value for name, value in TUNE_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in former:
            logger.setLevel(level)
        for name in missing:
            os.environ.pop(name, None)
