"""Lines for the user about corpora: what a prepared one holds, and the command that prepares one. Pure."""

from __future__ import annotations

from ser_core.corpora.manifest import Manifest

KIND_OF = {"iemocap": "iemocap", "savee": "savee", "emodb": "emodb", "librispeech": "unlabelled"}  # name of a corpus -> what prepares it
OTHER_KIND = "csv"


def corpus_line(manifest: Manifest) -> str:
    """Return size, classes, folds and folder of a prepared corpus in one line."""
    speakers = len({utterance.speaker for utterance in manifest.utterances})
    size = f"{_counted(len(manifest.utterances), 'utterance')}, {manifest.seconds / 60:.1f} min, {_counted(speakers, 'speaker')}"
    return (
        f"{manifest.corpus}: {size}, classes {', '.join(manifest.classes)}, folds {', '.join(manifest.folds)}; "
        f"digest {manifest.digest[:12]}; in {manifest.folder}"
    )


def how_to_prepare(name: str) -> str:
    """Return the command that prepares a corpus of this name, and the one that needs no data."""
    kind = KIND_OF.get(name, OTHER_KIND)
    more = "" if kind == name else f" --name {name}"
    return f"run `python launch.py prepare {kind} --source FOLDER{more}`, or try `python launch.py grid demo`, which needs no data"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
