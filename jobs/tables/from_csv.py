"""Results from elsewhere: runs from a CSV file, judged by the same rules as runs of a grid.

One row a run, columns corpus, method, fold, slot, seed, ua (percent), and optionally wa, macro_f1 and status; `runs.csv` of `collect` is
such a file. The rows of one slot in the order of the file are its first run and its reruns. Rows that a status says are diverged, failed,
pending or running count as that; all others are judged anew, whatever the file says of them. A run that is out and has no rerun in the
file stays in the mean, counted as unresolved: nothing is dropped for which there is no replacement.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.control.outliers import FinishedRun, Verdict, check_rule, judge
from jobs.errors import UsageError
from jobs.tables.summary import Entry, Scores, Status

if TYPE_CHECKING:
    from jobs.experiment.config import OutlierRule


REQUIRED = ("corpus", "method", "fold", "slot", "seed", "ua")
OPTIONAL = ("wa", "macro_f1", "status")
Slot = tuple[str, int]  # fold, number


@dataclass(frozen=True)
class Judged:
    """Runs from elsewhere after the rounds of judgement."""

    entries: tuple[Entry, ...]
    unresolved: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (corpus, method) -> runs that are out and stay in the mean
    rerun: tuple[Entry, ...] = ()  # give the slots of these a run with another seed, in a row below theirs
    unused: tuple[Entry, ...] = ()  # further runs of slots whose earlier run the rule keeps; in no table


def read_foreign(path: Path) -> tuple[Entry, ...]:
    """The runs of a CSV file (UTF-8, comma or semicolon) in its order.

    Raises UsageError in one line that names the file, the line and the column.
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


def judge_foreign(entries: Sequence[Entry], rule: OutlierRule | str, sigmas: float, rounds: int) -> Judged:
    """Apply a rule to runs as a grid does: a method is judged when all its slots are in, and again after reruns, at most `rounds` times.

    Raises UsageError for a rule that could never drop a run of the smallest cell.
    """
    methods: dict[tuple[str, str], dict[Slot, list[Entry]]] = {}
    for entry in entries:
        methods.setdefault((entry.corpus, entry.method), {}).setdefault((entry.fold, entry.slot), []).append(entry)
    check_rule(rule, min((_fewest(slots) for slots in methods.values()), default=0), sigmas)
    if rounds < 1:
        raise UsageError(f"policy.rounds {rounds}: at least 1")
    kept: list[Entry] = []
    unused: list[Entry] = []
    rerun: list[Entry] = []
    unresolved: dict[tuple[str, str], int] = {}
    for name, slots in methods.items():
        replay = _Replay(slots, rule, sigmas)
        replay.run(rounds)
        for slot, runs in slots.items():
            now = replay.now[slot]
            kept.extend(replace(run, status=Status.outlier) if _counts(run) else run for run in runs[:now])
            kept.append(replace(runs[now], status=Status.accepted) if _counts(runs[now]) else runs[now])
            # Below the run that is kept, what diverged stays on record; of the rest the rule has no use.
            kept.extend(run for run in runs[now + 1 :] if run.status is Status.diverged)
            unused.extend(run for run in runs[now + 1 :] if run.status is not Status.diverged)
        rerun.extend(slots[slot][replay.now[slot]] for slot in replay.wanting)
        if replay.out:
            unresolved[name] = len(replay.out)
    return Judged(tuple(kept), unresolved, tuple(rerun), tuple(unused))


class _Replay:
    """The rounds of one method: `now` is the place of the run that fills a slot among its rows."""

    def __init__(self, slots: Mapping[Slot, Sequence[Entry]], rule: OutlierRule | str, sigmas: float) -> None:
        self._slots = slots
        self._rule = rule
        self._sigmas = sigmas
        self.now = dict.fromkeys(slots, 0)
        self.out: tuple[Slot, ...] = ()  # after the last judgement, not replaced
        self.wanting: tuple[Slot, ...] = ()  # of the slots, those that need a run with another seed

    def run(self, rounds: int) -> None:
        stuck: set[Slot] = set()
        for _ in range(rounds):
            if not self._past_failures():
                break
            self.out = self._judge()
            moved = [slot for slot in self.out if self._next(slot)]
            stuck.update(set(self.out) - set(moved))
            self.out = tuple(slot for slot in self.out if slot not in moved)
            if not moved:
                break
        else:
            if self._past_failures():
                self.out = self._judge()
        self.wanting = tuple(
            slot
            for slot, runs in self._slots.items()
            if (slot in self.out and slot in stuck) or runs[self.now[slot]].status is Status.diverged
        )

    def _past_failures(self) -> bool:
        """Turn from runs that do not count to the next ones; whether every slot has a run that counts."""
        for slot, runs in self._slots.items():
            while not _counts(runs[self.now[slot]]) and self._next(slot):
                pass
        return all(_counts(runs[self.now[slot]]) for slot, runs in self._slots.items())

    def _judge(self) -> tuple[Slot, ...]:
        attempts = [
            FinishedRun(run.fold, run.slot, place, run.seed, run.scores.ua)
            for slot, runs in self._slots.items()
            for place, run in enumerate(runs[: self.now[slot] + 1])
            if run.scores is not None and _counts(run)
        ]
        verdicts: tuple[Verdict, ...] = judge(self._rule, attempts, {(*slot, place) for slot, place in self.now.items()}, self._sigmas).out
        return tuple((verdict.fold, verdict.slot) for verdict in verdicts)

    def _next(self, slot: Slot) -> bool:
        if self.now[slot] + 1 >= len(self._slots[slot]):
            return False
        self.now[slot] += 1
        return True


def _counts(run: Entry) -> bool:
    return run.scores is not None and run.status in (Status.accepted, Status.outlier)


def _fewest(slots: Mapping[Slot, Sequence[Entry]]) -> int:
    """Slots of the smallest cell of a method."""
    folds = [fold for fold, _ in slots]
    return min(map(folds.count, set(folds)))


@dataclass(frozen=True)
class _Row:
    where: str  # file and line
    cells: Mapping[str, str]
    semicolon: bool  # such files are written where decimals have a comma

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
    """Names of the columns; line and cells of every row that is not empty; whether semicolons part the cells."""
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
    # `read_text` has turned line ends into one kind; a carriage return inside a quoted name is not worth a mode of its own.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if semicolon else ",", strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
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
