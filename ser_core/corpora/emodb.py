"""Reader of EmoDB, the Berlin Database of Emotional Speech (Burkhardt et al. 2005): ten speakers, seven emotions, coded in file names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ser_core.corpora.recordings import ExpectedCounts, Recording, SourceListing, audio_files, relative, require_folder

# One man and one woman per fold.
FOLDS = {"03-08": ("03", "08"), "10-09": ("10", "09"), "11-13": ("11", "13"), "12-14": ("12", "14"), "15-16": ("15", "16")}
FOLD_OF = {speaker: fold for fold, pair in FOLDS.items() for speaker in pair}
# German initials: Wut, Langeweile, Ekel, Angst, Freude, Trauer.
LABELS = {"W": "angry", "L": "boredom", "E": "disgust", "A": "fear", "F": "happy", "T": "sad", "N": "neutral"}
FOUR_CLASSES = ("angry", "happy", "neutral", "sad")  # those of IEMOCAP
CLASS_COUNTS = {"angry": 127, "boredom": 81, "disgust": 46, "fear": 69, "happy": 71, "neutral": 79, "sad": 62}
FOLD_COUNTS = {"03-08": 107, "10-09": 81, "11-13": 116, "12-14": 104, "15-16": 127}
NAME = re.compile(r"(\d\d)([a-z]\d\d)([A-Z])([a-z]?)")


def read(source: Path, *, required: Collection[str] | None = tuple(FOLDS), four_classes: bool = False) -> SourceListing:
    """List the recordings below `source`; `four_classes` keeps only angry, happy, neutral and sad.

    `required`: the folds whose two speakers must be present; None accepts any. Raises InputError if `source` is not a folder.
    """
    require_folder(source)
    files = list(audio_files(source))
    if not files:
        return SourceListing((), (f"{source}: holds no wav or FLAC file; --source must name the folder EmoDB was unpacked to",), ())
    found: list[Recording] = []
    problems: list[str] = []
    present: set[str] = set()
    for path in files:
        where = relative(path, source)
        name = NAME.fullmatch(path.stem)
        if name is None:
            problems.append(f"{where}: not a name of EmoDB, such as 03a01Fa.wav; move it away")
        elif name[1] not in FOLD_OF:
            problems.append(f"{where}: unknown speaker {name[1]!r}; EmoDB has {' '.join(sorted(FOLD_OF))}")
        elif name[3] not in LABELS:
            problems.append(f"{where}: unknown label {name[3]!r}; EmoDB has {' '.join(LABELS)}")
        else:
            present.add(name[1])
            if not four_classes or LABELS[name[3]] in FOUR_CLASSES:
                found.append(Recording(path.stem, path, LABELS[name[3]], name[1], FOLD_OF[name[1]]))
    missing = [speaker for fold in required or () for speaker in FOLDS.get(fold, ()) if speaker not in present]
    problems += [f"{source}: speaker {speaker} is missing; unpack the whole corpus" for speaker in sorted(missing)]
    folds = tuple(fold for fold, pair in FOLDS.items() if present.union(missing).intersection(pair))
    return SourceListing(tuple(found), tuple(problems), folds, counts(four_classes))


def counts(four_classes: bool) -> ExpectedCounts:
    """Return the published counts: 535 recordings, 339 of them in IEMOCAP's four classes."""
    if not four_classes:
        return ExpectedCounts(535, CLASS_COUNTS, FOLD_COUNTS)
    kept = {label: CLASS_COUNTS[label] for label in FOUR_CLASSES}
    return ExpectedCounts(sum(kept.values()), kept, None)
