"""From runs to the numbers of a table, and the stable JSON that programs read. Pure.

Conventions, which every caption repeats: UA in percent. A cell's mean and sd are over its accepted runs (seeds, sample
sd). A method's mean is the mean of its cell means, every fold with the same weight. A method's sd and 95 % interval are
over slots: each slot that is accepted in every fold gives one mean over folds. They speak of fine-tuning seeds on these
folds, not of new speakers. Methods are compared over the (fold, slot) pairs accepted in both, and over fold means.

Over all runs, dropped ones included: a cell's mean and sd are over its runs; a method's mean is the mean of these, and its sd
is over slots as above, where a slot of several runs counts by their mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Run
from jobs.statistics import Interval, PairedTest, mean, paired_test, percent, sd, t_interval
from jobs.store.records import Result
from jobs.store.scores import confusion_of

SCHEMA = 1


class Status(Enum):
    """Where a run of a table stands."""

    accepted = "accepted"
    outlier = "outlier"  # dropped by the outlier rule
    diverged = "diverged"  # dropped: training went wrong by a test fixed in advance
    failed = "failed"
    pending = "pending"
    running = "running"


DROPPED = (Status.outlier, Status.diverged)


@dataclass(frozen=True)
class Scores:
    """What one run reports, in percent."""

    ua: float
    wa: float | None = None  # None: not told, by results from elsewhere
    macro_f1: float | None = None


@dataclass(frozen=True)
class Entry:
    """One run as a table sees it: one row of `runs.csv`. A slot has several where a run was dropped and rerun."""

    corpus: str
    method: str
    fold: str
    slot: int
    seed: int
    scores: Scores | None
    status: Status

    @property
    def name(self) -> str:
        return f"{self.method}/{self.fold}/{self.slot}"


@dataclass(frozen=True)
class CellSummary:
    """One method on one fold."""

    fold: str
    mean_ua: float | None
    sd_ua: float | None
    mean_ua_all_runs: float | None  # dropped runs included
    sd_ua_all_runs: float | None
    interval: Interval | None
    n: int  # accepted runs
    slots: int  # runs the cell should have
    runs: tuple[Entry, ...]  # by slot; of a slot, those that were dropped first, in the order of their seeds

    @property
    def complete(self) -> bool:
        return self.n == self.slots > 0


@dataclass(frozen=True)
class Dropped:
    """Runs that count in no mean but that over all runs."""

    runs: int = 0
    rerun: int = 0  # of them, those whose slot has another run, finished or not


@dataclass(frozen=True)
class MethodSummary:
    """One method over all folds of one corpus."""

    method: str
    corpus: str
    mean_ua: float | None
    sd_ua: float | None
    interval: Interval | None  # None while incomplete
    mean_ua_all_runs: float | None  # dropped runs included
    sd_ua_all_runs: float | None
    n: int
    outliers: Dropped
    diverged: Dropped
    unresolved: int  # runs that are still out and stay in the mean
    cells: tuple[CellSummary, ...]

    @property
    def dropped(self) -> int:
        return self.outliers.runs + self.diverged.runs

    @property
    def rerun(self) -> int:
        return self.outliers.rerun + self.diverged.rerun

    @property
    def complete(self) -> bool:
        return bool(self.cells) and all(cell.complete for cell in self.cells)


@dataclass(frozen=True)
class Comparison:
    """`second - first`, in points of UA, on one corpus."""

    corpus: str
    first: str
    second: str
    over_pairs: PairedTest  # (fold, slot) pairs accepted in both
    over_folds: PairedTest  # cell means of folds that both have: fewer values, but what a new speaker would vary


@dataclass(frozen=True)
class CodeFacts:
    """What computed the runs: every value found among their records, sorted."""

    commits: tuple[str, ...] = ()
    modified: bool = False  # some run came from a tree with uncommitted changes
    packages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Everything a table prints of one experiment."""

    experiment: str
    methods: tuple[MethodSummary, ...]
    comparisons: tuple[Comparison, ...]
    outlier_rule: str  # in words; `none` where none was applied
    code: CodeFacts

    @property
    def complete(self) -> bool:
        return bool(self.methods) and all(method.complete for method in self.methods)

    @property
    def missing(self) -> tuple[Entry, ...]:
        """The last run of every slot that has no accepted one."""
        found: list[Entry] = []
        for cell in (cell for method in self.methods for cell in method.cells):
            filled = _accepted(cell.runs)
            found.extend({entry.slot: entry for entry in cell.runs if entry.slot not in filled}.values())
        return tuple(found)


def entries_of(graph: Graph, results: Mapping[str, Result], states: Mapping[str, str]) -> tuple[Entry, ...]:
    """One entry per run of a graph, those that were dropped ahead of the one that fills their slot now.

    `results` maps stage keys to results; `states` maps the keys of runs without one to a name of `Status` (absent: pending).
    A dropped run diverged where its result says so or where it has none, else it was an outlier.
    Raises UsageError for a result without usable scores.
    """
    dropped: dict[tuple[str, str, int], list[Run]] = {}
    for run in graph.superseded:
        dropped.setdefault((run.method, run.fold, run.slot), []).append(run)
    found: list[Entry] = []
    for run in graph.runs:
        before = sorted(dropped.get((run.method, run.fold, run.slot), ()), key=lambda each: each.generation)
        found.extend(_dropped_entry(graph.corpus, each, results.get(each.key)) for each in before)
        found.append(_entry(graph.corpus, run, results.get(run.key), states.get(run.key, Status.pending.value)))
    return tuple(found)


def code_facts(results: Iterable[Result]) -> CodeFacts:
    """Commits and versions in the provenance of results (keys `commit`, `dirty`, `python`, `packages`; the unknown is left out)."""
    commits: set[str] = set()
    modified = False
    packages: dict[str, set[str]] = {}
    for result in results:
        commit = result.provenance.get("commit")
        if isinstance(commit, str) and commit:
            commits.add(commit)
        modified = modified or bool(result.provenance.get("dirty"))
        stated = result.provenance.get("packages")
        versions = {"python": result.provenance.get("python"), **(stated if isinstance(stated, Mapping) else {})}
        for name, version in versions.items():
            if isinstance(version, str) and version:
                packages.setdefault(str(name), set()).add(version)
    return CodeFacts(tuple(sorted(commits)), modified, {name: tuple(sorted(found)) for name, found in sorted(packages.items())})


def summarise(
    entries: Sequence[Entry],
    *,
    experiment: str,
    slots: int | None = None,
    outlier_rule: str = "none",
    unresolved: Mapping[tuple[str, str], int] | None = None,
    code: CodeFacts | None = None,
) -> Summary:
    """The numbers of an experiment; corpora, methods and folds in the order in which the entries name them.

    `slots`: runs every cell should have (None: the slots its entries name). `unresolved`: (corpus, method) -> runs that are
    still out after the last round of judgement. Raises UsageError when one slot has two accepted runs.
    """
    grouped: dict[str, dict[str, dict[str, list[Entry]]]] = {}
    for entry in entries:
        grouped.setdefault(entry.corpus, {}).setdefault(entry.method, {}).setdefault(entry.fold, []).append(entry)
    methods: list[MethodSummary] = []
    comparisons: list[Comparison] = []
    for corpus, by_method in grouped.items():
        folds = list(dict.fromkeys(fold for by_fold in by_method.values() for fold in by_fold))
        found = [
            _method(
                corpus, method, [_cell(fold, by_fold.get(fold, []), slots) for fold in folds], (unresolved or {}).get((corpus, method), 0)
            )
            for method, by_fold in by_method.items()
        ]
        methods.extend(found)
        comparisons.extend(_compare(corpus, first, second) for first, second in itertools.combinations(found, 2))
    return Summary(experiment, tuple(methods), tuple(comparisons), outlier_rule, code or CodeFacts())


def to_json(summary: Summary, published: object = None) -> dict[str, Any]:
    """The stable JSON of an experiment (schema 1): keys are only ever added. UA in percent, not rounded."""
    return {
        "schema": SCHEMA,
        "experiment": summary.experiment,
        "complete": summary.complete,
        "methods": [_method_json(method) for method in summary.methods],
        "comparisons": [_comparison_json(comparison) for comparison in summary.comparisons],
        "outlier_rule": summary.outlier_rule,
        "code": {
            "commits": list(summary.code.commits),
            "modified": summary.code.modified,
            "packages": {name: list(versions) for name, versions in summary.code.packages.items()},
        },
        "published": published,
    }


def _entry(corpus: str, run: Run, result: Result | None, state: str) -> Entry:
    if result is None:
        return Entry(corpus, run.method, run.fold, run.slot, run.seed, None, Status(state))
    if result.diverged:
        return _dropped_entry(corpus, run, result)  # without a seed left for another run
    return Entry(corpus, run.method, run.fold, run.slot, run.seed, _scores(run, result), Status.accepted)


def _dropped_entry(corpus: str, run: Run, result: Result | None) -> Entry:
    if result is None:
        return Entry(corpus, run.method, run.fold, run.slot, run.seed, None, Status.diverged)
    if not result.diverged:
        return Entry(corpus, run.method, run.fold, run.slot, run.seed, _scores(run, result), Status.outlier)
    try:
        scores = _scores(run, result)
    except UsageError:  # what went wrong may have left none
        scores = None
    return Entry(corpus, run.method, run.fold, run.slot, run.seed, scores, Status.diverged)


def _scores(run: Run, result: Result) -> Scores:
    """From the confusion matrix, exactly; from `metrics` (fractions in [0, 1]) where a stage reports none."""
    confusion = confusion_of(result)
    if confusion is not None:
        return Scores(confusion.ua, confusion.wa, confusion.macro_f1)
    values = [result.metrics.get(name) for name in ("ua", "wa", "macro_f1")]
    shares = [value for value in values if isinstance(value, int | float) and 0 <= value <= 1]  # NaN is in no range
    if len(shares) != len(values):
        raise UsageError(
            f"result of run {run.name} ({result.stage}/{result.key}) has no confusion matrix and no ua, wa, macro_f1 "
            "between 0 and 1: delete its result.json and launch again"
        )
    return Scores(*(percent(share) for share in shares))


def _accepted(entries: Iterable[Entry]) -> dict[int, float]:
    """Slot -> UA of its accepted run."""
    found: dict[int, float] = {}
    for entry in entries:
        if entry.status is Status.accepted and entry.scores is not None:
            if entry.slot in found:
                raise UsageError(
                    f"run {entry.name} of corpus {entry.corpus} is accepted twice: keep one row per corpus, method, fold and slot"
                )
            found[entry.slot] = entry.scores.ua
    return dict(sorted(found.items()))


def _cell(fold: str, entries: Sequence[Entry], slots: int | None) -> CellSummary:
    values = list(_accepted(entries).values())
    every = _every(entries)
    return CellSummary(
        fold=fold,
        mean_ua=mean(values),
        sd_ua=sd(values),
        mean_ua_all_runs=mean(every),
        sd_ua_all_runs=sd(every),
        interval=t_interval(values),
        n=len(values),
        slots=len({entry.slot for entry in entries}) if slots is None else slots,
        runs=tuple(sorted(entries, key=lambda entry: (entry.slot, entry.status not in DROPPED))),
    )


def _method(corpus: str, method: str, cells: Sequence[CellSummary], unresolved: int) -> MethodSummary:
    means = [cell.mean_ua for cell in cells if cell.mean_ua is not None]
    by_slot = _slot_means([_accepted(cell.runs) for cell in cells])
    all_means = [cell.mean_ua_all_runs for cell in cells if cell.mean_ua_all_runs is not None]
    return MethodSummary(
        method=method,
        corpus=corpus,
        mean_ua=mean(means),
        sd_ua=sd(by_slot),
        interval=t_interval(by_slot) if all(cell.complete for cell in cells) else None,
        mean_ua_all_runs=mean(all_means),
        sd_ua_all_runs=sd(_slot_means([_all_by_slot(cell.runs) for cell in cells])),
        n=sum(cell.n for cell in cells),
        outliers=_dropped(cells, Status.outlier),
        diverged=_dropped(cells, Status.diverged),
        unresolved=unresolved,
        cells=tuple(cells),
    )


def _slot_means(by_fold: Sequence[Mapping[int, float]]) -> list[float]:
    """One mean over folds for every slot that all folds have."""
    shared = [slot for slot in (by_fold[0] if by_fold else {}) if all(slot in found for found in by_fold)]
    return [value for value in (mean([found[slot] for found in by_fold]) for slot in shared) if value is not None]


def _every(entries: Iterable[Entry]) -> list[float]:
    return [entry.scores.ua for entry in entries if entry.scores is not None]


def _all_by_slot(entries: Iterable[Entry]) -> dict[int, float]:
    """Slot -> mean UA of all its runs."""
    found: dict[int, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.slot, []).append(entry)
    return {slot: value for slot, runs in found.items() if (value := mean(_every(runs))) is not None}


def _dropped(cells: Iterable[CellSummary], status: Status) -> Dropped:
    """How many runs were dropped for a reason. In the order of a cell's runs another one follows those that were run again."""
    runs, rerun = 0, 0
    for cell in cells:
        last = {entry.slot: place for place, entry in enumerate(cell.runs)}
        places = [place for place, entry in enumerate(cell.runs) if entry.status is status]
        runs += len(places)
        rerun += sum(place < last[cell.runs[place].slot] for place in places)
    return Dropped(runs, rerun)


def _compare(corpus: str, first: MethodSummary, second: MethodSummary) -> Comparison:
    left: list[float] = []
    right: list[float] = []
    left_means: list[float] = []
    right_means: list[float] = []
    for one, other in zip(first.cells, second.cells, strict=True):
        before, after = _accepted(one.runs), _accepted(other.runs)
        for slot in before.keys() & after.keys():
            left.append(before[slot])
            right.append(after[slot])
        if one.mean_ua is not None and other.mean_ua is not None:
            left_means.append(one.mean_ua)
            right_means.append(other.mean_ua)
    return Comparison(corpus, first.method, second.method, paired_test(left, right), paired_test(left_means, right_means))


def _interval_json(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _method_json(method: MethodSummary) -> dict[str, Any]:
    return {
        "method": method.method,
        "corpus": method.corpus,
        "mean_ua": method.mean_ua,
        "sd_ua": method.sd_ua,
        "mean_ua_all_runs": method.mean_ua_all_runs,
        "n": method.n,
        "dropped": method.dropped,
        "rerun": method.rerun,
        "unresolved": method.unresolved,
        "cells": [_cell_json(cell) for cell in method.cells],
        "complete": method.complete,
        "interval_95": _interval_json(method.interval),
        "sd_ua_all_runs": method.sd_ua_all_runs,
        "outliers": {"dropped": method.outliers.runs, "rerun": method.outliers.rerun},
        "diverged": {"dropped": method.diverged.runs, "rerun": method.diverged.rerun},
    }


def _cell_json(cell: CellSummary) -> dict[str, Any]:
    return {
        "fold": cell.fold,
        "mean_ua": cell.mean_ua,
        "sd_ua": cell.sd_ua,
        "runs": [_run_json(entry) for entry in cell.runs],
        "n": cell.n,
        "slots": cell.slots,
        "complete": cell.complete,
        "interval_95": _interval_json(cell.interval),
        "mean_ua_all_runs": cell.mean_ua_all_runs,
        "sd_ua_all_runs": cell.sd_ua_all_runs,
    }


def _run_json(entry: Entry) -> dict[str, Any]:
    scores = {"ua": None, "wa": None, "macro_f1": None} if entry.scores is None else asdict(entry.scores)
    return {"slot": entry.slot, "seed": entry.seed, **scores, "status": entry.status.value}


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "corpus": comparison.corpus,
        "first": comparison.first,
        "second": comparison.second,
        "over_pairs": _test_json(comparison.over_pairs),
        "over_folds": _test_json(comparison.over_folds),
    }


def _test_json(test: PairedTest) -> dict[str, Any]:
    return {
        "pairs": test.pairs,
        "mean_difference": test.mean,
        "interval_95": _interval_json(test.interval),
        "t_p": test.t_p,
        "wilcoxon_p": test.wilcoxon_p,
    }
