"""Reader of IEMOCAP as distributed by USC (Busso et al. 2008): five sessions of two speakers, each turn with category, dimensions, text."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ser_core.corpora.iemocap_text import with_transcripts
from ser_core.corpora.manifest import natural_order
from ser_core.corpora.recordings import ExpectedCounts, Recording, SourceListing, audio_files, by_stem, relative, require_folder

SESSIONS = ("1", "2", "3", "4", "5")
# The paper's four classes; excited is merged into happy (section 3.1).
KEPT = {"neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad"}
DROPPED = ("fru", "fea", "sur", "dis", "oth", "xxx")
# Utterances of the four classes, as reported in papers that use this selection.
COUNTS = ExpectedCounts(
    utterances=5531,
    classes={"angry": 1103, "happy": 1636, "neutral": 1708, "sad": 1084},
    folds={"1": 1085, "2": 1023, "3": 1151, "4": 1031, "5": 1241},
)

LABELS = Path("dialog", "EmoEvaluation")
AUDIO = Path("sentences", "wav")
NUMBER = r"(-?\d+(?:\.\d+)?)"
LINE = re.compile(rf"\[\s*{NUMBER}\s*-\s*{NUMBER}\s*\]\s+(\S+)\s+(\S+)\s+\[\s*{NUMBER}\s*,\s*{NUMBER}\s*,\s*{NUMBER}\s*\]\s*$")
TURN = re.compile(r"Ses(\d\d)[FM]_\w+_([FM])\w*")


def read(source: Path, *, required: Collection[str] | None = SESSIONS) -> SourceListing:
    """List the turns of the four classes below `source`, which holds Session1 to Session5, or IEMOCAP_full_release with them.

    `required`: the sessions that must be present; None accepts any. Raises InputError if `source` is not a folder.
    """
    require_folder(source)
    root = source / "IEMOCAP_full_release"
    root = root if root.is_dir() else source
    present = sorted(match[1] for entry in root.iterdir() if entry.is_dir() and (match := re.fullmatch(r"Session(\d+)", entry.name)))
    if not present:
        return SourceListing((), (f"{source}: holds no folder Session1 to Session5; --source must name the folder that does",), ())
    folds = tuple(sorted({*present, *(required or ())}, key=natural_order))
    found: list[Recording] = []
    problems: list[str] = []
    dropped = 0
    for session in folds:
        folder = root / f"Session{session}"
        absent = [part for part in (folder, folder / LABELS, folder / AUDIO) if not part.is_dir()]
        if absent:
            problems.append(f"{relative(absent[0], source)}: missing; unpack the whole release")
            continue
        of_session, lines, other = _read_session(source, folder, session)
        turns, without_text = with_transcripts(of_session, folder, source)
        found += turns
        problems += [*lines, *without_text]
        dropped += other
    return SourceListing(tuple(found), tuple(problems), folds, COUNTS, {"dropped_turns_of_other_labels": dropped})


def _read_session(source: Path, folder: Path, session: str) -> tuple[list[Recording], list[str], int]:
    """Return the turns of one session, its problems, and the number of turns with a dropped label."""
    recordings = by_stem(audio_files(folder / AUDIO))
    seen: dict[str, str] = {}
    found: list[Recording] = []
    problems: list[str] = []
    dropped = 0
    files = sorted(path for path in (folder / LABELS).glob("*.txt") if not path.name.startswith("."))
    if not files:
        problems.append(f"{relative(folder / LABELS, source)}: holds no label file (*.txt); unpack the whole release")
    for path in files:
        # Annotators' comments may be in any encoding; the label lines are ASCII.
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if not any(line.startswith("[") for line in lines):
            problems.append(f"{relative(path, source)}: holds no labelled turn; unpack it again")
        for number, line in enumerate(lines, start=1):
            if not line.startswith("["):
                continue  # the header, and the annotators' lines
            where = f"{relative(path, source)} line {number}"
            fields = LINE.match(line)
            turn = TURN.fullmatch(fields[3]) if fields else None
            if fields is None or turn is None:
                problems.append(f"{where}: not a label line: {line.strip()[:100]!r}")
                continue
            name, label = fields[3], fields[4]
            if name in seen:
                problems.append(f"{where}: duplicate turn {name}, labelled before in {seen[name]}; keep one")
                continue
            seen[name] = where
            if label in DROPPED:
                dropped += 1
                continue
            if label not in KEPT:
                problems.append(f"{where}: unknown label {label!r} of turn {name}; IEMOCAP has {' '.join((*KEPT, *DROPPED))}")
                continue
            audio = recordings.get(name, [])
            if not audio:
                problems.append(f"{where}: turn {name} has no audio: {name}.wav is not below {relative(folder / AUDIO, source)}")
                continue
            if len(audio) > 1:
                problems.append(f"{relative(audio[1], source)}: duplicate turn {name}, also in {relative(audio[0], source)}; keep one")
                continue
            dimensions = (float(fields[5]), float(fields[6]), float(fields[7]))
            found.append(Recording(name, audio[0], KEPT[label], f"{int(turn[1])}{turn[2]}", session, dimensions))
    return found, problems, dropped
