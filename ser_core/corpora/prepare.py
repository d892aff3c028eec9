"""Prepare a corpus: check the source, convert it to 16 kHz mono FLAC, write a manifest to `data/<corpus>`.

The target appears only when it is complete: utterances are converted into a hidden staging folder beside it, which finally replaces the
target by a rename. A killed prepare leaves the staging folder, and the next one resumes from it; one that finds a problem removes it. Files
of a corpus prepared before are compared by size and mtime, and only changed ones are converted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ser_core.corpora.audio import AudioError, convert, encode
from ser_core.corpora.checks import count_problems, speakers_trained_and_tested, structure_problems
from ser_core.corpora.manifest import MANIFEST_NAME, Manifest, Utterance, load_manifest, write_manifest
from ser_core.corpora.readers import NAMED_BY_USER, Options, read
from ser_core.corpora.recordings import Recording, SourceListing, relative
from ser_core.corpora.staging import locked, replace_folder
from ser_core.errors import InputError

CONVERSION = 1  # version of `audio.convert`; incrementing it makes every file be converted again
JOURNAL = "conversions.jsonl"
MOST_WORKERS = 8  # threads; more would wait for the disk

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """One line of the journal: a stored file, the source file it was converted from, and their digests."""

    id: str
    source: str  # relative to the source folder
    size: int  # bytes of the source file
    time: int  # mtime of the source file, ns
    samples: int
    audio_digest: str  # of the samples
    stored: str  # sha256 of the stored file
    version: int = CONVERSION
    excerpt: str = ""  # the part of the source file; "": all of it
    constant: bool = False  # all samples are equal


def prepare(
    kind: str,
    source: Path,
    target: Path,
    *,
    name: str | None = None,
    check_counts: bool = True,
    four_classes: bool = False,
    audio: Path | None = None,
    folds: str | None = None,
    shared_speakers: bool = False,
    facts: Mapping[str, Any] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Prepare the corpus at `source` into the folder `target`.

    `kind`: one of `readers.KINDS`; for csv and labels `source` is the file or the folder that holds it, for emobox the list of the corpus.
    `name`: name of the corpus; by default its kind, or the target's name for emobox, csv, labels and unlabelled.
    `check_counts`: compare the numbers of utterances of classes and folds with the published counts, or with those in
    `source/expected_counts.json`; without the check any sessions or speakers are accepted.
    `four_classes` (emodb): only the classes of IEMOCAP. `audio` (labels, emobox): the folder of the recordings.
    `folds` (csv without the column fold): the rule of `ser_core.corpora.speaker_folds`.
    `shared_speakers` (emobox, csv, labels): speakers may be in several folds; the manifest's `source` has their number for each fold.
    `facts`: added to the manifest's `source`, not part of the digest. It also has `notes`, lines on what the reader decided, and on silent
    recordings. `progress(done, total)` is called with numbers of utterances.

    Raises InputError with one line per problem, all at once; the target then stays as it was.
    """
    home = target.resolve()
    _check_target(home)
    base = source if source.is_dir() else source.parent
    reading = read(kind, source, base, Options(check_counts, four_classes, audio, folds, shared_speakers))
    problems = [
        *reading.problems,
        *structure_problems(
            reading.found,
            reading.folds,
            base,
            labelled=reading.labelled,
            shared_speakers=shared_speakers,
            published_folds=reading.published_folds,
        ),
    ]
    if not problems and check_counts and reading.counts is not None:
        problems += count_problems(reading.found, reading.counts, base)
    corpus = name or (home.name if kind in NAMED_BY_USER else kind)
    threads = workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)

    staging = home.with_name(f".{home.name}.preparing")
    if problems:
        problems += _audio_problems(reading.found, base, threads, progress)
        if staging.exists():
            with locked(staging):
                shutil.rmtree(staging)
        raise InputError(problems)

    known = _intact(home, reading.found, base, threads)
    recorded = _recorded(kind, reading, base, known, facts or {})
    if len(known) == len(reading.found) and (manifest := _unchanged(home, corpus, reading, known, recorded)):
        if progress:
            progress(len(known), len(known))
        return replace(manifest, folder=target)
    with locked(staging):
        conversions, audio_problems = _convert_all(reading.found, base, staging, home, known, threads, progress)
        if audio_problems:
            shutil.rmtree(staging)
            raise InputError(audio_problems)
        _write_journal(staging, conversions)
        recorded = _recorded(kind, reading, base, conversions, facts or {})
        manifest = write_manifest(staging, corpus, reading.folds, _utterances(reading.found, conversions), recorded)
        replace_folder(staging, home)
    return replace(manifest, folder=target)


def prepared_already(target: Path, facts: Mapping[str, Any]) -> Manifest | None:
    """Return the manifest at `target` if it was prepared with these facts and every stored file is intact; otherwise None."""
    try:
        manifest = load_manifest(target)
    except InputError:
        return None
    journal = _read_journal(target)
    if any(manifest.source.get(key) != value for key, value in facts.items()):
        return None
    for utterance in manifest.utterances:
        conversion = journal.get(utterance.id)
        if conversion is None or conversion.version != CONVERSION or _stored_digest(manifest.audio_path(utterance)) != conversion.stored:
            return None
    return manifest


def _recorded(
    kind: str, reading: SourceListing, base: Path, conversions: Mapping[str, Conversion], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What the manifest states of the source, as JSON values."""
    shared = speakers_trained_and_tested(reading.found, reading.folds)
    silent = [
        f"{_name(utterance.path, base)}: silent, all its samples are equal"
        for utterance in reading.found
        if utterance.id in conversions and conversions[utterance.id].constant
    ]
    notes = [*reading.notes, *silent]
    record = {
        "kind": kind,
        **reading.facts,
        **({"shared_speakers": shared} if reading.labelled and any(shared.values()) else {}),
        **({"notes": notes} if notes else {}),
        **facts,
    }
    values: dict[str, Any] = json.loads(json.dumps(record))
    return values


def _name(path: Path, base: Path) -> str:
    """A file's path inside of the source; its name alone elsewhere, since manifests hold no absolute path."""
    return relative(path, base) if path.is_relative_to(base) else path.name


def _check_target(home: Path) -> None:
    if home.exists() and not home.is_dir():
        raise InputError(f"{home}: is a file; the target must be a folder of its own")
    if home.is_dir() and any(home.iterdir()) and not (home / MANIFEST_NAME).exists():
        raise InputError(f"{home}: holds other things and no {MANIFEST_NAME}; the target must be a folder of its own")


def _stored_name(identifier: str) -> str:
    return f"audio/{identifier}.flac"


def _audio_problems(found: Sequence[Recording], base: Path, threads: int, progress: Progress | None) -> list[str]:
    """Return one line per recording that cannot be converted, in the order of `found`; writes nothing."""

    def problem(utterance: Recording) -> str | None:
        try:
            convert(utterance.path, utterance.excerpt)
        except AudioError as error:
            return f"{relative(utterance.path, base)}: {error}"
        return None

    lines = []
    with ThreadPoolExecutor(threads) as pool:
        for done, line in enumerate(pool.map(problem, found), start=1):
            lines += [line] if line else []
            if progress:
                progress(done, len(found))
    return lines


def _intact(folder: Path, found: Sequence[Recording], base: Path, threads: int) -> dict[str, Conversion]:
    """Return id -> conversion for those in `folder` whose source file is unchanged and whose stored file is intact."""
    journal = _read_journal(folder)

    def usable(utterance: Recording) -> Conversion | None:
        conversion = journal.get(utterance.id)
        if conversion is None or conversion.version != CONVERSION or conversion.source != relative(utterance.path, base):
            return None
        if conversion.excerpt != str(utterance.excerpt):
            return None
        try:
            status = utterance.path.stat()
        except OSError:
            return None
        same = (conversion.size, conversion.time) == (status.st_size, status.st_mtime_ns)
        return conversion if same and _stored_digest(folder / _stored_name(utterance.id)) == conversion.stored else None

    if not journal:
        return {}
    with ThreadPoolExecutor(threads) as pool:
        return {conversion.id: conversion for conversion in pool.map(usable, found) if conversion}


def _stored_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _convert_all(
    found: Sequence[Recording],
    base: Path,
    staging: Path,
    home: Path,
    known: Mapping[str, Conversion],
    threads: int,
    progress: Progress | None,
) -> tuple[dict[str, Conversion], list[str]]:
    """Fill `staging` with every utterance: from an interrupted prepare, from the existing corpus at `home`, or converted from the source.

    Returns id -> conversion, and one line per recording that cannot be converted.
    """
    (staging / "audio").mkdir(exist_ok=True)
    conversions = _intact(staging, found, base, threads)
    for identifier, conversion in known.items():
        if identifier not in conversions:
            _link(home / _stored_name(identifier), staging / _stored_name(identifier))
            conversions[identifier] = conversion
    todo = [utterance for utterance in found if utterance.id not in conversions]
    done = len(conversions)
    if progress:
        progress(done, len(found))
    failed: dict[str, str] = {}
    with (staging / JOURNAL).open("a", encoding="utf-8") as journal, ThreadPoolExecutor(threads) as pool:
        futures = {pool.submit(_convert, utterance, base, staging): utterance for utterance in todo}
        try:
            for future in as_completed(futures):
                utterance = futures[future]
                try:
                    conversion = future.result()
                except AudioError as error:
                    failed[utterance.id] = f"{relative(utterance.path, base)}: {error}"
                else:
                    conversions[utterance.id] = conversion
                    journal.write(json.dumps(asdict(conversion)) + "\n")
                    journal.flush()
                done += 1
                if progress:
                    progress(done, len(found))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return conversions, [failed[utterance.id] for utterance in found if utterance.id in failed]


def _convert(utterance: Recording, base: Path, staging: Path) -> Conversion:
    try:
        status = utterance.path.stat()  # before reading: a file that changes meanwhile is converted again by the next prepare
    except OSError as error:
        raise AudioError(f"unreadable: {error.strerror}") from error
    converted = convert(utterance.path, utterance.excerpt)
    encoded = encode(converted.samples)
    path = staging / _stored_name(utterance.id)
    path.unlink(missing_ok=True)  # it may be a hard link to a file of the existing corpus
    with path.open("wb") as stream:
        stream.write(encoded)
        stream.flush()
        os.fsync(stream.fileno())
    return Conversion(
        id=utterance.id,
        source=relative(utterance.path, base),
        size=status.st_size,
        time=status.st_mtime_ns,
        samples=len(converted.samples),
        audio_digest=converted.digest,
        stored=hashlib.sha256(encoded).hexdigest(),
        excerpt=str(utterance.excerpt),
        constant=converted.constant,
    )


def _utterances(found: Sequence[Recording], conversions: Mapping[str, Conversion]) -> list[Utterance]:
    return [
        Utterance(
            id=utterance.id,
            audio=_stored_name(utterance.id),
            samples=conversions[utterance.id].samples,
            label=utterance.label,
            speaker=utterance.speaker,
            fold=utterance.fold,
            dimensions=utterance.dimensions,
            audio_digest=conversions[utterance.id].audio_digest,
            text=utterance.text,
        )
        for utterance in found
    ]


def _unchanged(
    home: Path, corpus: str, reading: SourceListing, known: Mapping[str, Conversion], recorded: Mapping[str, Any]
) -> Manifest | None:
    """Return the manifest at `home` if preparing again would write the same one."""
    try:
        manifest = load_manifest(home)
    except InputError:
        return None
    wanted = (corpus, reading.folds, tuple(sorted(_utterances(reading.found, known), key=lambda utterance: utterance.id)), dict(recorded))
    return manifest if (manifest.corpus, manifest.folds, manifest.utterances, dict(manifest.source)) == wanted else None


def _read_journal(folder: Path) -> dict[str, Conversion]:
    """Return id -> conversion; lines that cannot be parsed (an incomplete last line after a kill) are skipped."""
    try:
        lines = (folder / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    conversions = {}
    for line in lines:
        try:
            conversion = Conversion(**json.loads(line))
        except (ValueError, TypeError):
            continue
        conversions[conversion.id] = conversion
    return conversions


def _write_journal(folder: Path, conversions: Mapping[str, Conversion]) -> None:
    """Rewrite the journal without duplicates and removed utterances, and delete the files of the latter."""
    lines = [json.dumps(asdict(conversions[identifier])) for identifier in sorted(conversions)]
    (folder / JOURNAL).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    wanted = {_stored_name(identifier) for identifier in conversions}
    for path in (folder / "audio").iterdir():
        if path.relative_to(folder).as_posix() not in wanted:
            path.unlink()


def _link(existing: Path, new: Path) -> None:
    new.unlink(missing_ok=True)
    try:
        new.hardlink_to(existing)
    except OSError:  # a file system without hard links
        shutil.copyfile(existing, new)
