"""Runs from a CSV file, with the outlier rule applied as to the runs of a grid.

One row per run; columns corpus, method, fold, slot, seed, ua (percent), and optionally wa, macro_f1 and status; `runs.csv` of `collect`
is such a file. The rows of a slot, in file order, are its first run and its reruns. A status of diverged, failed, pending or running is
kept; the rule decides on all other runs, whatever their status in the file. An outlier without a rerun in the file is counted as
unresolved; it stays in the means, unless `summarise` is asked to leave it out.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.control.outliers import Verdict, check_rule
from jobs.control.rounds import MethodReplay, SeedResult
from jobs.errors import UsageError
from jobs.experiment.config import OutlierRule, Policy
from jobs.tables.format import unquoted_formula
from jobs.tables.summary import Entry, Scores, Status

REQUIRED = ("corpus", "method", "fold", "slot", "seed", "ua")
OPTIONAL = ("wa", "macro_f1", "status")
Slot = tuple[str, int]  # fold, number


@dataclass(frozen=True)
class Judged:
    """Runs from a CSV file after the rounds of the outlier rule."""

    entries: tuple[Entry, ...]
    rerun: tuple[Entry, ...] = ()  # runs whose slots need a run with another seed, in a row below
    unused: tuple[Entry, ...] = ()  # later runs of slots whose earlier run is accepted; in no table

    @property
    def unresolved(self) -> Mapping[tuple[str, str], int]:
        """(corpus, method) -> outliers that no other run replaces."""
        return Counter((entry.corpus, entry.method) for entry in self.entries if entry.unreplaced)


def read_runs(path: Path) -> tuple[Entry, ...]:
    """The runs of a CSV file (UTF-8, comma or semicolon) in file order.

    Raises UsageError with the file, the line and the column.
    """
    header, rows, semicolon = _rows(path)
    found: list[Entry] = []
    lines: dict[tuple[str, str, str, int], int] = {}
    for line, cells in rows:
        row = _Row(f"{path} line {line}", dict(zip(header, cells, strict=True)), semicolon)
        entry = row.entry()
        run = (entry.corpus, entry.method, entry.fold, entry.seed)
        if run in lines:
            raise UsageError(
                f"{row.where}: seed {entry.seed} of {entry.method}, fold {entry.fold}, corpus {entry.corpus} is already in line "
                f"{lines[run]}: keep one row per run"
            )
        lines[run] = line
        found.append(entry)
    scores = [entry.scores.ua for entry in found if entry.scores is not None]
    if not found:
        raise UsageError(f"{path}: no runs below the header; expected one row per run")
    if scores and max(scores) <= 1:
        raise UsageError(f"{path}: every ua lies between 0 and 1, but percent is expected: multiply by 100")
    return tuple(found)


def judge_runs(entries: Sequence[Entry], rule: OutlierRule | str, sigmas: float, rounds: int) -> Judged:
    """Apply an outlier rule as a grid does: to a method when all its slots are finished, and again after reruns, at most `rounds` times.

    Raises UsageError for a rule that can never drop a run of the smallest cell.
    """
    methods: dict[tuple[str, str], dict[Slot, list[Entry]]] = {}
    for entry in entries:
        methods.setdefault((entry.corpus, entry.method), {}).setdefault((entry.fold, entry.slot), []).append(entry)
    check_rule(rule, min((_smallest_cell(slots) for slots in methods.values()), default=0), sigmas)
    if rounds < 1:
        raise UsageError(f"policy.rounds {rounds}: at least 1")
    kept: list[Entry] = []
    unused: list[Entry] = []
    rerun: list[Entry] = []
    for name, slots in methods.items():
        results = {slot: dict(enumerate(map(_seed_result, runs))) for slot, runs in slots.items()}
        policy = Policy(outliers=OutlierRule(rule), sigmas=sigmas, rounds=rounds)
        replayed = MethodReplay(name[1], results, policy, {slot: len(runs) for slot, runs in slots.items()})
        replayed.run()
        filling = {slot: runs[replayed.generations[slot]] for slot, runs in slots.items()}
        # By round, the slots whose outlier has no rerun in the file.
        without = [{slot for slot, place in _out(verdicts).items() if place + 1 == len(slots[slot])} for verdicts in replayed.rounds]
        finished = all(map(_finished, filling.values()))
        outliers = set(_out(replayed.unresolved)) if finished else without[-1] if without else set()
        to_rerun = outliers & set[Slot]().union(*without)
        rerun.extend(run for slot, run in filling.items() if slot in to_rerun or run.status is Status.diverged)
        for slot, runs in slots.items():
            current = replayed.generations[slot]
            for place, run in enumerate(runs):
                verdict = replayed.verdicts.get((*slot, place))
                if place <= current:
                    known = Status.outlier if place < current else Status.accepted
                    status, unreplaced = known if _finished(run) else run.status, place == current and slot in outliers
                    kept.append(replace(run, status=status, verdict=verdict, unreplaced=unreplaced))
                elif run.status is Status.diverged:  # it stays in the table
                    kept.append(run)
                else:
                    unused.append(run)
    return Judged(tuple(kept), tuple(rerun), tuple(unused))


def _out(verdicts: Iterable[Verdict]) -> dict[Slot, int]:
    """Slot -> place of its outlier among the rows of the slot."""
    return {(each.fold, each.slot): each.generation for each in verdicts if each.out}


def _seed_result(run: Entry) -> SeedResult:
    """A run for the replay, which passes over an unfinished run as over a diverged one."""
    return (
        SeedResult(run.seed, run.scores.ua)
        if run.scores is not None and _finished(run)
        else SeedResult(run.seed, diverged=run.status.value)
    )


def _finished(run: Entry) -> bool:
    """Whether the outlier rule applies to a run."""
    return run.scores is not None and run.status in (Status.accepted, Status.outlier)


def _smallest_cell(slots: Mapping[Slot, Sequence[Entry]]) -> int:
    """Number of slots of the smallest cell of a method."""
    return min(Counter(fold for fold, _ in slots).values())


@dataclass(frozen=True)
class _Row:
    where: str  # file and line
    cells: Mapping[str, str]
    semicolon: bool  # then numbers may have a decimal comma

    def entry(self) -> Entry:
        status = self._status()
        ua = self._percentage("ua")
        if ua is None and status in (Status.accepted, Status.outlier):
            raise UsageError(f"{self.where}: ua is empty: give it in percent, or a column status that says why there is none (failed, ...)")
        scores = None if ua is None else Scores(ua, self._percentage("wa"), self._percentage("macro_f1"))
        corpus, method, fold = (self._text(column) for column in ("corpus", "method", "fold"))
        return Entry(corpus, method, fold, self._whole("slot"), self._whole("seed"), scores, status)

    def _text(self, column: str) -> str:
        text = self.cells[column]
        if not text.strip():
            raise UsageError(f"{self.where}: {column} is empty")
        return text

    def _status(self) -> Status:
        text = self.cells.get("status", "").strip().lower()
        if text and text not in Status.__members__:
            raise UsageError(f"{self.where}: status {text!r}: known are {', '.join(Status.__members__)}")
        return Status[text] if text else Status.accepted

    def _whole(self, column: str) -> int:
        text = self.cells[column].strip()
        # Not `int`: it takes "1_0" and digits of other scripts too.
        if not (text.isascii() and text.isdigit()):
            raise UsageError(f"{self.where}: {column} {text!r} is no whole number of 0 or more")
        return int(text)

    def _percentage(self, column: str) -> float | None:
        text = self.cells.get(column, "").strip()
        if not text:
            return None
        try:
            value = float(text.replace(",", ".") if self.semicolon else text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UsageError(f"{self.where}: {column} {text!r} is no number: give percent, for example 62.3")
        if not 0 <= value <= 100:
            raise UsageError(f"{self.where}: {column} {text} is no percentage: it must lie within 0 and 100")
        return value


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], bool]:
    """Column names; line number and cells of every row that is not empty; whether the separator is a semicolon."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): save it as CSV in UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    first = text.lstrip().partition("\n")[0]
    semicolon = first.count(";") > first.count(",")
    # `read_text` has already normalised line ends.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if semicolon else ",", strict=True)
    try:
        rows = [(reader.line_num, list(map(unquoted_formula, cells))) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num}: {error}") from error
    if not rows:
        raise UsageError(f"{path}: empty; expected a header with the columns {', '.join(REQUIRED)}")
    header = [name.strip().lower() for name in rows[0][1]]
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise UsageError(f"{path}: no column {', '.join(missing)}; expected {', '.join(REQUIRED)} (and maybe {', '.join(OPTIONAL)})")
    twice = [name for name in (*REQUIRED, *OPTIONAL) if header.count(name) > 1]
    if twice:
        raise UsageError(f"{path}: column {twice[0]} is there twice")
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise UsageError(f"{path} line {line}: {len(cells)} values, but {len(header)} columns")
    return header, rows[1:], semicolon
