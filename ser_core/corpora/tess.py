"""Reader of TESS (Pichora-Fuller & Dupuis 2020): two actresses, seven emotions, 200 words each, coded in file names.

A fold is an actress. Random splits, which have both on both sides, score about 98 % and tell nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ser_core.corpora.recordings import ExpectedCounts, Recording, SourceListing, audio_files, relative, require_folder

SPEAKERS = ("OAF", "YAF")  # older and younger adult
LABELS = {
    "angry": "angry",
    "disgust": "disgust",
    "fear": "fear",
    "happy": "happy",
    "neutral": "neutral",
    "ps": "surprise",  # pleasant surprise
    "sad": "sad",
}
COUNTS = ExpectedCounts(utterances=2800, classes=dict.fromkeys(LABELS.values(), 400), folds=dict.fromkeys(SPEAKERS, 1400))
NAME = re.compile(r"([A-Za-z]+)_([A-Za-z]+)_([A-Za-z]+)")  # speaker, word, emotion
MISNAMED = {"OA": "OAF"}  # OA_bite_neutral.wav, as it is distributed


def read(source: Path, *, required: Collection[str] | None = SPEAKERS) -> SourceListing:
    """List the recordings below `source`, flat or in a folder for each speaker and emotion.

    `required`: the speakers that must be present; None accepts any. Raises InputError if `source` is not a folder.
    """
    require_folder(source)
    files = list(audio_files(source))
    if not files:
        return SourceListing((), (f"{source}: holds no wav or FLAC file; --source must name the folder TESS was unpacked to",), ())
    found: list[Recording] = []
    problems: list[str] = []
    for path in files:
        where = relative(path, source)
        name = NAME.fullmatch(path.stem)
        speaker, label = (MISNAMED.get(name[1].upper(), name[1].upper()), name[3].lower()) if name else ("", "")
        if name is None:
            problems.append(f"{where}: not a name of TESS, such as OAF_back_angry.wav; move it away")
        elif speaker not in SPEAKERS:
            problems.append(f"{where}: unknown speaker {name[1]!r}; TESS has {' '.join(SPEAKERS)}")
        elif label not in LABELS:
            problems.append(f"{where}: unknown label {name[3]!r}; TESS has {' '.join(LABELS)}")
        else:
            found.append(Recording(f"{speaker}_{name[2].lower()}_{label}", path, LABELS[label], speaker, speaker))
    present = {utterance.speaker for utterance in found}
    missing = [speaker for speaker in required or () if speaker not in present]
    problems += [f"{source}: speaker {speaker} is missing; unpack the whole corpus" for speaker in missing]
    return SourceListing(tuple(found), tuple(problems), tuple(sorted({*present, *missing})), COUNTS)
