"""Reader of SAVEE (Haq & Jackson 2009): four male speakers, seven emotions, 120 sentences each, coded in file names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ser_core.corpora.recordings import ExpectedCounts, Recording, SourceListing, audio_files, relative, require_folder

SPEAKERS = ("DC", "JE", "JK", "KL")
LABELS = {"a": "angry", "d": "disgust", "f": "fear", "h": "happy", "n": "neutral", "sa": "sad", "su": "surprise"}
COUNTS = ExpectedCounts(
    utterances=480,
    classes={"angry": 60, "disgust": 60, "fear": 60, "happy": 60, "neutral": 120, "sad": 60, "surprise": 60},
    folds=dict.fromkeys(SPEAKERS, 120),
)
NAME = re.compile(r"(?:([A-Z]{2})_)?([a-z]+)(\d+)")


def read(source: Path, *, required: Collection[str] | None = SPEAKERS) -> SourceListing:
    """List the recordings below `source`, flat (`DC_a01.wav`) or in a folder per speaker (`AudioData/DC/a01.wav`). A fold is a speaker.

    `required`: the speakers that must be present; None accepts any. Raises InputError if `source` is not a folder.
    """
    require_folder(source)
    files = list(audio_files(source))
    if not files:
        return SourceListing((), (f"{source}: holds no wav or FLAC file; --source must name the folder SAVEE was unpacked to",), ())
    found: list[Recording] = []
    problems: list[str] = []
    for path in files:
        where = relative(path, source)
        name = NAME.fullmatch(path.stem)
        if name is None:
            problems.append(f"{where}: not a name of SAVEE, such as DC_sa04.wav or DC/sa04.wav; move it away")
            continue
        speaker = name[1] or path.parent.name
        if speaker not in SPEAKERS:
            problems.append(
                f"{where}: unknown speaker {speaker!r}; SAVEE has {' '.join(SPEAKERS)}, as a prefix (DC_a01.wav) or a folder (DC/a01.wav)"
            )
        elif name[2] not in LABELS:
            problems.append(f"{where}: unknown label {name[2]!r}; SAVEE has {' '.join(LABELS)}")
        else:
            found.append(Recording(f"{speaker}_{name[2]}{name[3]}", path, LABELS[name[2]], speaker, speaker))
    present = {utterance.speaker for utterance in found}
    missing = [speaker for speaker in required or () if speaker not in present]
    problems += [f"{source}: speaker {speaker} is missing; unpack the whole corpus" for speaker in missing]
    return SourceListing(tuple(found), tuple(problems), tuple(sorted({*present, *missing})), COUNTS)
