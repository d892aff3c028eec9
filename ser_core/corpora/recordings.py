"""What every reader hands back: the utterances it found in a source folder, and one line for everything wrong with it.

Readers look at names and labels only. Nothing here decodes audio or writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ser_core.errors import InputError

AUDIO_SUFFIXES = (".wav", ".flac")
# Endings a list of recordings may write: whatever libsndfile opens.
LISTED_SUFFIXES = (*AUDIO_SUFFIXES, ".aif", ".aiff", ".au", ".caf", ".mp3", ".ogg", ".opus", ".sph", ".w64")
EXPECTED_COUNTS = "expected_counts.json"


@dataclass(frozen=True)
class Recording:
    """One labelled recording of a source."""

    id: str
    path: Path
    label: str
    speaker: str  # "" where the source does not say
    fold: str
    dimensions: tuple[float, float, float] | None = None  # valence, activation, dominance


@dataclass(frozen=True)
class ExpectedCounts:
    """How many utterances a source should hold; None where that is not known."""

    utterances: int | None = None
    classes: Mapping[str, int] | None = None
    folds: Mapping[str, int] | None = None


@dataclass(frozen=True)
class SourceListing:
    """A source as read: what will be prepared, what stands in the way, and what to compare with."""

    found: tuple[Recording, ...]
    problems: tuple[str, ...]
    folds: tuple[str, ...]  # held-out folds, in order
    counts: ExpectedCounts | None = None  # the published ones
    facts: Mapping[str, Any] = field(default_factory=dict)


def require_folder(source: Path) -> Path:
    """`source` itself; raises InputError where it is not a folder."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; --source must name the folder the corpus was unpacked to")
    return source


def audio_files(folder: Path) -> Iterator[Path]:
    """Every wav and FLAC file below `folder`, in the order of their names; never the `._*` files that macOS leaves."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(AUDIO_SUFFIXES):
                yield Path(root, name)


def stem(name: str) -> str:
    """File name without folders and without an audio ending; a dot inside the name is no ending."""
    return without_ending(name.replace("\\", "/").rpartition("/")[2])


def without_ending(name: str) -> str:
    """`name` without an audio ending."""
    return next((name[: -len(suffix)] for suffix in LISTED_SUFFIXES if name.lower().endswith(suffix)), name)


def by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files that share a name without its ending, so that a recording present twice shows."""
    grouped: dict[str, list[Path]] = {}
    for path in files:
        grouped.setdefault(stem(path.name), []).append(path)
    return grouped


def relative(path: Path, source: Path) -> str:
    """`path` as a line on the screen names it: below the source where it lies there."""
    return path.relative_to(source).as_posix() if path.is_relative_to(source) else str(path)


def read_expected_counts(source: Path) -> ExpectedCounts | None:
    """`SOURCE/expected_counts.json`, which says what a deliberate subset (or the demo corpus) holds; None where there is none.

    Form: {"utterances": 480, "classes": {"angry": 120, ...}, "folds": {"1": 96, ...}}; each key may be left out.
    Raises InputError where it is not of this form.
    """
    path = source / EXPECTED_COUNTS
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or set(record) - {"utterances", "classes", "folds"}:
            raise ValueError("it must be an object with the keys utterances, classes and folds")
        total = record.get("utterances")
        return ExpectedCounts(None if total is None else int(total), _numbers(record.get("classes")), _numbers(record.get("folds")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {error}") from error


def _numbers(record: Mapping[str, Any] | None) -> dict[str, int] | None:
    return None if record is None else {str(name): int(count) for name, count in record.items()}
