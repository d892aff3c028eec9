"""Lines for the user about corpora: what a prepared one holds, and the command that prepares one. Pure."""

from __future__ import annotations

import re
from pathlib import Path

from ser_core.corpora.manifest import Manifest

OWN_KINDS = ("iemocap", "savee", "emodb", "ravdess", "cremad", "tess")
KIND_OF = {**{kind: kind for kind in OWN_KINDS}, "librispeech": "unlabelled"}  # name of a corpus -> what prepares it
OTHER_KIND = "csv"
MANY = ("csv", "labels", "unlabelled")  # kinds of which a user may have several corpora
BENCHMARK = "emobox"  # its corpora are called emobox-NAME, since other readers read some of them too


def corpus_line(manifest: Manifest) -> str:
    """Return size, classes, folds and folder of a prepared corpus in one line."""
    speakers = len({utterance.speaker for utterance in manifest.utterances})
    size = f"{_counted(len(manifest.utterances), 'utterance')}, {manifest.seconds / 60:.1f} min, {_counted(speakers, 'speaker')}"
    return (
        f"{manifest.corpus}: {size}, classes {', '.join(manifest.classes)}, folds {', '.join(manifest.folds)}; "
        f"digest {manifest.digest[:12]}; in {manifest.folder}"
    )


def default_name(kind: str, source: Path) -> str:
    """Return the name of a corpus that was given none: its kind, or for kinds of many corpora the name of the source file or folder."""
    if kind == BENCHMARK:
        return f"{BENCHMARK}-{source.stem}"
    return source.resolve().stem if kind in MANY else kind


def how_to_prepare(name: str) -> str:
    """Return the command that prepares a corpus of this name, and the one that needs no data."""
    kind = KIND_OF.get(name, OTHER_KIND)
    more = f"{kind} --source FOLDER" if kind == name else f"{kind} --source FOLDER --name {name}"
    if name.startswith(f"{BENCHMARK}-"):
        listed = name.removeprefix(f"{BENCHMARK}-")
        more = f"{BENCHMARK} --meta data/{listed}/{listed}.jsonl --audio FOLDER"
    if match := re.fullmatch(r"demo-(\d*\.?\d+)", name):
        return f"run `python launch.py prepare demo --strength {match[1]}`"
    return f"run `python launch.py prepare {more}`, or try `python launch.py grid demo`, which needs no data"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
