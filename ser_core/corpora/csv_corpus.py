"""Any corpus as a CSV file: path, label, speaker and fold of every recording."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ser_core.corpora.manifest import DIMENSIONS, natural_order
from ser_core.corpora.recordings import Recording, SourceListing, relative, stem, without_ending
from ser_core.corpora.speaker_folds import LEAVE_ONE_OUT, with_folds
from ser_core.disk import raise_storage_error
from ser_core.errors import InputError

COLUMNS = ("path", "label", "speaker", "fold")
TEXT = "text"


def read(source: Path, *, folds: str | None = None) -> SourceListing:
    """Read a CSV file with the columns path, label, speaker and fold; paths are relative to the file.

    `source`: the file, or a folder that holds one. The columns valence, activation and dominance are kept if all three exist, and the
    column text, a transcript that may be empty; other columns are ignored. Every value of `fold` is a held-out fold. `folds`: the rule of
    `ser_core.corpora.speaker_folds` for a file without that column. Raises InputError if there is no such file, its header is wrong, or the
    folds cannot be made.
    """
    columns = COLUMNS if folds is None else COLUMNS[:-1]
    file = _find(source)
    base = file.parent
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, [value.strip() for value in row]) for row in reader if any(value.strip() for value in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise_storage_error(error)
        raise InputError(f"{file}: cannot be read as comma-separated UTF-8 text ({error})") from error
    _check_header(file, header, rows, columns)
    with_dimensions = all(name in header for name in DIMENSIONS)
    found: list[Recording] = []
    problems: list[str] = []
    ids = identifiers([row[header.index("path")] if len(row) == len(header) else "" for _, row in rows])
    first: dict[str, int] = {}
    for (line, row), identifier in zip(rows, ids, strict=True):
        where = f"{file.name} line {line}"
        if len(row) != len(header):
            problems.append(f"{where}: {len(row)} values, but the header has {len(header)} columns; quote values that hold a comma")
            continue
        values = dict(zip(header, row, strict=True))
        empty = [name for name in columns if not values[name]]
        if empty:
            problems.append(f"{where}: no {' and no '.join(empty)} for {values['path'] or 'this row'}")
            continue
        path = base / values["path"]
        if identifier in first:
            problems.append(f"{where}: duplicate of line {first[identifier]}: {values['path']}; keep one")
            continue
        first[identifier] = line
        if not path.is_file():
            problems.append(f"{where}: no audio: {relative(path, base)} does not exist (paths are relative to {file.name})")
            continue
        dimensions = None
        if with_dimensions and any(values[name] for name in DIMENSIONS):
            try:
                dimensions = (float(values["valence"]), float(values["activation"]), float(values["dominance"]))
            except ValueError:
                problems.append(f"{where}: valence, activation and dominance of {values['path']} must be numbers")
                continue
        fold, text = values.get("fold", ""), values.get(TEXT)
        found.append(Recording(identifier, path, values["label"], values["speaker"], fold, dimensions, text=text))
    listing = SourceListing(tuple(found), tuple(problems), tuple(sorted({utterance.fold for utterance in found}, key=natural_order)))
    return listing if folds is None or not found else with_folds(listing, folds)


def identifiers(paths: Sequence[str]) -> list[str]:
    """Return an id for each recording that is a valid file name: from its file name if all file names are unique, else from its path."""
    stems = [_sanitised(stem(path)) for path in paths]
    if len(set(stems)) == len(set(paths)):
        return stems
    return [_sanitised(without_ending(str(PurePosixPath(path.replace("\\", "/"))))) for path in paths]


def _sanitised(name: str) -> str:
    return re.sub(r"[^\w.-]+", "__", unicodedata.normalize("NFC", name)).strip(".") or "_"


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    files = sorted(path for path in source.glob("*.csv") if not path.name.startswith(".")) if source.is_dir() else []
    if len(files) != 1:
        raise InputError(
            f"{source}: --source must name a CSV file with the columns {','.join(COLUMNS)} (or a folder with one; it holds {len(files)})"
        )
    return files[0]


def _check_header(file: Path, header: list[str], rows: list[tuple[int, list[str]]], columns: Sequence[str]) -> None:
    problems = []
    if "fold" in header and "fold" not in columns:
        problems.append(f"{file}: has a column fold: leave out --folds, or take the column out of the file")
    missing = [name for name in columns if name not in header]
    if missing:
        hint = "; separate columns by commas" if any(mark in ",".join(header) for mark in ";\t") else ""
        problems.append(f"{file}: no column {' and no column '.join(missing)} in its header ({','.join(header)}){hint}")
        if missing == ["fold"]:
            problems[-1] += f"; without folds of its own: --folds {LEAVE_ONE_OUT}, or --folds K for K folds of disjoint speakers"
    problems += [f"{file}: two columns are called {name}" for name in (*COLUMNS, *DIMENSIONS, TEXT) if header.count(name) > 1]
    if not missing and not rows:
        problems.append(f"{file}: holds no row")
    if problems:
        raise InputError(problems)
