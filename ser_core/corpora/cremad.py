"""Reader of CREMA-D (Cao et al. 2014): 91 actors, six emotions, coded in file names; five folds of our own.

The corpus has no folds, and the split of the EmoBox benchmark has every actor on both sides. An actor's fold follows from a hash of the
number, so that it is the same on every machine and does not depend on which actors are there: 19 actors in fold 1, 18 in the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from ser_core.corpora.recordings import ExpectedCounts, Recording, SourceListing, audio_files, relative, require_folder

ACTORS = tuple(str(number) for number in range(1001, 1092))
FOLDS = ("1", "2", "3", "4", "5")
SALT = "CREMA-D"  # another one would give other folds
LABELS = {"ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
COUNTS = ExpectedCounts(
    utterances=7442,
    classes={label: 1087 if label == "neutral" else 1271 for label in LABELS.values()},
    folds={"1": 1551, "2": 1476, "3": 1470, "4": 1470, "5": 1475},
)
NAME = re.compile(r"(1\d\d\d)_[A-Z]{3}_([A-Z]{3})_[A-Z]{1,2}")  # actor, sentence, emotion, level


def folds_of_actors() -> dict[str, str]:
    """Return actor -> fold."""
    ordered = sorted(ACTORS, key=lambda actor: hashlib.sha256(f"{SALT} {actor}".encode()).hexdigest())
    return {actor: FOLDS[place % len(FOLDS)] for place, actor in enumerate(ordered)}


def read(source: Path, *, required: Collection[str] | None = FOLDS) -> SourceListing:
    """List the recordings below `source`.

    `required`: the folds whose actors must all be present; None accepts any. Raises InputError if `source` is not a folder.
    """
    require_folder(source)
    files = list(audio_files(source))
    if not files:
        return SourceListing((), (f"{source}: holds no wav or FLAC file; --source must name the folder of CREMA-D's AudioWAV",), ())
    fold_of = folds_of_actors()
    found: list[Recording] = []
    problems: list[str] = []
    for path in files:
        where = relative(path, source)
        name = NAME.fullmatch(path.stem)
        if name is None:
            problems.append(f"{where}: not a name of CREMA-D, such as 1001_DFA_ANG_XX.wav; move it away")
        elif name[2] not in LABELS:
            problems.append(f"{where}: unknown label {name[2]!r}; CREMA-D has {' '.join(LABELS)}")
        elif name[1] not in fold_of:
            problems.append(f"{where}: unknown actor {name[1]!r}; CREMA-D has {ACTORS[0]} to {ACTORS[-1]}")
        else:
            found.append(Recording(path.stem, path, LABELS[name[2]], name[1], fold_of[name[1]]))
    present = {utterance.speaker for utterance in found}
    missing = [actor for actor in ACTORS if fold_of[actor] in (required or ()) and actor not in present]
    problems += [f"{source}: actor {actor} is missing; unpack all of AudioWAV" for actor in missing]
    folds = tuple(sorted({fold_of[actor] for actor in (*present, *missing)}))
    return SourceListing(tuple(found), tuple(problems), folds, COUNTS, {"folds": "five sets of actors, by a hash of their numbers"})
