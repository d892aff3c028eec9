"""The lists of EmoBox (Ma et al. 2024) as they are on disk: recordings, speakers, labels' names and folds. Knows no audio."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ser_core.corpora.manifest import VALIDATION, natural_order
from ser_core.corpora.recordings import Excerpt
from ser_core.disk import raise_storage_error
from ser_core.errors import InputError

# Of a line `KEY CHANNEL SPEAKER START END <id=KEY,lang=en,spk=SPEAKER,emotion=LABEL> LABEL`; keys and speakers may have spaces.
SEGMENT = re.compile(r"<id=(.+),lang=[^,]*,spk=(.*),emotion=[^>]*>")
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Listed:
    """One recording of a list."""

    key: str
    wav: str  # path as listed: `downloads/CORPUS/...`
    label: str  # the raw code
    excerpt: Excerpt


def read_recordings(file: Path) -> tuple[Listed, ...]:
    """Return the recordings of `CORPUS.jsonl`, a JSON object a line. Raises InputError for another format and a repeated key."""
    found: list[Listed] = []
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, record in _objects(file):
        where = f"{file.name} line {number}"
        try:
            times = [None if record.get(name) is None else float(record[name]) for name in ("start_time", "end_time")]
            channel = record.get("channel")
            listed = Listed(
                str(record["key"]), str(record["wav"]), str(record["emo"]), Excerpt(None if channel is None else int(channel), *times)
            )
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{where}: no recording of EmoBox ({error!r}); it has key, wav, emo, and channel from 1")
            continue
        if listed.excerpt.channel is not None and listed.excerpt.channel < 1:
            problems.append(f"{where}: channel {listed.excerpt.channel} of {listed.key}; channels are numbered from 1")
        elif listed.key in first:
            problems.append(f"{where}: duplicate of line {first[listed.key]}: {listed.key}; keep one")
        else:
            first[listed.key] = number
            found.append(listed)
    if problems:
        raise InputError(problems)
    return tuple(found)


def read_speakers(folder: Path) -> dict[str, str]:
    """Return key -> speaker from `data.seg.wrd.stm`; empty if there is no such file.

    A path before the speaker's name, as in JL-Corpus, is left out. A speaker that is the recording's own name, as in RESD, is none.
    """
    file = folder / "data.seg.wrd.stm"
    if not file.is_file():
        return {}
    found = {}
    for line in _text(file).splitlines():
        if match := SEGMENT.search(line):
            key, speaker = match[1], match[2].rpartition("/")[2]
            if speaker and key.partition("-")[2] != match[2]:
                found[key] = speaker
    return found


def read_label_names(folder: Path) -> dict[str, str] | None:
    """Return raw code -> name from `label_map.json` or `label_dict.json`; None without either. Raises InputError for another format."""
    file = next((folder / name for name in ("label_map.json", "label_dict.json") if (folder / name).is_file()), None)
    if file is None:
        return None
    try:
        record = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(record, dict) or not all(isinstance(name, str) for name in record.values()):
        raise InputError(f"{file}: it must be an object of texts, from the code of a label to its name")
    return record


def name_of_label(code: str, names: Mapping[str, str]) -> str | None:
    """The name of a raw code, exactly or, if that is not there, in another case; None without or with several such names."""
    if code in names:
        return names[code]
    found = {name for other, name in names.items() if other.casefold() == code.casefold()}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class Split:
    """Which fold each recording belongs to."""

    fold_of: Mapping[str, str]  # key -> fold
    folds: tuple[str, ...]  # held-out folds, in order
    problems: tuple[str, ...]
    ignored: tuple[str, ...]  # names of files in the folders of folds that are no lists of a part


def read_split(folder: Path, corpus: str, keys: Sequence[str]) -> Split:
    """The folds below `folder`: a fold is what `fold_K/CORPUS_test_fold_K.jsonl` lists. One fold gives parts.

    Problems: a training part that is not every other recording of the corpus, a recording in no test part or in two.
    """
    lists, ignored, problems = _parts(folder, corpus)
    known = set(keys)
    whole: list[str] = []
    for number in sorted(lists, key=natural_order):
        parts = lists[number]
        absent = [part for part in ("train", "test") if not parts.get(part)]
        if absent:
            problems.append(f"{folder / f'fold_{number}'}: no {corpus}_{absent[0]}_fold_{number}.jsonl, or nothing in it")
            continue
        whole.append(number)
        held_out = parts["test"] | parts.get("valid", set())
        for part in parts:
            file = f"{corpus}_{part}_fold_{number}.jsonl"
            problems += _difference(file, f"names recordings that {corpus}.jsonl lacks", parts[part] - known)
        train = f"{corpus}_train_fold_{number}.jsonl"
        problems += _difference(train, "lacks recordings that are neither for test nor for validation", known - held_out - parts["train"])
        problems += _difference(train, "names recordings that are for test or validation", parts["train"] & held_out)
    if not lists:
        problems.append(f"{folder}: no fold_K/{corpus}_test_fold_K.jsonl; --meta must name {corpus}.jsonl in EmoBox's own folder")
    if len(whole) == 1:
        of_part = {"train": "train", "valid": VALIDATION, "test": "test"}
        fold_of = {key: of_part[part] for part in PARTS for key in lists[whole[0]].get(part, ())}
        return Split(fold_of, ("test",), tuple(problems), tuple(ignored))
    fold_of = {}
    for number in whole:
        if lists[number].get("valid"):
            problems.append(f"{corpus}_valid_fold_{number}.jsonl: a validation part is read of a corpus with one fold only")
        twice = lists[number]["test"] & fold_of.keys()
        problems += _difference(f"{corpus}_test_fold_{number}.jsonl", "names recordings of the test part of another fold", twice)
        fold_of.update(dict.fromkeys(lists[number]["test"], number))
    if whole:
        problems += _difference(f"{corpus}.jsonl", "has recordings in no test part", known - fold_of.keys())
    return Split(fold_of, tuple(whole), tuple(problems), tuple(ignored))


def _parts(folder: Path, corpus: str) -> tuple[dict[str, dict[str, set[str]]], list[str], list[str]]:
    """Fold -> part -> keys; names of other JSON Lines files, such as `emodb_test_fold1.jsonl`, which has other keys; problems."""
    name = re.compile(rf"{re.escape(corpus)}_({'|'.join(PARTS)})_fold_(\d+)\.jsonl")
    lists: dict[str, dict[str, set[str]]] = {}
    ignored: list[str] = []
    problems: list[str] = []
    for file in sorted(folder.glob("fold_*/*.jsonl")):
        match = name.fullmatch(file.name)
        if match is None:
            ignored.append(file.name)
        elif file.parent.name != f"fold_{match[2]}":
            problems.append(f"{file.parent.name}/{file.name}: belongs into fold_{match[2]}")
        else:
            lists.setdefault(match[2], {})[match[1]] = {str(record.get("key")) for _, record in _objects(file)}
    return lists, ignored, problems


def _difference(file: str, what: str, keys: set[str]) -> list[str]:
    return [f"{file}: {what}: {len(keys)}, the first is {min(keys)}"] if keys else []


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of every line that is not empty. Raises InputError for a line that is no JSON object."""
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file} line {number}: not JSON ({error.msg}); the file has an object a line") from error
        if not isinstance(record, dict):
            raise InputError(f"{file} line {number}: not a JSON object; the file has an object a line")
        yield number, record


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise_storage_error(error)
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from error
