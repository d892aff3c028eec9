"""Which runs of a method are outliers: the only module that judges this. Pure.

`pooled`, the default: a run is out when it lies more than `sigmas` scales from the centre of its cell, above or below. The centre is the
median of the cell. The scale of a fold is `min(max(pooled, own), 2.5 * pooled)`: `own` is 1.4826 times the median distance from the centre
in the cell, `pooled` the same over all folds of the method. A fold whose seeds vary more than those of others so has a wider limit, and a
cell in which most runs collapsed cannot widen its limit beyond 2.5 times the pooled one. Both come from every run ever made, dropped ones
included, so that dropping a run narrows nothing. In each cell the smallest distance is left out of both: a centre is fitted to its own
runs, and with five of them one lies at distance zero by construction. If more than half of the pooled distances are zero, their median
carries no information about the rest, and `pooled` is 1.2533 times the mean distance; if all are zero, nothing is out.

`common`, the default of earlier versions: as `pooled`, with the pooled scale in every fold. Experiments launched with it keep it.

`cell`, the literal rule: further than `sigmas` sample standard deviations from the mean of the runs that fill the cell now. It cannot
fire in small cells (`check_rule`).

Numbers are taken in their shortest decimal form, so that runs equally far above and below a centre get the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from enum import Enum
from functools import lru_cache
from operator import itemgetter
from statistics import median
from typing import TYPE_CHECKING

from jobs.errors import UsageError
from jobs.statistics import mean, round_half_up, sd
from jobs.store.scores import UNWEIGHTED
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.experiment.config import OutlierRule


RunId = tuple[str, int, int]  # fold, slot, generation
MEDIAN_TO_SIGMA = Decimal("1.4826")  # of a normal distribution: sigma divided by the median distance from the centre
MEAN_TO_SIGMA = Decimal("1.2533")  # sigma divided by the mean distance
WIDEST = Decimal("2.5")  # scale of a fold at most, in pooled scales; chosen by simulation (docs/statistics.md)
_RULES = ("pooled", "common", "cell", "none")
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)  # differences of percentages are exact: a float has at most 17 digits


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run that has its result and did not diverge."""

    fold: str
    slot: int
    generation: int  # 0: the slot's first seed
    seed: int
    ua: float  # percent

    @property
    def run_id(self) -> RunId:
        return self.fold, self.slot, self.generation


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one run that fills a slot."""

    fold: str
    slot: int
    generation: int
    ua: float
    centre: float  # of its cell
    scale: float  # one sigma, in points of the score
    distance: float  # from the centre, in sigmas
    out: bool


@dataclass(frozen=True)
class Judgement:
    """One application of a rule to the runs that fill the slots of a method, in the order of folds, slots and generations."""

    rule: str
    sigmas: float
    verdicts: tuple[Verdict, ...]

    @property
    def out(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.out)


def judge(rule: OutlierRule | str, runs: Iterable[FinishedRun], current: Collection[RunId], sigmas: float) -> Judgement:
    """Judge the runs of one method that fill its slots now.

    `runs`: all runs ever finished that did not diverge, in any order; `current`: ids of those to judge. Raises ValueError if a run is there
    twice or missing, or its score is not finite: these are errors of the caller.
    """
    name = _name(rule)
    cells: dict[str, list[Decimal]] = {}
    judged: list[tuple[FinishedRun, Decimal]] = []
    seen: set[RunId] = set()
    for run_id, run in sorted(((each.run_id, each) for each in runs), key=itemgetter(0)):
        if run_id in seen or not math.isfinite(run.ua):
            raise ValueError(f"run {run_id} is there twice, or its score {run.ua} is not finite")
        seen.add(run_id)
        ua = _decimal(run.ua)
        cells.setdefault(run.fold, []).append(ua)
        if run_id in current:
            judged.append((run, ua))
    if len(judged) != len(set(current)):
        raise ValueError(f"to be judged, but not among the runs: {sorted(set(current) - seen)[:3]}")
    with localcontext(_EXACT):
        spreads = _cell_spreads([run for run, _ in judged]) if name == "cell" else _pooled_spreads(cells, common=name == "common")
        limits = {fold: None if name == "none" else _decimal(sigmas) * scale for fold, (_, scale) in spreads.items()}
        of_fold = {fold: (centre, scale, float(centre), float(scale), limits[fold]) for fold, (centre, scale) in spreads.items()}
        return Judgement(name, sigmas, tuple(_verdict(run, ua, *of_fold[run.fold]) for run, ua in judged))


def check_rule(rule: OutlierRule | str, seeds: int, sigmas: float) -> None:
    """UsageError for a rule that can never drop a run of a cell with so many seeds, or whose limit is not a positive number."""
    name = _name(rule)
    if not math.isfinite(sigmas) or sigmas <= 0:
        raise UsageError(f"policy.sigmas {sigmas}: give a number above 0, for example 2")
    furthest = (seeds - 1) / math.sqrt(seeds) if seeds > 0 else 0.0
    if name != "cell" or furthest > sigmas:
        return
    least = math.ceil(((sigmas + math.sqrt(sigmas * sigmas + 4)) / 2) ** 2)
    least += (least - 1) / math.sqrt(least) <= sigmas
    raise UsageError(
        f"outlier rule 'cell' can never drop a run of {counted(seeds, 'seed')}: no value lies further than (n-1)/sqrt(n) = "
        f"{round_half_up(furthest, 2)} standard deviations from the mean of its n, and the rule drops beyond {sigmas:g}; "
        f"use at least {least} seeds, or the rule pooled"
    )


def rule_in_words(rule: OutlierRule | str, sigmas: float, rounds: int) -> str:
    """The rule as tables print it, without a full stop: what is dropped, beyond which distance, in how many rounds."""
    name = _name(rule)
    if name == "none":
        return "none"
    times = f"judged in at most {counted(rounds, 'round')}"
    if name == "cell":
        return (
            f"cell: a run further than {sigmas:g} sample standard deviations from the mean of its cell (method and fold), above or below, "
            f"is dropped and its slot run again with another seed; {times}"
        )
    distance = "1.4826 times the median distance from the cell medians, pooled over folds, the smallest distance of each cell left out"
    if name == "pooled":
        sigma = (
            f"sigma of a fold is 1.4826 times the median distance in its cell, at least the pooled sigma and at most {WIDEST} times it; "
        )
        sigma += f"the pooled sigma is {distance}"
    else:
        sigma = f"sigma is {distance}; this is the rule pooled of earlier versions, with one sigma for all folds"
    return (
        f"{name}: a run further than {sigmas:g} sigmas from the median of its cell (method and fold), above or below, is dropped and its "
        f"slot run again with another seed; {sigma}; medians and sigmas from every run ever made; {times}"
    )


def verdict_in_words(rule: OutlierRule | str, verdict: Verdict, label: str = UNWEIGHTED.label) -> str:
    """`UA 25.0 lies 7.13 sigmas below the median 62.3 of its cell (sigma 5.2 of its fold)`."""
    side = "below" if verdict.ua < verdict.centre else "above"
    ua, centre, scale = (round_half_up(value) for value in (verdict.ua, verdict.centre, verdict.scale))
    distance = round_half_up(verdict.distance, 2)
    if _name(rule) == "cell":
        return f"{label} {ua} lies {distance} standard deviations {side} the mean {centre} of its cell (standard deviation {scale})"
    whose = ", pooled over folds" if _name(rule) == "common" else " of its fold"
    return f"{label} {ua} lies {distance} sigmas {side} the median {centre} of its cell (sigma {scale}{whose})"


def _name(rule: OutlierRule | str) -> str:
    name = rule if isinstance(rule, str) else str(rule.value) if isinstance(rule, Enum) else ""
    if name not in _RULES:
        raise UsageError(f"outlier rule {name!r}: known are {', '.join(_RULES)}")
    return name


def _pooled_spreads(cells: Mapping[str, Sequence[Decimal]], *, common: bool) -> dict[str, tuple[Decimal, Decimal]]:
    """Fold -> centre and scale. `common`: the pooled scale in every fold."""
    centres = {fold: median(values) for fold, values in cells.items()}
    distances = {fold: sorted(abs(value - centres[fold]) for value in values)[1:] for fold, values in cells.items()}
    together = [distance for of_fold in distances.values() for distance in of_fold]
    pooled = _sigma(together) or (MEAN_TO_SIGMA * sum(together, Decimal(0)) / len(together) if together else Decimal(0))
    if common:
        return {fold: (centre, pooled) for fold, centre in centres.items()}
    return {fold: (centre, min(max(pooled, _sigma(distances[fold])), WIDEST * pooled)) for fold, centre in centres.items()}


def _sigma(distances: Sequence[Decimal]) -> Decimal:
    return MEDIAN_TO_SIGMA * median(distances) if distances else Decimal(0)


def _cell_spreads(judged: Sequence[FinishedRun]) -> dict[str, tuple[Decimal, Decimal]]:
    """Fold -> mean and sample standard deviation of the runs that fill its slots."""
    cells: dict[str, list[float]] = {}
    for run in judged:
        cells.setdefault(run.fold, []).append(run.ua)
    return {fold: (Decimal(repr(mean(values) or 0.0)), Decimal(repr(sd(values) or 0.0))) for fold, values in cells.items()}


@lru_cache(maxsize=1 << 16)
def _decimal(number: float) -> Decimal:
    """The shortest decimal form of a number; cached, as each round judges the same runs again."""
    return Decimal(repr(float(number)))


def _verdict(
    run: FinishedRun, ua: Decimal, centre: Decimal, scale: Decimal, centre_shown: float, scale_shown: float, limit: Decimal | None
) -> Verdict:
    """The verdict on a run by centre and scale of its fold, exact and as floats. `limit`: largest distance; None: there is none."""
    distance = abs(ua - centre)
    return Verdict(
        run.fold,
        run.slot,
        run.generation,
        run.ua,
        centre_shown,
        scale_shown,
        float(distance / scale) if scale else 0.0,
        # A scale of zero: all runs are alike.
        limit is not None and bool(scale) and distance > limit,
    )
