"""Reader of RAVDESS (Livingstone & Russo 2018): 24 actors, eight emotions, coded in file names; its spoken part, audio only."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ser_core.corpora.recordings import ExpectedCounts, Recording, SourceListing, audio_files, relative, require_folder

# The folds of the EmoBox benchmark (Ma et al. 2024): four actors each.
FOLDS = {
    "1": ("01", "11", "20", "21"),
    "2": ("04", "10", "12", "14"),
    "3": ("08", "09", "19", "23"),
    "4": ("03", "05", "07", "24"),
    "5": ("02", "15", "16", "18"),
    "6": ("06", "13", "17", "22"),
}
FOLD_OF = {actor: fold for fold, actors in FOLDS.items() for actor in actors}
LABELS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fear",
    "07": "disgust",
    "08": "surprise",
}
# Neutral is spoken in one intensity, the other emotions in two.
COUNTS = ExpectedCounts(
    utterances=1440,
    classes={label: 96 if label == "neutral" else 192 for label in LABELS.values()},
    folds=dict.fromkeys(FOLDS, 240),
)
AUDIO_ONLY, SPEECH = "03", "01"  # modality and vocal channel
# Modality, vocal channel, emotion, intensity, statement, repetition, actor.
NAME = re.compile(r"(\d\d)-(\d\d)-(\d\d)-\d\d-\d\d-\d\d-(\d\d)")


def read(source: Path, *, required: Collection[str] | None = tuple(FOLDS)) -> SourceListing:
    """List the spoken recordings below `source`. Songs, and the sound of videos, are left out and counted.

    `required`: the folds whose four actors must be present; None accepts any. Raises InputError if `source` is not a folder.
    """
    require_folder(source)
    files = list(audio_files(source))
    if not files:
        return SourceListing((), (f"{source}: holds no wav or FLAC file; --source must name the folder RAVDESS was unpacked to",), ())
    found: list[Recording] = []
    problems: list[str] = []
    others = 0
    for path in files:
        where = relative(path, source)
        name = NAME.fullmatch(path.stem)
        if name is None:
            problems.append(f"{where}: not a name of RAVDESS, such as 03-01-05-01-02-01-12.wav; move it away")
        elif (name[1], name[2]) != (AUDIO_ONLY, SPEECH):
            others += 1
        elif name[3] not in LABELS:
            problems.append(f"{where}: unknown label {name[3]!r}; RAVDESS has {' '.join(LABELS)}")
        elif name[4] not in FOLD_OF:
            problems.append(f"{where}: unknown actor {name[4]!r}; RAVDESS has 01 to 24")
        else:
            found.append(Recording(path.stem, path, LABELS[name[3]], name[4], FOLD_OF[name[4]]))
    present = {utterance.speaker for utterance in found}
    missing = sorted(actor for fold in required or () for actor in FOLDS.get(fold, ()) if actor not in present)
    problems += [f"{source}: actor {actor} is missing; unpack all 24 folders of the audio-only speech" for actor in missing]
    folds = tuple(fold for fold, actors in FOLDS.items() if present.union(missing).intersection(actors))
    notes = (f"songs and sound of videos left out: {others}",) if others else ()
    return SourceListing(tuple(found), tuple(problems), folds, COUNTS, notes=notes)
