"""IEMOCAP's transcripts: a turn a line in the files of `SessionN/dialog/transcriptions`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ser_core.corpora.recordings import Recording, relative

TRANSCRIPTS = Path("dialog", "transcriptions")
# `Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.`; other lines are of a speaker without a turn (`M: sorry`).
LINE = re.compile(r"(Ses\w+)\s*\[[^\]]*\]:(.*)")
WITHOUT_TURN = re.compile(r"XX\d+$")  # overlapping speech, which has no recording
TAG = re.compile(r"\[[A-Z]+\]")  # [LAUGHTER], [BREATHING], [GARBAGE]


def transcripts_of(lines: Iterable[str]) -> dict[str, str]:
    """Return turn -> transcript without tags; the transcript of a turn that is nothing but tags is empty."""
    found = {}
    for line in lines:
        match = LINE.match(line.strip())
        if match and not WITHOUT_TURN.search(match[1]):
            found[match[1]] = " ".join(TAG.sub(" ", match[2]).split())
    return found


def with_transcripts(found: Iterable[Recording], folder: Path, source: Path) -> tuple[list[Recording], list[str]]:
    """The turns of a session with their transcripts, and one line per turn without one. `folder`: that of the session.

    A session without the folder of transcripts keeps its turns as they are.
    """
    turns = list(found)
    texts = folder / TRANSCRIPTS
    if not texts.is_dir():
        return turns, []
    known: dict[str, str] = {}
    for file in sorted(path for path in texts.glob("*.txt") if not path.name.startswith(".")):
        known |= transcripts_of(file.read_text(encoding="utf-8", errors="replace").splitlines())
    problems = [
        f"{relative(texts, source)}/{each.id.rpartition('_')[0]}.txt: no transcript of turn {each.id}; unpack the whole release"
        for each in turns
        if each.id not in known
    ]
    return [replace(each, text=known.get(each.id)) for each in turns], problems
