"""Reader of unlabelled speech: a folder of recordings, in LibriSpeech's layout (Panayotov et al. 2015) or in a folder per speaker.

Nothing can be trained on such a corpus: it has one label and one fold. It can be measured (`pretraining_loss`).
"""

from __future__ import annotations

import re
from pathlib import Path

from ser_core.corpora.recordings import Recording, SourceListing, audio_files, require_folder

LABEL = "unlabelled"
FOLD = "all"
LIBRISPEECH = re.compile(r"(\d+)-\d+-\d+")  # speaker, chapter, number: 1089-134686-0000.flac


def read(source: Path) -> SourceListing:
    """List the recordings below `source`, each named after its file.

    The speaker is the first number of a name of LibriSpeech, else the first folder below `source`, "" if there is none. Raises InputError
    if `source` is not a folder.
    """
    require_folder(source)
    found = []
    for path in audio_files(source):
        name, folders = LIBRISPEECH.fullmatch(path.stem), path.relative_to(source).parts[:-1]
        speaker = name[1] if name else folders[0] if folders else ""
        found.append(Recording(path.stem, path, LABEL, speaker, FOLD))
    problems = () if found else (f"{source}: holds no wav or FLAC file; --source must name the folder of the recordings",)
    return SourceListing(tuple(found), problems, (FOLD,), labelled=False)
