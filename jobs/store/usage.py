"""What the folders of the store hold: bytes and files of every stage, what attempts without a result left, who still works on it.

It is the only module that removes stages, and what attempts left.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.store.attempts import claim_alive, modified_at
from jobs.store.layout import STORE, Layout, StageFolder
from jobs.store.records import MODEL, attempt_numbers, file_exists, read_claim, read_outcome, read_result

ASIDE = ".removed-"  # begins the name of what is about to be removed
BLOCK = 512  # bytes of st_blocks, stat(2)


@dataclass(frozen=True)
class Size:
    """Space on the disk: bytes as allocated, and inodes (files and folders)."""

    bytes: int = 0
    inodes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.bytes + other.bytes, self.inodes + other.inodes)


@dataclass(frozen=True)
class StoredStage:
    """One stage in the store."""

    stage: str
    key: str
    path: Path
    size: Size
    finished: bool  # it has a result
    left: tuple[tuple[Path, Size], ...] = ()  # checkpoints and outputs that belong to no result, with their sizes
    touched: float = 0.0  # last sign of life: of an attempt, a checkpoint or the result; seconds since the epoch
    alive: bool = False  # a process works on it
    logs: tuple[str, ...] = ()  # files to which its attempts wrote
    model: tuple[Path, Size] | None = None  # folder of what the result has trained, if it was kept


def stored_stages(root: Path, now: float | None = None) -> Iterator[StoredStage]:
    """Every stage in the store below the results folder `root`. `now`: seconds since the epoch.

    OSError if something cannot be read: it is then not known what may be removed.
    """
    moment = time.time() if now is None else now
    for kind in _folders(root / STORE):
        if kind == Layout(root, STORE).cache:
            continue
        for folder in _folders(kind):
            if not folder.name.startswith(ASIDE):
                yield _read(StageFolder(folder), kind.name, moment)


def size_of(path: Path) -> Size:
    """Space of a file, or of a folder and everything in it; of a link that of the link itself. What is missing has none."""
    try:
        status = path.lstat()
        found = Size(status.st_blocks * BLOCK, 1)
        if not path.is_dir() or path.is_symlink():
            return found
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    found += size_of(Path(entry.path))
                else:
                    found += Size(entry.stat(follow_symlinks=False).st_blocks * BLOCK, 1)
    except (FileNotFoundError, NotADirectoryError):  # removed meanwhile
        return Size()
    return found


def abandoned(root: Path) -> tuple[Path, ...]:
    """What interrupted removals of experiments and stages have left."""
    return tuple(path for place in (root, *_folders(root / STORE)) for path in _aside(place))


def remove(path: Path) -> None:
    """Remove a file or a folder. It gets another name first, so that no process finds half of it."""
    aside = path.with_name(f"{ASIDE}{path.name.removeprefix(ASIDE)}.{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    else:
        aside.unlink()


def _read(folder: StageFolder, stage: str, now: float) -> StoredStage:
    key = folder.path.name
    result = read_result(folder, key)
    numbers = attempt_numbers(folder)
    attempts = [folder.attempt(number) for number in numbers]
    claims = {attempt.number: read_claim(attempt) for attempt in attempts}
    published = result.attempt if result else 0
    alive = any(
        claim_alive(claim, modified_at(attempt.claim), live_jobs=None, now=now)
        for attempt in attempts
        if (claim := claims[attempt.number]) and attempt.number != published and read_outcome(attempt) is None
    )
    doubtful = result is None and file_exists(folder.result)  # damaged: what belongs to it is not known
    left = [] if doubtful else [folder.checkpoint, *(each.output for each in attempts if each.number != published)]
    outputs = [each.output for each in attempts if each.number == published]
    left.extend(path for place in (folder.path, *(each.path for each in attempts), *outputs) for path in _aside(place))
    models = [path / MODEL for path in outputs if (path / MODEL).is_dir()]
    times = [folder.result, folder.checkpoint, *(file for each in attempts for file in (each.claim, each.outcome))]
    return StoredStage(
        stage,
        key,
        folder.path,
        size_of(folder.path),
        result is not None or doubtful,
        tuple((path, size) for path in left if (size := size_of(path)).inodes),
        max(map(modified_at, times)),
        alive,
        tuple(dict.fromkeys(claim.log for claim in claims.values() if claim and claim.log)),
        (models[0], size_of(models[0])) if models else None,
    )


def _aside(parent: Path) -> list[Path]:
    return [path for path in _entries(parent) if path.name.startswith(ASIDE)]


def _folders(parent: Path) -> list[Path]:
    return [path for path in _entries(parent) if path.is_dir() and not path.is_symlink()]


def _entries(parent: Path) -> list[Path]:
    try:
        return sorted(parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
