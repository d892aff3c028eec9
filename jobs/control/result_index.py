"""Cache of the facts of finished stages, so that a pass needs one `stat` per result and opens none of them.

An entry is valid while modification time, size and inode of the result's file stay the same. Each process keeps its entries in memory; the
controller also stores them beside the experiment, so that the next process need not read 100 000 files to learn that nothing has changed.
If the stored index is missing, torn, outdated or of another version, results are read.

For a stage that got its result by a later attempt the index also stores which nodes failed under the earlier ones, as far as Slurm has
reported their ends: attempts of a finished stage are not read again.

The index also stores which slots were at a reserve seed, so that the next pass starts with these runs; which runs fill the slots is still
decided by the results.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from jobs.control.facts import OUTSIDE, Blamed, Departure, StageFacts
from jobs.experiment.graph import Slot
from jobs.store.layout import Layout, StageFolder
from jobs.store.records import Decoder, Result, read_result_file, write_bytes
from jobs.store.scores import UNWEIGHTED, Score

SCHEMA = 4  # raised when the facts of a result, or the way they are computed, change
ENOUGH = 100  # changes after which the index is stored, and at least one
SHARE = 50  # of its entries: the next process reads fewer results than that again
RESULT = StageFolder(Path()).result.name
Signature = tuple[int, int, int]  # modification time in nanoseconds, size, inode
_log = logging.getLogger(__name__)
# A signature, then the stored fields of StageFacts: a row of the index
FIELDS = ("attempts", "ua", "diverged", "seconds", "all_seconds", "memory", "mapped", "on_gpu", "processes", "threads", "partition", "node")
Ends = tuple[tuple[str, str, bool], ...]  # job, last state and whether it was withdrawn, of each job that has left the queue
_Blamed = tuple[Signature, Ends, tuple[Blamed, ...]]  # valid for the result of this signature and for these ends
_Row = tuple[int, int, int, int, float | None, str, float, float, int, int, bool, int, int, str, str]


@dataclass(frozen=True)
class _Stored:
    """The body of an index."""

    slots: tuple[tuple[str, str, int, int], ...]  # method, fold, slot, generation
    rows: dict[str, _Row]  # by key
    blamed: dict[str, _Blamed] = field(default_factory=dict)  # by key; missing in an index of earlier versions


_BODY = Decoder(_Stored, None)


class ResultIndex:
    """Facts of the finished stages of an experiment."""

    def __init__(self, file: Path, score: Score = UNWEIGHTED) -> None:
        self._file = file
        self._score = score
        self._stored, self._generations, self._blamed = _read_index(file)
        self._known: dict[str, tuple[Signature, StageFacts]] = {}
        self._changes = 0

    @property
    def generations(self) -> Mapping[Slot, int]:
        """Of the slots that were past their first seed in the last pass."""
        return self._generations

    def facts(self, key: str, folder: str) -> StageFacts | None:
        """Of the stage in that folder; None if it has no valid result. One `stat`, and the result is read if it is not in the index."""
        file = f"{folder}/{RESULT}"
        try:
            status = os.stat(file)  # noqa: PTH116 - 100 000 Path objects take longer than the calls
        except (FileNotFoundError, NotADirectoryError):
            if self._known.pop(key, None) or self._stored.pop(key, None):
                self._changes += 1
            return None
        signature = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = self._known.get(key)
        if known is not None and known[0] == signature:
            return known[1]
        stored = self._stored.get(key)
        if stored is not None and stored[:3] == signature:
            found: StageFacts | None = _from_row(stored)
        else:
            self._changes += 1
            # Read after the stat: if the file is replaced in between, its old signature does not match and it is read again.
            result = read_result_file(file, key)
            found = None if result is None else facts_of(result, signature[0], self._score)
        if found is not None:
            self._known[key] = signature, found
        return found

    def blamed(self, key: str, jobs: Sequence[Departure]) -> tuple[Blamed, ...] | None:
        """The nodes that failed under attempts of a stage whose facts are known here; None if not kept, or a job has ended since."""
        known = self._blamed.get(key)
        return known[2] if known is not None and known[:2] == (self._known[key][0], _ends(jobs)) else None

    def keep_blamed(self, key: str, jobs: Sequence[Departure], blamed: tuple[Blamed, ...]) -> None:
        """Keep the nodes that failed under attempts of a stage all of which have ended."""
        self._blamed[key] = (self._known[key][0], _ends(jobs), blamed)
        self._changes += 1

    def remember(self, generations: Mapping[Slot, int]) -> None:
        """Store which generations fill the slots now: a wrong guess costs the next process as much as many results."""
        if generations != self._generations:
            self._generations = dict(generations)
            self._changes += len(self._known) // SHARE

    def store(self) -> None:
        """Write the index if enough has changed since it was last stored. Nothing depends on it: a full disk is not an error."""
        if self._changes < max(ENOUGH, len(self._known) // SHARE):
            return
        slots = [[*slot, generation] for slot, generation in self._generations.items()]
        rows = {key: _to_row(*known) for key, known in self._known.items()}
        blamed = {key: (*known[:2], [asdict(each) for each in known[2]]) for key, known in self._blamed.items() if key in rows}
        body = json.dumps({"slots": slots, "rows": rows, "blamed": blamed}, separators=(",", ":")).encode()
        try:
            write_bytes(self._file, json.dumps(_head(body)).encode() + b"\n" + body)
        except OSError as error:
            _log.info("%s: %s", self._file, error)
        self._changes = 0


def index_of(layout: Layout, score: Score = UNWEIGHTED) -> ResultIndex:
    """The index of an experiment, shared by all callers in a process. One for each score, with a file of its own."""
    return cached_index(layout, score)


@lru_cache(maxsize=4)
def cached_index(layout: Layout, score: Score) -> ResultIndex:
    """Called by `index_of` alone."""
    named = "" if score == UNWEIGHTED else f"-{hashlib.sha256(repr(score).encode()).hexdigest()[:8]}"
    return ResultIndex(layout.index.with_stem(f"{layout.index.stem}{named}"), score)


def facts_of(result: Result, written: int, score: Score = UNWEIGHTED) -> StageFacts:
    """The facts of a result. `written`: modification time of its file, nanoseconds since the epoch."""
    recorded = result.provenance
    seconds, peak, own = (float(recorded.get(name) or 0) for name in ("seconds", "peak_rss_bytes", "peak_own_bytes"))
    processes, slurm = int(recorded.get("processes") or 0), recorded.get("slurm")
    return StageFacts(
        done=True,
        attempts=result.attempt,
        seconds=seconds,
        all_seconds=seconds + (recorded.get("seconds_before") or 0),
        memory=int(peak),
        mapped=max(0, int(peak - own)) if own and processes <= 1 else 0,  # of several processes only the peak is that of the largest
        on_gpu=recorded.get("device", "cpu") != "cpu",
        processes=processes,
        threads=int(recorded.get("threads") or 0),
        partition=slurm.get("job_partition", "") if slurm else OUTSIDE if slurm is not None else "",
        node=slurm.get("job_nodelist", "") if slurm else "",
        finished=written / 1e9,
        ua=score.of(result),
        diverged=result.diverged,
    )


def _ends(jobs: Sequence[Departure]) -> Ends:
    return tuple((each.job, each.state, each.withdrawn) for each in jobs)


def _to_row(signature: Signature, facts: StageFacts) -> tuple[Any, ...]:
    return (*signature, *(getattr(facts, name) for name in FIELDS))


def _from_row(row: _Row) -> StageFacts:
    stored: dict[str, Any] = dict(zip(FIELDS, row[3:], strict=True))
    return StageFacts(done=True, finished=row[0] / 1e9, **stored)


def _head(body: bytes) -> dict[str, Any]:
    return {"schema": SCHEMA, "sha256": hashlib.sha256(body).hexdigest()}


def _read_index(file: Path) -> tuple[dict[str, _Row], dict[Slot, int], dict[str, _Blamed]]:
    """Rows, generations and blamed nodes of a stored index if it is intact. A damaged cache only costs time and is not reported."""
    try:
        head, _, body = file.read_bytes().partition(b"\n")
        if json.loads(head) != _head(body):
            return {}, {}, {}
        stored = _BODY.decode(body)
        generations = {(method, fold, slot): generation for method, fold, slot, generation in stored.slots}
        return stored.rows, generations, stored.blamed
    except (OSError, ValueError):  # DamagedRecordError is a ValueError
        return {}, {}, {}
