"""The decisions of Ray Tune: which trials ASHA stops at a rung, and which points Optuna proposes next. Pure; no Ray is started.

Tune's scheduler and searcher are asked anew for every decision, with the results that it depends on, and keep nothing in between. A
decision is therefore the same in every process, and does not depend on the order in which results arrived.
"""

from __future__ import annotations

import contextlib
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from jobs.experiment.graph import canonical_json
from jobs.experiment.sweep_section import Stopping, SweepSettings
from jobs.sweeps.records import Proposal
from jobs.sweeps.space import Range, Space, decode, parameters, random_points

FOLDS, OBJECTIVE = "folds", "validation_ua"  # keys of a result: number of folds, and mean over them in percent
ASKS = 20  # attempts to get a new point from Optuna before one is drawn at random
STARTUP_TRIALS = 10  # at most so many random trials before the sampler models results
BATCH = 4  # points that Optuna proposes together, unless configured


@dataclass(frozen=True)
class Evaluated:
    """What is reported of a trial to Optuna. `means`: the objective after each fold; () if it has failed."""

    means: tuple[float, ...]
    complete: bool


def rungs(settings: SweepSettings, folds: int) -> tuple[int, ...]:
    """Numbers of folds after which ASHA stops trials, ascending; () if it stops none."""
    if settings.stopping is Stopping.none:
        return ()
    found, rung = [], settings.grace_folds
    while rung < folds:
        found.append(rung)
        rung *= settings.reduction
    return tuple(found)


def survivors(values: Mapping[str, float], former: Sequence[float], rung: int, folds: int, settings: SweepSettings) -> frozenset[str]:
    """The trials of a batch that ASHA continues after a rung.

    `values`: trial -> mean over the first `rung` folds, percent. `former`: such means of trials of earlier batches. Each trial is judged as
    if it were the last to arrive: against all others.
    """
    ranked = sorted(values.items(), key=lambda item: (item[1], item[0]))
    means = [value for _, value in ranked]

    def continues(index: int) -> bool:
        return _asha_continues(means[index], [*former, *means[:index], *means[index + 1 :]], rung, folds, settings)

    # A higher mean continues wherever a lower one does, so that a binary search finds the first.
    return frozenset(name for name, _ in ranked[bisect_left(range(len(ranked)), True, key=continues) :])


def _asha_continues(value: float, others: Sequence[float], rung: int, folds: int, settings: SweepSettings) -> bool:
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    scheduler = ASHAScheduler(
        time_attr=FOLDS,
        metric=OBJECTIVE,
        mode="max",
        max_t=folds,
        grace_period=settings.grace_folds,
        reduction_factor=settings.reduction,
    )
    decision = TrialScheduler.CONTINUE
    for number, mean in enumerate((*others, value)):
        trial = SimpleNamespace(trial_id=str(number))  # all that the scheduler reads of a trial
        scheduler.on_trial_add(None, trial)
        decision = scheduler.on_trial_result(None, trial, {FOLDS: rung, OBJECTIVE: mean})
    return bool(decision == TrialScheduler.CONTINUE)


def propose(
    space: Space, settings: SweepSettings, batches: Sequence[Sequence[Proposal]], results: Sequence[Sequence[Evaluated]]
) -> tuple[Proposal, ...]:
    """Optuna's next points, after the trials of all earlier batches have ended; () if there are enough. None is proposed twice.

    Different parameters can decode to the same point; then another sample is drawn. A trial that ASHA has stopped counts as
    pruned: worse than trials with more folds, whatever its mean.
    """
    known = {each.point: result for batch, of in zip(batches, results, strict=True) for each, result in zip(batch, of, strict=True)}
    missing = min(settings.trials, space.size) - len(known)
    size = int(min(missing, settings.at_once or BATCH))
    if size <= 0:
        return ()
    with warnings.catch_warnings(action="ignore"):  # experimental features
        search = _searcher(space, settings, len(known))
        for proposal, result in ((each, known[each.point]) for batch in batches for each in batch):
            _report(search, proposal, result)
        found: list[Proposal] = []
        for ask in range(ASKS * size):
            asked = search.suggest(str(ask))
            point = decode(space, {name: _plain(space, name, value) for name, value in asked.items()})
            if point not in known:
                known[point] = Evaluated((), complete=False)
                found.append(Proposal(asked, point))
                if len(found) == size:
                    return tuple(found)
            # A sample of a known point stays open: for the sampler it is as bad as the worst (constant liar), so that it turns elsewhere.
    drawn = random_points(space, len(known) + size, settings.seed)
    found.extend(Proposal({}, point) for point in drawn if point not in known)
    return tuple(found[:size])


def _searcher(space: Space, settings: SweepSettings, tried: int) -> Any:
    """Optuna's tree-structured Parzen estimator. The seed differs between batches, as each has a new sampler."""
    from optuna import logging
    from optuna.samplers import TPESampler
    from ray.tune.search.optuna import OptunaSearch

    logging.set_verbosity(logging.ERROR)
    startup = max(2, min(STARTUP_TRIALS, settings.trials // 4))
    seed = (settings.seed + tried) % 2**32
    sampler = TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
    return OptunaSearch(distributions(space), metric=OBJECTIVE, mode="max", sampler=sampler)


def _report(search: Any, proposal: Proposal, result: Evaluated) -> None:
    if proposal.parameters and result.means:
        value = result.means[-1] if result.complete else None
        with contextlib.suppress(ValueError):  # parameters on record that do not fit the space: the sampler does without them
            search.add_evaluated_point(dict(proposal.parameters), value, pruned=not result.complete, intermediate_values=list(result.means))


def distributions(space: Space) -> dict[str, Any]:
    """`parameters` as Optuna distributions; choices as JSON texts, as Optuna supports only plain values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for name, asked in parameters(space).items():
        if not isinstance(asked, Range):
            found[name] = CategoricalDistribution(tuple(map(canonical_json, asked)))
        elif asked.whole:
            found[name] = IntDistribution(int(asked.low), int(asked.high), log=asked.log)
        else:
            found[name] = FloatDistribution(float(asked.low), float(asked.high), log=asked.log)
    return found


def _plain(space: Space, name: str, value: Any) -> Any:
    """A value of `distributions` as a value of `parameters`."""
    asked = parameters(space)[name]
    return value if isinstance(asked, Range) else {canonical_json(each): each for each in asked}[value]
