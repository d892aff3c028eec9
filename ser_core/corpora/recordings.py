"""What a corpus reader returns: the recordings of a source folder with their labels, and one line per problem. Shared parts of readers.

Readers use file names and label files only; they neither decode audio nor write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ser_core.disk import raise_storage_error
from ser_core.errors import InputError

AUDIO_SUFFIXES = (".wav", ".flac")
# File extensions that libsndfile reads, which the names in a list of recordings may have.
LISTED_SUFFIXES = (*AUDIO_SUFFIXES, ".aif", ".aiff", ".au", ".caf", ".mp3", ".ogg", ".opus", ".sph", ".w64")
EXPECTED_COUNTS = "expected_counts.json"


@dataclass(frozen=True)
class Excerpt:
    """The part of a file that is one recording."""

    channel: int | None = None  # from 1; None: the average of all channels
    start: float | None = None  # seconds; None: the beginning
    end: float | None = None  # seconds; None: the end

    def __str__(self) -> str:
        channel = "" if self.channel is None else f"channel {self.channel}"
        times = "" if self.start is None and self.end is None else f"{self.start or 0} to {'the end' if self.end is None else self.end} s"
        return ", ".join(filter(None, (channel, times)))


WHOLE = Excerpt()


@dataclass(frozen=True)
class Recording:
    """One labelled recording of a source."""

    id: str
    path: Path
    label: str
    speaker: str  # "" if unknown
    fold: str
    dimensions: tuple[float, float, float] | None = None  # valence, activation, dominance
    excerpt: Excerpt = WHOLE
    text: str | None = None  # transcript; None: there is none


@dataclass(frozen=True)
class ExpectedCounts:
    """Expected numbers of utterances of a source; None if unknown."""

    utterances: int | None = None
    classes: Mapping[str, int] | None = None
    folds: Mapping[str, int] | None = None


@dataclass(frozen=True)
class SourceListing:
    """The content of a source folder: recordings to prepare, problems, held-out folds, expected counts."""

    found: tuple[Recording, ...]
    problems: tuple[str, ...]
    folds: tuple[str, ...]  # held-out folds, in order
    counts: ExpectedCounts | None = None  # the published ones
    facts: Mapping[str, Any] = field(default_factory=dict)
    labelled: bool = True  # False: nothing is trained on it
    notes: tuple[str, ...] = ()  # lines for the user on what was decided, kept in the manifest
    published_folds: bool = False  # the folds are those of a benchmark, whatever speakers they share


def require_folder(source: Path) -> Path:
    """Return `source`. Raises InputError if it is not a folder."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; --source must name the folder the corpus was unpacked to")
    return source


def audio_files(folder: Path) -> Iterator[Path]:
    """Yield every wav and FLAC file below `folder`, sorted by name, without hidden files such as the `._*` files of macOS."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(AUDIO_SUFFIXES):
                yield Path(root, name)


def stem(name: str) -> str:
    """Return a file name without folders and without an audio extension; other text after a dot is part of the name."""
    return without_ending(name.replace("\\", "/").rpartition("/")[2])


def without_ending(name: str) -> str:
    """Return `name` without an audio extension."""
    return next((name[: -len(suffix)] for suffix in LISTED_SUFFIXES if name.lower().endswith(suffix)), name)


def by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Return file name without extension -> files; more than one means a duplicate recording."""
    grouped: dict[str, list[Path]] = {}
    for path in files:
        grouped.setdefault(stem(path.name), []).append(path)
    return grouped


def relative(path: Path, source: Path) -> str:
    """Return `path` for messages: relative to `source` if it is below it."""
    return path.relative_to(source).as_posix() if path.is_relative_to(source) else str(path)


def read_expected_counts(source: Path) -> ExpectedCounts | None:
    """Read `SOURCE/expected_counts.json`, the counts of a deliberate subset or of the demo corpus; None if there is no such file.

    Format: {"utterances": 480, "classes": {"angry": 120, ...}, "folds": {"1": 96, ...}}; every key is optional.
    Raises InputError for any other format.
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
        raise_storage_error(error)
        raise InputError(f"{path}: {error}") from error


def _numbers(record: Mapping[str, Any] | None) -> dict[str, int] | None:
    return None if record is None else {str(name): int(count) for name, count in record.items()}
