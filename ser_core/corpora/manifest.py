"""A prepared corpus: one JSON manifest that says which utterances there are and which of them a fold may train on.

Imports nothing outside the standard library: the command line reads digests at every start.
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

from ser_core.errors import InputError

SCHEMA = 1
SAMPLE_RATE = 16_000  # Hz; what wav2vec v1 and 2.0 were pretrained on
MANIFEST_NAME = "manifest.json"
VALIDATION = "validation"  # the part of a fixed split that is neither trained on nor tested

DIMENSIONS = ("valence", "activation", "dominance")


@dataclass(frozen=True)
class Utterance:
    """One recorded turn, as prepared: 16 kHz mono."""

    id: str
    audio: str  # path relative to the corpus folder
    samples: int
    label: str
    speaker: str  # "" where the source does not say
    fold: str
    dimensions: tuple[float, float, float] | None = None  # valence, activation, dominance
    audio_digest: str = ""  # sha256 of the samples, 16-bit little endian


@dataclass(frozen=True)
class Manifest:
    """The utterances of a corpus, ordered by id, with its classes and held-out folds."""

    corpus: str
    digest: str
    classes: tuple[str, ...]
    folds: tuple[str, ...]
    utterances: tuple[Utterance, ...]
    folder: Path
    source: Mapping[str, Any] = field(default_factory=dict)  # where it came from; no part of the digest

    def training(self, fold: str) -> tuple[Utterance, ...]:
        """Utterances that the stages of `fold` may see: those of the other folds, never a fixed split's validation part."""
        self._check_fold(fold)
        kept_out = {fold} if VALIDATION in self.folds else {fold, VALIDATION}
        return tuple(utterance for utterance in self.utterances if utterance.fold not in kept_out)

    def test(self, fold: str) -> tuple[Utterance, ...]:
        """Utterances of the held-out fold."""
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

    def _check_fold(self, fold: str) -> None:
        if fold not in self.folds:
            raise InputError(f"{self.corpus}: no fold {fold!r}; it has {', '.join(self.folds)}")


def content_digest(classes: Iterable[str], folds: Iterable[str], utterances: Iterable[Utterance]) -> str:
    """sha256 (hex) of what determines results: ids, labels, speakers, folds, dimensions and audio content.

    No path has a part in it, nor the corpus' name.
    """
    lines = [
        json.dumps([u.id, u.samples, u.label, u.speaker, u.fold, list(u.dimensions) if u.dimensions else None, u.audio_digest])
        for u in sorted(utterances, key=lambda utterance: utterance.id)
    ]
    head = json.dumps([SCHEMA, SAMPLE_RATE, sorted(classes), sorted(folds)])
    return hashlib.sha256("\n".join([head, *lines]).encode()).hexdigest()


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
    """Write `folder/manifest.json` whole or not at all (temporary file, fsync, rename) and return it as `load_manifest` would."""
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
        "utterances": [_to_json(utterance) for utterance in ordered],
    }
    write_atomically(folder / MANIFEST_NAME, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return manifest


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader sees the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_manifest(folder: Path) -> Manifest:
    """Read and check a prepared corpus.

    Raises InputError where there is none, where it is not a manifest of this schema, or where its content does not fit its digest.
    """
    path = folder / MANIFEST_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no prepared corpus here; run `python launch.py prepare`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
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
    # Digests of samples may be left out by a manifest written elsewhere; with them, an edited manifest is found out.
    if all(u.audio_digest for u in utterances) and content_digest(manifest.classes, manifest.folds, utterances) != manifest.digest:
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
    )
