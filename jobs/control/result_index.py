"""What was read of finished stages, remembered, so that a pass looks at each result's file without opening it.

A result is told by its file's time, size and inode: while these stay, so does what it says. What a process has read it remembers; the
controller stores it beside the experiment, so that the next process need not read a hundred thousand files to learn that nothing has
changed. This is a cache and never the truth: where it is missing, torn, of another version or behind, results are read.

It also remembers which slots were at a reserve seed, so that the next look begins with these runs; what fills the slots is still decided
by the results.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jobs.control.facts import OUTSIDE, NodeFacts
from jobs.experiment.graph import Slot
from jobs.statistics import percent
from jobs.store.layout import Layout, StageFolder
from jobs.store.records import Decoder, Result, read_result, write_bytes
from jobs.store.scores import confusion_of

SCHEMA = 3  # raised when the facts of a result, or the way they are found, change
ENOUGH = 100  # changes after which an index is stored, and at least one in
SHARE = 50  # of its results: the others are read again by the next process
RESULT = StageFolder(Path()).result.name
Signature = tuple[int, int, int]  # time of change in nanoseconds, size, inode
_log = logging.getLogger(__name__)
# Signature, attempts, UA, why it diverged, seconds, all seconds, memory, mapped, on a GPU, processes, threads, partition
_Row = tuple[int, int, int, int, float | None, str, float, float, int, int, bool, int, int, str]


@dataclass(frozen=True)
class _Stored:
    """The body of an index."""

    slots: tuple[tuple[str, str, int, int], ...]  # method, fold, slot, generation
    rows: dict[str, _Row]  # by key


_BODY = Decoder(_Stored, None)


class ResultIndex:
    """Facts of finished stages by key."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stored, self._generations = _read_index(file)
        self._known: dict[str, tuple[Signature, NodeFacts]] = {}
        self._changes = 0

    @property
    def generations(self) -> Mapping[Slot, int]:
        """Of the slots that were beyond their first seed when last looked at."""
        return self._generations

    def facts(self, key: str, folder: str) -> NodeFacts | None:
        """Of the stage in that folder; None if it has no valid result. One look at the file, and a reading of it if it is not known."""
        try:
            seen = os.stat(f"{folder}/{RESULT}")  # noqa: PTH116 - a path object for each of 100 000 stages takes longer than the look
        except (FileNotFoundError, NotADirectoryError):
            if self._known.pop(key, None) or self._stored.pop(key, None):
                self._changes += 1
            return None
        signature = (seen.st_mtime_ns, seen.st_size, seen.st_ino)
        known = self._known.get(key)
        if known is not None and known[0] == signature:
            return known[1]
        stored = self._stored.get(key)
        if stored is not None and stored[:3] == signature:
            found: NodeFacts | None = _from_row(stored)
        else:
            self._changes += 1
            result = read_result(StageFolder(Path(folder)), key)  # after the look: of a newer file, the signature is too old to be believed
            found = None if result is None else facts_of(result, signature[0])
        if found is not None:
            self._known[key] = signature, found
        return found

    def remember(self, generations: Mapping[Slot, int]) -> None:
        """What fills the slots now; a wrong guess costs the next process as much as many results."""
        if generations != self._generations:
            self._generations = dict(generations)
            self._changes += len(self._known) // SHARE

    def store(self) -> None:
        """Write what is known if that is enough more than what is stored. Nothing depends on it: a full disk is no error."""
        if self._changes < max(ENOUGH, len(self._known) // SHARE):
            return
        slots = [[*slot, generation] for slot, generation in self._generations.items()]
        rows = {key: _to_row(*known) for key, known in self._known.items()}
        body = json.dumps({"slots": slots, "rows": rows}, separators=(",", ":")).encode()
        try:
            write_bytes(self._file, json.dumps(_head(body)).encode() + b"\n" + body)
        except OSError as error:
            _log.info("%s: %s", self._file, error)
        self._changes = 0


@lru_cache(maxsize=4)
def index_of(layout: Layout) -> ResultIndex:
    """The index of an experiment; one for all of a process."""
    return ResultIndex(layout.index)


def facts_of(result: Result, written: int) -> NodeFacts:
    """What a result says, written at that time (nanoseconds since the epoch)."""
    told = result.provenance
    seconds, peak, own = (float(told.get(name) or 0) for name in ("seconds", "peak_rss_bytes", "peak_own_bytes"))
    processes, slurm = int(told.get("processes") or 0), told.get("slurm")
    return NodeFacts(
        done=True,
        attempts=result.attempt,
        seconds=seconds,
        all_seconds=seconds + (told.get("seconds_before") or 0),
        memory=int(peak),
        mapped=max(0, int(peak - own)) if own and processes <= 1 else 0,  # of a team only the peak is that of its largest process
        on_gpu=told.get("device", "cpu") != "cpu",
        processes=processes,
        threads=int(told.get("threads") or 0),
        partition=slurm.get("job_partition", "") if slurm else OUTSIDE if slurm is not None else "",
        finished=written / 1e9,
        ua=_ua(result),
        diverged=result.diverged,
    )


def _ua(result: Result) -> float | None:
    confusion = confusion_of(result)
    if confusion is not None:
        return confusion.ua
    share = result.metrics.get("ua")
    return percent(share) if isinstance(share, int | float) and 0 <= share <= 1 else None


def _to_row(signature: Signature, facts: NodeFacts) -> _Row:
    measured = (facts.seconds, facts.all_seconds, facts.memory, facts.mapped)
    place = (facts.on_gpu, facts.processes, facts.threads, facts.partition)
    return (*signature, facts.attempts, facts.ua, facts.diverged, *measured, *place)


def _from_row(row: _Row) -> NodeFacts:
    changed, _, _, attempts, ua, diverged, seconds, all_seconds, memory, mapped, on_gpu, processes, threads, partition = row
    return NodeFacts(
        done=True,
        attempts=attempts,
        seconds=seconds,
        all_seconds=all_seconds,
        memory=memory,
        mapped=mapped,
        on_gpu=on_gpu,
        processes=processes,
        threads=threads,
        partition=partition,
        finished=changed / 1e9,
        ua=ua,
        diverged=diverged,
    )


def _head(body: bytes) -> dict[str, Any]:
    return {"schema": SCHEMA, "sha256": hashlib.sha256(body).hexdigest()}


def _read_index(file: Path) -> tuple[dict[str, _Row], dict[Slot, int]]:
    """Key -> row, and the generations, of a stored index if it is whole. A damaged cache costs time only and is not reported."""
    try:
        head, _, body = file.read_bytes().partition(b"\n")
        if json.loads(head) != _head(body):
            return {}, {}
        stored = _BODY.decode(body)
        return stored.rows, {(method, fold, slot): generation for method, fold, slot, generation in stored.slots}
    except (OSError, ValueError):  # DamagedRecordError is a ValueError
        return {}, {}
