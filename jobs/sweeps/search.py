"""Search algorithms and schedulers for Ray Tune: Optuna without repeated points, ASHA that survives a restart."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch

from jobs.experiment.graph import canonical_json
from jobs.experiment.sweep_section import Stopping, SweepSettings
from jobs.sweeps.records import read_trial, running_means
from jobs.sweeps.space import Point, Range, Space, decode, parameters, random_points
from jobs.sweeps.trainable import FOLDER, FOLDS, OBJECTIVE, POINT, folder_of, point_of, point_text

ASKS = 50  # attempts to get a new point from Optuna before one is drawn at random
STARTUP_TRIALS = 10  # at most so many random trials before the sampler models results


class DistinctOptuna(OptunaSearch):  # type: ignore[misc]  # Ray has no types
    """Optuna's tree-structured Parzen estimator, without repeated points.

    Different samples can decode to the same point. A sample of a completed point is reported to Optuna with the known value, and the
    next one is drawn. Trials stopped by ASHA count as pruned: worse than trials with more folds, whatever the mean of their folds.
    """

    def __init__(self, space: Space, folder: Path, settings: SweepSettings, folds: int) -> None:
        from optuna.samplers import TPESampler

        startup = max(2, min(STARTUP_TRIALS, settings.trials // 4))
        with _no_warnings():
            sampler = TPESampler(seed=settings.seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
        self._points, self._folder, self._folds, self._draw_seed = space, str(folder), folds, settings.seed
        self._texts = {name: _by_text(asked) for name, asked in parameters(space).items() if not isinstance(asked, Range)}
        self._of_trial: dict[str, str] = {}  # trial -> name of its point
        self._values: dict[str, float | None] = {}  # name of a point -> its value if complete
        super().__init__(distributions(space), metric=OBJECTIVE, mode="max", sampler=sampler)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The configuration of a new point; FINISHED if there is none."""
        point = self._asked(trial_id) or self._drawn()
        if point is None:
            return str(Searcher.FINISHED)
        self._of_trial[trial_id] = point.name
        self._values[point.name] = None
        return {FOLDER: self._folder, POINT: point_text(point)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._ot_trials and OBJECTIVE in result:
            with _no_warnings():
                super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        known = result is not None and OBJECTIVE in result
        complete = known and result is not None and int(result[FOLDS]) >= self._folds
        if complete and result is not None and trial_id in self._of_trial:
            self._values[self._of_trial[trial_id]] = float(result[OBJECTIVE])
        if trial_id not in self._ot_trials or trial_id in self._completed_trials:
            return
        if known and not complete and result is not None:
            self.on_trial_result(trial_id, result)  # Tune does not pass the last result on
        super().on_trial_complete(trial_id, result if complete else None, error or not known)

    def _asked(self, trial_id: str) -> Point | None:
        from optuna.trial import TrialState

        for _ in range(ASKS):
            with _no_warnings():
                found = super().suggest(trial_id)
            values = {name: self._texts[name][value] if name in self._texts else value for name, value in found.items()}
            point = decode(self._points, values)
            if point.name not in self._values:
                return point
            asked, value = self._ot_trials.pop(trial_id), self._values[point.name]
            self._ot_study.tell(asked, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)
        return None

    def _drawn(self) -> Point | None:
        """A random new point."""
        points = random_points(self._points, len(self._values) + 1, self._draw_seed)
        return next((point for point in points if point.name not in self._values), None)


def distributions(space: Space) -> dict[str, Any]:
    """`parameters` as Optuna distributions; choices as JSON texts, as Optuna supports only plain values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for name, asked in parameters(space).items():
        if not isinstance(asked, Range):
            found[name] = CategoricalDistribution(tuple(_by_text(asked)))
        elif asked.whole:
            found[name] = IntDistribution(int(asked.low), int(asked.high), log=asked.log)
        else:
            found[name] = FloatDistribution(float(asked.low), float(asked.high), log=asked.log)
    return found


class _Adjusting:
    """Sets the number of concurrent trials to `at_once` whenever a trial is added, as the machines may have changed since a restart."""

    at_once = 0  # a class attribute, as Tune restores instances with the values of the first launch

    def adjust(self, search_alg: Any) -> None:
        searcher = getattr(search_alg, "searcher", None)
        limiter = searcher if isinstance(searcher, ConcurrencyLimiter) else search_alg
        if _Adjusting.at_once and hasattr(limiter, "max_concurrent"):
            limiter.max_concurrent = _Adjusting.at_once


class InTurn(_Adjusting, FIFOScheduler):  # type: ignore[misc]
    """FIFO: every trial is completed."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.adjust(tune_controller.search_alg)
        super().on_trial_add(tune_controller, trial)


class RememberingAsha(_Adjusting, ASHAScheduler):  # type: ignore[misc]
    """ASHA that fills its rungs from the records of the sweep: Tune does not restore them, and would stop no trial."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.adjust(tune_controller.search_alg)
        super().on_trial_add(tune_controller, trial)
        record = read_trial(folder_of(trial.config), point_of(trial.config).name)
        means = running_means(record.folds) if record else ()
        for milestone, reached in self._trial_info[trial.trial_id]._rungs:
            if milestone <= len(means):
                reached[trial.trial_id] = means[int(milestone) - 1]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide at every rung, also if the rung was filled from the record: the former decision may have been lost."""
        for milestone, reached in self._trial_info[trial.trial_id]._rungs:
            if milestone == result.get(FOLDS):
                reached.pop(trial.trial_id, None)
        return str(super().on_trial_result(tune_controller, trial, result))


def scheduler_of(settings: SweepSettings, folds: int, at_once: int) -> Any:
    """The Tune scheduler that stops trials early; its unit of time is a fold."""
    set_concurrency(at_once)
    if settings.stopping is Stopping.none:
        return InTurn()
    return RememberingAsha(time_attr=FOLDS, max_t=folds, grace_period=min(settings.grace_folds, folds), reduction_factor=settings.reduction)


def set_concurrency(at_once: int) -> None:
    """Set the number of concurrent trials of the sweep that this process runs."""
    _Adjusting.at_once = at_once


def _by_text(values: tuple[Any, ...]) -> dict[str, Any]:
    return {canonical_json(value): value for value in values}


def _no_warnings() -> warnings.catch_warnings[Any]:
    """Suppresses warnings on experimental features, and on results that are reported again after a restart."""
    return warnings.catch_warnings(action="ignore")
