"""The manifest of a prepared corpus: a JSON file with its utterances, classes and folds.

Imports no third-party library: the command line reads the digest at every start.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ser_core.corpora.captions import caption_sentences
from ser_core.disk import raise_storage_error, sync_folder
from ser_core.errors import InputError

SCHEMA = 1
SAMPLE_RATE = 16_000  # Hz, the sample rate of wav2vec v1 and 2.0
MANIFEST_NAME = "manifest.json"
VALIDATION = "validation"  # fold name of a fixed split's validation part, used neither for training nor for the test

DIMENSIONS = ("valence", "activation", "dominance")


@dataclass(frozen=True)
class Utterance:
    """One prepared utterance, 16 kHz mono."""

    id: str
    audio: str  # path relative to the corpus folder
    samples: int
    label: str
    speaker: str  # "" if unknown
    fold: str
    dimensions: tuple[float, float, float] | None = None  # valence, activation, dominance
    audio_digest: str = ""  # sha256 of the samples, 16-bit little endian
    text: str | None = None  # transcript, which may be empty; None: the corpus has none


@dataclass(frozen=True)
class Manifest:
    """The utterances of a corpus, ordered by id, with its classes and held-out folds."""

    corpus: str
    digest: str
    classes: tuple[str, ...]
    folds: tuple[str, ...]
    utterances: tuple[Utterance, ...]
    folder: Path
    source: Mapping[str, Any] = field(default_factory=dict)  # origin of the corpus; not part of the digest

    def training(self, fold: str) -> tuple[Utterance, ...]:
        """Return the training utterances if `fold` is held out: those of the other folds except a fixed split's validation part."""
        self._check_fold(fold)
        kept_out = {fold} if VALIDATION in self.folds else {fold, VALIDATION}
        return tuple(utterance for utterance in self.utterances if utterance.fold not in kept_out)

    def test(self, fold: str) -> tuple[Utterance, ...]:
        """Return the utterances of the held-out fold."""
        self._check_fold(fold)
        return tuple(utterance for utterance in self.utterances if utterance.fold == fold)

    def audio_path(self, utterance: Utterance) -> Path:
        return self.folder / utterance.audio

    def class_index(self, utterance: Utterance) -> int:
        """Position of the utterance's label in `classes`."""
        return self.classes.index(utterance.label)

    @property
    def seconds(self) -> float:
        return sum(utterance.samples for utterance in self.utterances) / SAMPLE_RATE

    @property
    def text_digest(self) -> str:
        """The sha256 (hex) of ids and transcripts, which `digest` leaves out, since models of audio do not read them; "" without any."""
        return text_digest(self.utterances)

    @property
    def caption(self) -> tuple[str, ...]:
        """Sentences that captions of tables must state of the corpus."""
        return caption_sentences(self)

    def _check_fold(self, fold: str) -> None:
        if fold not in self.folds:
            raise InputError(f"{self.corpus}: no fold {fold!r}; it has {', '.join(self.folds)}")


def content_digest(classes: Iterable[str], folds: Iterable[str], utterances: Iterable[Utterance]) -> str:
    """Return the sha256 (hex) of what determines results: ids, labels, speakers, folds, dimensions and audio; not of paths and name."""
    lines = [
        json.dumps([u.id, u.samples, u.label, u.speaker, u.fold, list(u.dimensions) if u.dimensions else None, u.audio_digest])
        for u in sorted(utterances, key=lambda utterance: utterance.id)
    ]
    head = json.dumps([SCHEMA, SAMPLE_RATE, sorted(classes), sorted(folds)])
    return hashlib.sha256("\n".join([head, *lines]).encode()).hexdigest()


def text_digest(utterances: Iterable[Utterance]) -> str:
    """Return the sha256 (hex) of ids and transcripts; "" if no utterance has one."""
    lines = [json.dumps([u.id, u.text]) for u in sorted(utterances, key=lambda utterance: utterance.id) if u.text is not None]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts fold "2" before fold "10"."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.findall(r"\d+|\D+", name))


def write_manifest(
    folder: Path,
    corpus: str,
    folds: Sequence[str],
    utterances: Iterable[Utterance],
    source: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write `folder/manifest.json` atomically (temporary file, fsync, rename) and return the manifest."""
    ordered = tuple(sorted(utterances, key=lambda utterance: utterance.id))
    classes = tuple(sorted({utterance.label for utterance in ordered}))
    manifest = Manifest(corpus, content_digest(classes, folds, ordered), classes, tuple(folds), ordered, folder, dict(source or {}))
    record = {
        "schema": SCHEMA,
        "corpus": corpus,
        "digest": manifest.digest,
        "sample_rate": SAMPLE_RATE,
        "classes": list(classes),
        "folds": list(folds),
        "source": manifest.source,
        **({"text_digest": manifest.text_digest} if manifest.text_digest else {}),
        "utterances": [_to_json(utterance) for utterance in ordered],
    }
    write_atomically(folder / MANIFEST_NAME, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return manifest


def write_atomically(path: Path, text: str) -> None:
    """Replace the file `path` by `text` atomically, also in case of a power failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def load_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a prepared corpus.

    Raises InputError if it is missing, has another schema, or does not match its digest.
    """
    path = folder / MANIFEST_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no prepared corpus here; run `python launch.py prepare`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise_storage_error(error)
        raise InputError(f"{path}: cannot be read ({error}); run `python launch.py prepare` again") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or record.get("sample_rate") != SAMPLE_RATE:
        raise InputError(f"{path}: not a manifest of schema {SCHEMA} at {SAMPLE_RATE} Hz; run `python launch.py prepare` again")
    try:
        utterances = tuple(sorted((_from_json(entry) for entry in record["utterances"]), key=lambda utterance: utterance.id))
        manifest = Manifest(
            corpus=str(record["corpus"]),
            digest=str(record["digest"]),
            classes=tuple(record["classes"]),
            folds=tuple(record["folds"]),
            utterances=utterances,
            folder=folder,
            source=record.get("source", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: an entry is missing or of the wrong kind ({error!r}); run `python launch.py prepare` again") from error
    changed = content_digest(manifest.classes, manifest.folds, utterances) != manifest.digest
    if changed or text_digest(utterances) != record.get("text_digest", ""):
        raise InputError(
            f"{path}: its content does not fit its digest, so it was changed after it was written; run `python launch.py prepare` again"
        )
    return manifest


def _to_json(utterance: Utterance) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": utterance.id,
        "audio": utterance.audio,
        "samples": utterance.samples,
        "label": utterance.label,
        "speaker": utterance.speaker,
        "fold": utterance.fold,
    }
    if utterance.dimensions is not None:
        entry.update(zip(DIMENSIONS, utterance.dimensions, strict=True))
    if utterance.audio_digest:
        entry["audio_digest"] = utterance.audio_digest
    if utterance.text is not None:
        entry["text"] = utterance.text
    return entry


def _from_json(entry: Mapping[str, Any]) -> Utterance:
    dimensions = None
    if DIMENSIONS[0] in entry:
        dimensions = (float(entry["valence"]), float(entry["activation"]), float(entry["dominance"]))
    return Utterance(
        id=str(entry["id"]),
        audio=str(entry["audio"]),
        samples=int(entry["samples"]),
        label=str(entry["label"]),
        speaker=str(entry["speaker"]),
        fold=str(entry["fold"]),
        dimensions=dimensions,
        audio_digest=str(entry.get("audio_digest", "")),
        text=None if entry.get("text") is None else str(entry["text"]),
    )
