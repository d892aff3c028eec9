"""Reader of the authors' format: a JSON file {"Train": {file: label}, "Val": {...}, "Test": {...}} and a folder of recordings.

A fixed split, so there is one held-out fold, "test". "Val" is kept in the manifest and never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ser_core.corpora import emodb, iemocap, savee
from ser_core.corpora.csv_corpus import identifiers
from ser_core.corpora.manifest import VALIDATION
from ser_core.corpora.recordings import Recording, SourceListing, audio_files, by_stem, relative, stem
from ser_core.disk import raise_storage_error
from ser_core.errors import InputError

FOLD_OF = {"Train": "train", "Val": VALIDATION, "Test": "test"}


class _Repeated(dict[str, Any]):
    """A JSON object with the list of its repeated keys; `json` alone would silently keep the last value."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = sorted({name for name in names if names.count(name) > 1}) if len(self) < len(names) else []


def read(source: Path, *, audio: Path | None = None) -> SourceListing:
    """List the recordings that the JSON file names.

    `source`: the file, or a folder that holds one. `audio`: the folder of the recordings, searched recursively; by default the folder of
    the JSON file. Speakers are taken from the file names if all of them follow IEMOCAP, SAVEE or EmoDB; otherwise speakers are unknown, and
    it cannot be checked that none is in both training and test part. Raises InputError if there is no such file or its format is wrong.
    """
    file = _find(source)
    record = _parse(file)
    folder = file.parent if audio is None else audio
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --audio must name the folder of the recordings")
    recordings = by_stem(audio_files(folder))
    problems = [f"{file.name}: {part} names {name} twice; keep one" for part in FOLD_OF for name in _repeated(record.get(part))]
    entries = [(part, name, label) for part in FOLD_OF for name, label in record.get(part, {}).items()]
    ids = dict(zip((name for _, name, _ in entries), identifiers([name for _, name, _ in entries]), strict=True))
    speakers = _speakers(stem(name) for _, name, _ in entries)
    found: list[Recording] = []
    first: dict[str, str] = {}
    for part, name, label in entries:
        where = f"{file.name}: {part}: {name}"
        if name in first:
            problems.append(f"{where}: duplicate turn, also in {first[name]}; keep one")
            continue
        first[name] = part
        if not isinstance(label, str) or not label:
            problems.append(f"{where}: unknown label {label!r}; a label is a text")
            continue
        matches = [folder / name] if (folder / name).is_file() else recordings.get(stem(name), [])
        if not matches:
            problems.append(f"{where}: no audio: there is no such file below {folder}")
        elif len(matches) > 1:
            problems.append(
                f"{where}: {len(matches)} files of this name, {' and '.join(relative(path, folder) for path in matches[:2])}; keep one"
            )
        else:
            found.append(Recording(ids[name], matches[0], label, speakers.get(stem(name), ""), FOLD_OF[part]))
    for part in ("Train", "Test"):
        if not record.get(part):
            problems.append(f"{file.name}: {part} is missing or empty; a split needs both Train and Test")
    return SourceListing(tuple(found), tuple(problems), ("test",), None, {"speakers": "from the file names" if speakers else "not known"})


def _speakers(stems: Iterable[str]) -> dict[str, str]:
    """Return file name -> speaker if one naming scheme fits all file names, otherwise an empty mapping."""
    names = list(stems)
    schemes: list[Callable[[str], str]] = [
        lambda name: f"{int(match[1])}{match[2]}" if (match := iemocap.TURN.fullmatch(name)) else "",
        lambda name: match[1] if (match := savee.NAME.fullmatch(name)) and match[1] in savee.SPEAKERS else "",
        lambda name: match[1] if (match := emodb.NAME.fullmatch(name)) and match[1] in emodb.FOLD_OF else "",
    ]
    for scheme in schemes:
        speakers = {name: scheme(name) for name in names}
        if speakers and all(speakers.values()):
            return speakers
    return {}


def _repeated(part: Any) -> list[str]:
    return part.repeated if isinstance(part, _Repeated) else []


def _parse(file: Path) -> dict[str, dict[str, Any]]:
    try:
        record = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_Repeated)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise_storage_error(error)
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
    wrong = "" if isinstance(record, dict) else "it is not an object"
    if not wrong:
        unknown = sorted(set(record) - set(FOLD_OF))
        wrong = f"unknown key {', '.join(unknown)}" if unknown else ""
    if not wrong:
        wrong = ", ".join(f"{part} is not an object" for part in FOLD_OF if not isinstance(record.get(part, {}), dict))
    if wrong:
        raise InputError(f'{file}: {wrong}; its form is {{"Train": {{file: label}}, "Val": {{...}}, "Test": {{...}}}}')
    return dict(record)


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    files = sorted(path for path in source.glob("*.json") if not path.name.startswith(".") and path.name != "expected_counts.json")
    if len(files) != 1:
        raise InputError(
            f"{source}: --source must name the JSON file with Train, Val and Test (or a folder with one; it holds {len(files)})"
        )
    return files[0]
