"""A sweep as Ray Tune runs it: begun, or gone on with by `Tuner.restore`; stopped so that every trial goes on later; told in lines.

Tune's own files say which trials there are and in what order; they are its own affair. Where they cannot be read, a sweep begins anew and
loses nothing, because what was computed is in the store. A sweep is asked to stop by a file, which the trials and the driver look at: once
all trials have stopped, Tune is ended as by a signal of its own, and its state says that they are not finished.
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
from typing import Any

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
    press,
    read_trial,
    read_trials,
    stop_asked,
    write_trial,
)
from jobs.sweeps.search import DistinctOptuna, allow, listed_points, number_of_points, scheduler_of
from jobs.sweeps.space import Point
from jobs.sweeps.trainable import FAILED, FOLDER, FOLDS, GRACE_SECONDS, NOTES, OBJECTIVE, POINT, SweepTrial, point_of, point_text
from jobs.sweeps.trial import fold_graph
from jobs.text import duration
from jobs.worker.task import load_registry

RUN_NAME = "tune"  # folder of Tune's files
MAX_DEATHS = 5  # of a trial's process, in one go
AT_ONCE = (2, 16)  # trials under way, at least and at most, where the machines decide
LOOK_SECONDS = 0.5  # between looks at the stop file
ENDING_SECONDS = GRACE_SECONDS + 30.0  # that trials are waited for, once they are asked to stop
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TUNE_SIGNAL = signal.SIGUSR1  # on which Tune saves its state and leaves its trials unfinished
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that has failed says so in a report
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are told in lines of ours
}
ENDED = ("TERMINATED", "ERROR")  # states of Tune's


def run_sweep(sweep: Sweep, *, tell: Callable[[str], None], heard: Callable[[], bool] = lambda: False) -> bool:
    """Try the points of a sweep, or go on with it; True: every trial has ended, False: interrupted, and the same call goes on.

    Call it in the main thread, inside `ray_here` or `ray_joined`, and once at a time for a sweep. Storing a sweep lifts a request that it
    stop; one that came since is obeyed. `heard`: whether there was a signal to stop before signals came here.
    """
    sweep.folder.stopping.unlink(missing_ok=True)
    interrupt_trials(sweep.folder)
    driver = Driver(sweep, tell, number_of_points(sweep.experiment))
    begun = time.monotonic()
    with driver:
        if heard() or stop_asked(sweep.folder):  # only now: from here on, the driver hears
            tell("asked to stop before it began")
            return False
        at_once = trials_at_once(sweep)
        try:
            with _quiet():
                (restored(sweep, at_once, tell) or begun_anew(sweep, at_once)).fit()
        finally:
            interrupt_trials(sweep.folder)
    tell(_summary(sweep, driver.total, stopped=driver.ended, seconds=time.monotonic() - begun))
    return not driver.ended


def trials_at_once(sweep: Sweep) -> int:
    """How many trials may be under way at the same time: as asked for, else twice as many as the stages that the machines hold at once."""
    asked, total = sweep.experiment.sweep.at_once, number_of_points(sweep.experiment)
    return min(asked or min(max(2 * _places(sweep), AT_ONCE[0]), AT_ONCE[1]), max(total, 1))


def _places(sweep: Sweep) -> int:
    """How many of a sweep's last stages, or of those they read, the machines of this Ray hold at once."""
    point, fold = Point(sweep.space.sets[0]), sweep.folds[0]
    registry: SweepRegistry = load_registry(sweep.place)  # type: ignore[assignment]
    graph = fold_graph(sweep.experiment, sweep.corpus, point, fold, sweep.validation[fold], registry)
    last = {run.key for run in graph.runs}
    stages = {graph.nodes[key].stage for key in last} | {graph.nodes[up].stage for key in last for up in graph.nodes[key].upstream.values()}
    machines = machines_of(ray.nodes())
    most = 0
    for stage in stages:
        resources = resources_of(sweep.experiment, stage)
        needs = needs_of(resources, machines)
        share = max(1, at_once_of(resources)) if needs.gpus == 1 else 1
        held = 0
        for machine in machines:
            if fits(needs, machine):
                counts = [machine.cpus // max(1, needs.cpus), int(machine.memory_gb / needs.memory_gb)]
                held += min([*counts, len(machine.gpus) * share // needs.gpus] if needs.gpus else counts)
        most = max(most, held)
    return most


@dataclass
class Driver:
    """What the process that drives a sweep does while Tune runs: it hears signals, tells lines, and keeps the records of trials that end.

    Use it in a `with` block. Callbacks come back from Tune's file when it is restored, so they ask for the one of this process.
    """

    sweep: Sweep
    tell: Callable[[str], None]
    total: int
    ended: bool = False  # Tune was asked to end, with trials that go on later
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
            except OSError:  # a pipe or a terminal that has closed: nobody listens any more, and an error would break Tune
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
        """Tune has set its own handlers: keep the one that ends it, and hear its signals instead."""
        handler = signal.getsignal(TUNE_SIGNAL)
        if not callable(handler) or handler == self._signals.note:
            raise InternalError("Ray Tune hears no signal that ends it: this version is not known to work; see constraints.txt")
        self._end_tune = handler
        self._signals.install()

    def renew(self, trials: Sequence[Any]) -> None:
        """A launch lifts what is counted against trials."""
        if not self._renewed:
            self._renewed = True
            for trial in trials:
                trial.max_failures, trial.run_metadata.num_failures = MAX_DEATHS, 0

    def look(self, trials: Sequence[Any]) -> None:
        """Whether to stop, and whether all have stopped."""
        if time.monotonic() - self._looked < LOOK_SECONDS and not (self._signals.count and not self._asked):
            return
        self._looked = time.monotonic()
        if not self.ended and not _ray_lives():
            raise InternalError("Ray's process on this machine has died: the same command goes on")
        wanted = max(stop_asked(self.sweep.folder), StopLevel(min(self._signals.count, StopLevel.hurry.value)))
        if wanted and not self._asked:
            ask_to_stop(self.sweep.folder)
            self._since = time.monotonic()
            self.tell(f"stopping: stages write checkpoints, at most {GRACE_SECONDS:.0f} s (ask again to end them at once)")
        if wanted > max(self._asked, StopLevel.stop):
            press(self.sweep.folder, wanted)
        self._asked = max(self._asked, wanted)
        if self._asked and not self.ended and (self._all_quiet(trials) or time.monotonic() - self._since > ENDING_SECONDS):
            self.ended = True
            if self._end_tune is not None:
                self._end_tune(TUNE_SIGNAL, None)
            press(self.sweep.folder, StopLevel.leave)

    def _all_quiet(self, trials: Sequence[Any]) -> bool:
        at_work = [self.record(trial) for trial in trials if trial.status == "RUNNING"]
        return not any(record is not None and record.state is TrialState.running for record in at_work)

    def record(self, trial: Any) -> TrialRecord | None:
        return read_trial(self.sweep.folder, point_of(trial.config).name)

    def reported(self, trials: Sequence[Any], trial: Any, result: dict[str, Any]) -> None:
        """A line for a fold."""
        for note in result.get(NOTES, ()):
            self.tell(f"{self._head(trials, trial)}: {note}")
        if FAILED in result:
            trial.max_failures = 0  # the next step ends it
        elif OBJECTIVE in result:
            folds, fold_ua = int(result[FOLDS]), list(result["fold_ua"].items())
            mean = f", mean of {folds} {result[OBJECTIVE]:.1f}" if folds > 1 else ""
            self.tell(f"{self._head(trials, trial)}: fold {fold_ua[-1][0]} validation UA {fold_ua[-1][1]:.1f}{mean}")

    def recovered(self, trials: Sequence[Any], trial: Any) -> None:
        deaths = trial.run_metadata.num_failures
        self.tell(f"{self._head(trials, trial)}: its process ended, and is started again ({deaths} of {MAX_DEATHS})")

    def over(self, trials: Sequence[Any], trial: Any) -> None:
        """A trial has ended: complete, or stopped by the scheduler."""
        record = self.record(trial)
        if record is None:
            return
        state = TrialState.complete if len(record.folds) == len(self.sweep.folds) else TrialState.stopped
        write_trial(self.sweep.folder, replace(record, state=state, ended=time.time()))
        ua = "" if record.ua is None else f", validation UA {record.ua:.1f}"
        how = "complete" if state is TrialState.complete else f"stopped early after {len(record.folds)} of {len(self.sweep.folds)} folds"
        self.tell(f"{self._head(trials, trial, over=True)}: {how}{ua}")

    def failed(self, trials: Sequence[Any], trial: Any) -> None:
        record = self.record(trial)
        point = point_of(trial.config)
        if record is None or record.state is not TrialState.failed:
            record = record or TrialRecord(point.name, point, TrialState.failed, began=time.time())
            record = replace(record, state=TrialState.failed, error=_last_line(trial), ended=time.time())
            write_trial(self.sweep.folder, record)
        self.tell(f"{self._head(trials, trial, over=True)}: failed: {record.error}")

    def _head(self, trials: Sequence[Any], trial: Any, *, over: bool = False) -> str:
        ended = sum(each.status in ENDED or (over and each is trial) for each in trials)
        return f"[{ended}/{self.total}] {point_of(trial.config).label}"


_current: Driver | None = None  # of this process


def _ray_lives() -> bool:
    """Whether Ray still has this machine: where it has not, nothing can be started here any more, and Tune waits for that for ever."""
    own = ray.get_runtime_context().get_node_id()
    return any(node["Alive"] and node["NodeID"] == own for node in ray.nodes())


def _driver() -> Driver:
    if _current is None:
        raise InternalError("no sweep is driven by this process")
    return _current


class Lines(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Hands on to the driver what happens in Tune."""

    def setup(self, **info: Any) -> None:
        _driver().begin()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        _driver().renew(trials)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        _driver().look(trials)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        _driver().reported(trials, trial, result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _driver().recovered(trials, trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _driver().over(trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _driver().failed(trials, trial)


def trial_name(trial: Any) -> str:
    """What Tune calls a trial, and its folder."""
    return f"{point_of(trial.config).name}-{trial.trial_id}"


def begun_anew(sweep: Sweep, at_once: int) -> tune.Tuner:
    """A new run of Tune."""
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
            # All are kept, a few kilobytes each: Tune removes older ones before it has saved that there is a newer one.
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            callbacks=[Lines()],
        ),
    )


def restored(sweep: Sweep, at_once: int, tell: Callable[[str], None]) -> tune.Tuner | None:
    """The run of Tune that was interrupted; None where there is none, or none that can be gone on with."""
    folder = sweep.folder.ray / RUN_NAME
    if not folder.is_dir():
        return None
    why = _unreadable(sweep, folder)
    if not why:
        try:
            allow(at_once)
            return tune.Tuner.restore(str(folder), SweepTrial, resume_unfinished=True, resume_errored=True)
        except Exception as error:  # what a torn pickle raises can be anything
            why = f"{type(error).__name__}: {_one_line(str(error))}"
    tell(f"Ray Tune's state of this sweep cannot be used ({why}): it begins anew; what was computed is found in the store")
    return None


def _unreadable(sweep: Sweep, folder: Path) -> str:
    """Why Tune's files are not even tried; "" if they are."""
    stated = read_json(_state_file(sweep)) or {}
    for key, value in _state(sweep).items():
        if stated.get(key) != value:
            return f"it is of another {key}"
    states = sorted(folder.glob("experiment_state-*.json"))
    if not states:
        return "it was never saved"
    try:
        json.loads(states[-1].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{states[-1].name} is damaged"
    return ""


def _state(sweep: Sweep) -> dict[str, str]:
    """What Tune's files depend on."""
    return {"version of Ray": ray.__version__, "folder": str(sweep.folder.path)}


def _state_file(sweep: Sweep) -> Path:
    return sweep.folder.ray / "state.json"


def _summary(sweep: Sweep, total: int, *, stopped: bool, seconds: float) -> str:
    """The last line."""
    records = read_trials(sweep.folder)
    states = Counter(record.state for record in records)
    words = {
        TrialState.complete: "complete",
        TrialState.stopped: "stopped early",
        TrialState.failed: "failed",
        TrialState.interrupted: "interrupted",
    }
    counted = ", ".join(f"{states[state]} {word}" for state, word in words.items() if states[state])
    waiting = f", {total - len(records)} not begun" if total > len(records) else ""
    best = max((record for record in records if record.state is TrialState.complete), key=lambda record: record.ua or 0.0, default=None)
    found = f"; best {best.point.label}, validation UA {best.ua:.1f}" if best is not None and best.ua is not None else ""
    head = "sweep interrupted, the same command goes on" if stopped else "sweep ended"
    return f"{head} ({duration(seconds)}): {total} trials: {counted or 'none begun'}{waiting}{found}"


def _last_line(trial: Any) -> str:
    """What a trial's process died of, in one line."""
    with contextlib.suppress(Exception):
        return _one_line(str(trial.get_error() or "")) or "its process ended without a word"
    return "its process ended without a word"


def _one_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While the block lasts, Tune and Optuna say nothing by themselves: what a user is to know is told in lines of ours."""
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
