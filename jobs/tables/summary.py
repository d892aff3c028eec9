"""The numbers of a table, computed from runs. Pure.

Conventions, repeated in every caption: scores in the unit of the registry, UA in percent by default. A cell's mean and
sample sd are over its accepted runs (seeds). A method's mean is the mean of its cell means, every fold with the same
weight. A method's sd and 95 % interval are over slots: each slot that is accepted in every fold gives one mean over
folds. They measure the variance between seeds, not between test data; the interval over folds and seeds
(`jobs.statistics.crossed_mean`) measures both. Methods are compared over the (fold, slot) pairs accepted in both, over
fold means, and over folds and seeds together.

`..._all_runs` include dropped runs: a cell's mean and sd are over all its runs, a method's mean is the mean of these, and its
sd is over slots as above, where a slot with several runs counts with their mean.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from jobs import PACKAGE
from jobs.errors import UsageError
from jobs.experiment.recipes import MethodRecipe, comparable
from jobs.statistics import (
    CrossedMean,
    Interval,
    PairedTest,
    crossed_mean,
    differences_by_key,
    holm,
    known,
    mean,
    paired_by_key,
    sd,
    slot_means,
    t_interval,
)
from jobs.store.records import Result
from jobs.store.scores import RECORDED, UNWEIGHTED, Score, Terms
from jobs.tables.arithmetic import Arithmetic
from jobs.tables.measured import Measured
from jobs.tables.sizes import ModelSize, common_size

if TYPE_CHECKING:
    from jobs.control.outliers import Verdict
    from jobs.tables.metrics import FurtherMetric

VERDICT = ("out", "centre", "scale", "distance")  # of a run, in JSON and CSV


class Status(Enum):
    """State of a run in a table."""

    accepted = "accepted"
    outlier = "outlier"  # dropped by the outlier rule
    diverged = "diverged"  # dropped: training diverged or did not learn
    failed = "failed"
    cancelled = "cancelled"  # by the user
    pending = "pending"
    running = "running"


DROPPED = (Status.outlier, Status.diverged)


class Unreplaced(Enum):
    """What becomes of an outlier that no other run replaces."""

    keep = "keep"  # it stays in the means
    drop = "drop"  # it is left out, as if it had been replaced


@dataclass(frozen=True)
class Scores:
    """Scores of one run."""

    ua: float  # the score of its registry; UA in percent by default
    wa: float | None = None  # None: not given in a CSV file
    macro_f1: float | None = None


@dataclass(frozen=True)
class Entry:
    """One run: one row of `runs.csv`. A slot has several if a run was dropped and rerun."""

    corpus: str
    method: str
    fold: str
    slot: int
    seed: int
    scores: Scores | None
    status: Status
    verdict: Verdict | None = None  # the last one of the outlier rule; None: not judged
    unreplaced: bool = False  # an outlier that no other run replaces
    size: ModelSize | None = None  # None: not on record

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
    left_out: int  # outliers that no other run replaces and that are in no mean
    slots: int  # runs the cell should have; 0: the experiment has no such cell
    runs: tuple[Entry, ...]  # by slot; of a slot, those that were dropped first, in the order of their seeds

    @property
    def complete(self) -> bool:
        return self.n + self.left_out == self.slots

    @property
    def dropped(self) -> int:
        return sum(entry.status in DROPPED for entry in self.runs)


@dataclass(frozen=True)
class Dropped:
    """Runs that are excluded from all means except those over all runs."""

    runs: int = 0
    rerun: int = 0  # of them, those whose slot has a later run, finished or not


@dataclass(frozen=True)
class MethodSummary:
    """One method over all folds of one corpus."""

    method: str
    corpus: str
    mean_ua: float | None
    sd_ua: float | None
    interval: Interval | None  # over slots; None while incomplete
    crossed: CrossedMean | None  # over folds and seeds; None while incomplete
    mean_ua_all_runs: float | None  # dropped runs included
    sd_ua_all_runs: float | None
    n: int
    outliers: Dropped
    diverged: Dropped
    unresolved: int  # outliers that were not replaced
    cells: tuple[CellSummary, ...]
    size: ModelSize | None = None  # of the runs that have it on record; None if none has

    @property
    def dropped(self) -> int:
        return self.outliers.runs + self.diverged.runs

    @property
    def rerun(self) -> int:
        return self.outliers.rerun + self.diverged.rerun

    @property
    def complete(self) -> bool:
        return bool(self.planned) and all(cell.complete for cell in self.cells)

    @property
    def planned(self) -> tuple[CellSummary, ...]:
        """The cells that the experiment has."""
        return tuple(cell for cell in self.cells if cell.slots)

    @property
    def folds(self) -> tuple[str, ...]:
        """Those that its mean is over once it is complete."""
        return tuple(cell.fold for cell in self.planned)


@dataclass(frozen=True)
class Corrected:
    """The p-values of a comparison after Holm's correction for all comparisons on its corpus, test by test."""

    pairs_t: float | None = None
    pairs_wilcoxon: float | None = None
    folds_t: float | None = None
    crossed: float | None = None


@dataclass(frozen=True)
class Comparison:
    """`second - first`, in points of the score, on one corpus."""

    corpus: str
    first: str
    second: str
    over_pairs: PairedTest  # (fold, slot) pairs accepted in both
    over_folds: PairedTest  # cell means of folds that both have: fewer values, but they vary with the test data
    crossed: CrossedMean | None  # of the differences, over folds and seeds together
    corrected: Corrected = Corrected()


@dataclass(frozen=True)
class CodeFacts:
    """Commits, package versions and initial weights of the runs, sorted."""

    commits: tuple[str, ...] = ()
    modified: bool = False  # a run was computed with uncommitted changes
    packages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        packages = {name: list(versions) for name, versions in self.packages.items()}
        return {"commits": list(self.commits), "modified": self.modified, "packages": packages, "weights": list(self.weights)}


@dataclass(frozen=True)
class Summary:
    """All numbers of the tables of one experiment."""

    experiment: str
    methods: tuple[MethodSummary, ...]
    comparisons: tuple[Comparison, ...]
    outlier_rule: str  # description; `none` if none was applied
    code: CodeFacts
    recipes: tuple[MethodRecipe, ...] = ()  # of each method; empty if not known
    unreplaced: Unreplaced = Unreplaced.keep
    arithmetic: Arithmetic = field(default_factory=Arithmetic)  # not known of runs from a CSV file
    measured: tuple[Measured, ...] = ()  # of runs without a score
    further: tuple[FurtherMetric, ...] = ()  # metrics of runs beside the score
    score: Score = UNWEIGHTED  # of the runs: what `ua` in the names of fields stands for
    terms: Terms = RECORDED  # of the registry, for captions
    corpus_captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # corpus -> sentences that captions state of it

    @property
    def complete(self) -> bool:
        parts = [*(method.complete for method in self.methods), *(each.metrics is not None for each in self.measured)]
        return bool(parts) and all(parts)

    @property
    def finished(self) -> int:
        """Runs in the means, and runs that measured a corpus."""
        return sum(method.n for method in self.methods) + sum(each.metrics is not None for each in self.measured)

    @property
    def missing(self) -> tuple[Entry, ...]:
        """The last run of every slot that has neither an accepted run nor an outlier that is left out; of a cell without runs, all."""
        found: list[Entry] = []
        for method, cell in ((each, cell) for each in self.methods for cell in each.cells):
            filled = {*accepted(cell.runs), *_left_out(cell.runs)}
            found.extend({entry.slot: entry for entry in cell.runs if entry.slot not in filled}.values())
            if not cell.runs:
                slots = range(cell.slots)
                found.extend(Entry(method.corpus, method.method, cell.fold, slot, slot, None, Status.pending) for slot in slots)
        return tuple(found)


def code_facts(results: Iterable[Result]) -> CodeFacts:
    """Facts in the provenance of results (`commit`, `dirty`, `python`, `packages`, `runtime.weights`; missing ones are ignored).

    The `version` of code without a commit is among those of packages.
    """
    commits: set[str] = set()
    modified = False
    packages: dict[str, set[str]] = {}
    weights: set[str] = set()
    for result in results:
        commit = result.provenance.get("commit")
        if isinstance(commit, str) and commit:
            commits.add(commit)
        modified = modified or bool(result.provenance.get("dirty"))
        stated = result.provenance.get("packages")
        own = {} if commit else {PACKAGE: result.provenance.get("version")}
        versions = {"python": result.provenance.get("python"), **own, **(stated if isinstance(stated, Mapping) else {})}
        for name, version in versions.items():
            if isinstance(version, str) and version:
                packages.setdefault(str(name), set()).add(version)
        runtime = result.provenance.get("runtime")
        origin = runtime.get("weights") if isinstance(runtime, Mapping) else None
        if isinstance(origin, str) and origin:
            weights.add(origin)
    versions_found = {name: tuple(sorted(found)) for name, found in sorted(packages.items())}
    return CodeFacts(tuple(sorted(commits)), modified, versions_found, tuple(sorted(weights)))


def summarise(
    entries: Sequence[Entry],
    *,
    experiment: str,
    slots: int | None = None,
    planned: bool = False,
    outlier_rule: str = "none",
    unreplaced: Unreplaced = Unreplaced.keep,
    code: CodeFacts | None = None,
    recipes: Sequence[MethodRecipe] = (),
) -> Summary:
    """The numbers of an experiment; corpora, methods and folds in the order of the entries.

    `slots`: runs every cell should have (None: the slots of its entries). `planned`: the entries are all runs that there can be, so that a
    method has no cell for a fold on which it has no entry; otherwise such a cell lacks as many runs as the largest has slots.
    `unreplaced`: what becomes of outliers that no other run replaces. Methods whose `recipes` cannot be compared (`comparable`) have no
    comparison, and count for no correction. Raises UsageError when one slot has two accepted runs.
    """
    grouped: dict[str, dict[str, dict[str, list[Entry]]]] = {}
    for given in entries:
        entry = replace(given, status=Status.outlier) if given.unreplaced and unreplaced is Unreplaced.drop else given
        grouped.setdefault(entry.corpus, {}).setdefault(entry.method, {}).setdefault(entry.fold, []).append(entry)
    methods: list[MethodSummary] = []
    comparisons: list[Comparison] = []
    for corpus, by_method in grouped.items():
        folds = list(dict.fromkeys(fold for by_fold in by_method.values() for fold in by_fold))
        most = 0 if planned else max(_slots(cell) for by_fold in by_method.values() for cell in by_fold.values())
        found = [
            _method(corpus, method, [_cell(fold, by_fold.get(fold, []), slots, most) for fold in folds])
            for method, by_fold in by_method.items()
        ]
        methods.extend(found)
        pairs = [pair for pair in itertools.combinations(found, 2) if comparable(recipes, pair[0].method, pair[1].method)]
        comparisons.extend(corrected([_compare(corpus, first, second) for first, second in pairs]))
    return Summary(experiment, tuple(methods), tuple(comparisons), outlier_rule, code or CodeFacts(), tuple(recipes), unreplaced)


def accepted(entries: Iterable[Entry]) -> dict[int, float]:
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


def _slots(entries: Iterable[Entry]) -> int:
    return len({entry.slot for entry in entries})


def _cell(fold: str, entries: Sequence[Entry], slots: int | None, without: int) -> CellSummary:
    """`slots`: as of `summarise`; `without`: slots of a cell that has no entries."""
    values = list(accepted(entries).values())
    every = _every(entries)
    return CellSummary(
        fold=fold,
        mean_ua=mean(values),
        sd_ua=sd(values),
        mean_ua_all_runs=mean(every),
        sd_ua_all_runs=sd(every),
        interval=t_interval(values),
        n=len(values),
        left_out=len(_left_out(entries)),
        slots=slots if slots is not None else _slots(entries) or without,
        runs=tuple(sorted(entries, key=lambda entry: (entry.slot, entry.status not in DROPPED))),
    )


def _left_out(entries: Iterable[Entry]) -> set[int]:
    """Slots whose outlier no other run replaces and is in no mean."""
    return {entry.slot for entry in entries if entry.unreplaced and entry.status is Status.outlier}


def _method(corpus: str, method: str, cells: Sequence[CellSummary]) -> MethodSummary:
    planned = [cell for cell in cells if cell.slots]
    by_fold = [accepted(cell.runs) for cell in planned]
    by_slot = slot_means(by_fold)
    complete = all(cell.complete for cell in cells)
    return MethodSummary(
        method=method,
        corpus=corpus,
        mean_ua=mean(known(cell.mean_ua for cell in cells)),
        sd_ua=sd(by_slot),
        interval=t_interval(by_slot) if complete else None,
        crossed=crossed_mean(by_fold) if complete else None,
        mean_ua_all_runs=mean(known(cell.mean_ua_all_runs for cell in cells)),
        sd_ua_all_runs=sd(slot_means([all_by_slot(cell.runs) for cell in planned])),
        n=sum(cell.n for cell in cells),
        outliers=_dropped(cells, Status.outlier),
        diverged=_dropped(cells, Status.diverged),
        unresolved=sum(entry.unreplaced for cell in cells for entry in cell.runs),
        cells=tuple(cells),
        size=common_size(entry.size for cell in cells for entry in cell.runs),
    )


def _every(entries: Iterable[Entry]) -> list[float]:
    return [entry.scores.ua for entry in entries if entry.scores is not None]


def all_by_slot(entries: Iterable[Entry]) -> dict[int, float]:
    """Slot -> mean UA of all its runs."""
    by_slot: defaultdict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_slot[entry.slot].append(entry)
    return {slot: value for slot, runs in by_slot.items() if (value := mean(_every(runs))) is not None}


def _dropped(cells: Iterable[CellSummary], status: Status) -> Dropped:
    """How many runs were dropped with a status, and how many of them have a later run of their slot."""
    runs, rerun = 0, 0
    for cell in cells:
        last = {entry.slot: place for place, entry in enumerate(cell.runs)}
        places = [place for place, entry in enumerate(cell.runs) if entry.status is status]
        runs += len(places)
        rerun += sum(place < last[cell.runs[place].slot] for place in places)
    return Dropped(runs, rerun)


def by_pair(method: MethodSummary) -> dict[tuple[str, int], float]:
    """(fold, slot) -> UA of its accepted run."""
    return {(cell.fold, slot): ua for cell in method.cells for slot, ua in accepted(cell.runs).items()}


def _compare(corpus: str, first: MethodSummary, second: MethodSummary) -> Comparison:
    def folds(method: MethodSummary) -> dict[str, float]:
        return {cell.fold: cell.mean_ua for cell in method.cells if cell.mean_ua is not None}

    over_pairs, over_folds = paired_by_key(by_pair(first), by_pair(second)), paired_by_key(folds(first), folds(second))
    of_second = {cell.fold: accepted(cell.runs) for cell in second.cells}
    differences = [differences_by_key(accepted(cell.runs), of_second[cell.fold]) for cell in first.cells if cell.fold in of_second]
    return Comparison(corpus, first.method, second.method, over_pairs, over_folds, crossed_mean(list(filter(None, differences))))


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one corpus with their p-values corrected by Holm's method."""
    columns = (
        holm([each.over_pairs.t_p for each in comparisons]),
        holm([each.over_pairs.wilcoxon_p for each in comparisons]),
        holm([each.over_folds.t_p for each in comparisons]),
        holm([each.crossed.p if each.crossed else None for each in comparisons]),
    )
    return [replace(each, corrected=Corrected(*values)) for each, values in zip(comparisons, zip(*columns, strict=True), strict=True)]


def verdict_values(entry: Entry) -> tuple[bool | None, float | None, float | None, float | None]:
    """The values of `VERDICT`: whether the rule flags the run, replaced or not, and by what; None where it was not judged."""
    verdict = entry.verdict
    return (None, None, None, None) if verdict is None else (verdict.out, verdict.centre, verdict.scale, verdict.distance)
