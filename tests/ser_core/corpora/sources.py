"""Small corpora of every kind, written as their owners hand them out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray


def noise(seconds: float, rate: int = 16_000, seed: int = 0) -> NDArray[np.int16]:
    """16-bit noise: (samples,)."""
    draw = np.random.default_rng(seed)
    return (draw.normal(size=int(seconds * rate)) * 3000).astype(np.int16)


def write_audio(path: Path, *, seconds: float = 0.2, rate: int = 16_000, channels: int = 1, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = noise(seconds, rate, seed)
    soundfile.write(path, np.stack([samples] * channels, axis=1), rate, subtype="PCM_16")


def state_counts(source: Path, utterances: int) -> None:
    (source / "expected_counts.json").write_text(json.dumps({"utterances": utterances}))


IEMOCAP_LABELS = ("neu", "hap", "exc", "ang", "sad", "fru")


def label_line(turn: str, label: str, start: float = 0.0) -> str:
    return f"[{start:.4f} - {start + 0.2:.4f}]\t{turn}\t{label}\t[2.5000, 3.0000, 3.5000]\n"


def iemocap(source: Path, sessions: Iterable[int] = range(1, 6)) -> Path:
    """Two dialogs a session, each with one turn of every label in IEMOCAP_LABELS a speaker; says its counts: 20 utterances a session."""
    numbers = list(sessions)
    for session in numbers:
        folder = source / f"Session{session}"
        labels = folder / "dialog" / "EmoEvaluation"
        labels.mkdir(parents=True)
        for kind in ("Ses{:02d}F_impro01", "Ses{:02d}M_script01_1b"):
            dialog = kind.format(session)
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n", "\n"]
            for sex in "FM":
                for number, label in enumerate(IEMOCAP_LABELS):
                    turn = f"{dialog}_{sex}{number:03d}"
                    lines += [
                        label_line(turn, label, start=float(number)),
                        "C-E2:\tNeutral;\t()\n",
                        "A-E3:\tval 3; act 2; dom  2;\t()\n",
                        "\n",
                    ]
                    write_audio(folder / "sentences" / "wav" / dialog / f"{turn}.wav", seed=100 * session + number)
            (labels / f"{dialog}.txt").write_text("".join(lines))
        # What a Mac leaves on every disk it touches.
        (labels / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07")
        (folder / "sentences" / "wav" / dialog / f"._{turn}.wav").write_bytes(b"\x00\x05\x16\x07")
        (labels / "Categorical").mkdir()
        (labels / "Categorical" / f"{dialog}_cat.txt").write_text("Ses01F_impro01_F000 :Neutral; ()\n")
    state_counts(source, 20 * len(numbers))
    return source


def iemocap_texts(source: Path) -> Path:
    """Transcripts for every turn of `iemocap`, with what else their files hold."""
    for labels in sorted(source.glob("Session*/dialog/EmoEvaluation/Ses*.txt")):
        turns = [line.split("\t")[1] for line in labels.read_text().splitlines() if line.startswith("[")]
        lines = [f"{turn} [006.2901-008.2357]: I said [LAUGHTER] to {turn[-4:]}]: no.\n" for turn in turns]
        file = labels.parents[1] / "transcriptions" / labels.name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(["M: sorry\n", f"{labels.stem}_FXX0 [000.1-000.2]: both speak\n", *lines]))
        (file.parent / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07")
    return source


def savee(source: Path, *, name: str = "{speaker}_{code}{number:02d}.wav") -> Path:
    """Two recordings of every emotion and speaker."""
    for speaker in ("DC", "JE", "JK", "KL"):
        for code in ("a", "d", "f", "h", "n", "sa", "su"):
            for number in (1, 2):
                write_audio(source / name.format(speaker=speaker, code=code, number=number), rate=44_100, seed=number)
    state_counts(source, 56)
    return source


def emodb(source: Path) -> Path:
    """One recording of every emotion and speaker."""
    for speaker in ("03", "08", "09", "10", "11", "12", "13", "14", "15", "16"):
        for letter in "WLEAFTN":
            write_audio(source / "wav" / f"{speaker}a01{letter}a.wav")
    state_counts(source, 70)
    return source


def ravdess(source: Path) -> Path:
    """Two recordings of every actor, all emotions among those of a fold; and a song, which is not read."""
    for actor in range(1, 25):
        for emotion in (2 * actor % 8 + 1, (2 * actor + 1) % 8 + 1):
            write_audio(source / f"Actor_{actor:02d}" / f"03-01-{emotion:02d}-01-01-01-{actor:02d}.wav", rate=48_000)
    write_audio(source / "Actor_01" / "03-02-01-01-01-01-01.wav")
    state_counts(source, 48)
    return source


CREMAD_ACTORS = ("1066", "1001", "1033", "1014", "1023")  # of folds 1 to 5


def cremad(source: Path) -> Path:
    """One recording of every emotion of five actors, one of each fold."""
    for actor in CREMAD_ACTORS:
        for label in ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD"):
            write_audio(source / "AudioWAV" / f"{actor}_DFA_{label}_XX.wav")
    state_counts(source, 30)
    return source


def tess(source: Path) -> Path:
    """One recording of every emotion and speaker, one under the name it has by mistake in the distributed archive."""
    for speaker in ("OAF", "YAF"):
        for label in ("angry", "disgust", "fear", "happy", "neutral", "ps", "sad"):
            name = "OA_bite_neutral" if (speaker, label) == ("OAF", "neutral") else f"{speaker}_back_{label}"
            write_audio(source / f"{speaker}_{label}" / f"{name}.wav", rate=24_414)
    state_counts(source, 14)
    return source


def csv_corpus(source: Path, rows: Iterable[Mapping[str, Any]] | None = None, header: str = "path,label,speaker,fold") -> Path:
    """A CSV file with six recordings of three speakers, a fold each; or with `rows`."""
    source.mkdir(parents=True, exist_ok=True)
    given = (
        list(rows)
        if rows is not None
        else [
            {"path": f"clips/s{speaker}_{label}.wav", "label": label, "speaker": f"s{speaker}", "fold": str(speaker)}
            for speaker in (1, 2, 10)
            for label in ("calm", "loud")
        ]
    )
    names = header.split(",")
    file = source / "corpus.csv"
    file.write_text("\n".join([header, *(",".join(str(row.get(name, "")) for name in names) for row in given)]) + "\n")
    for number, row in enumerate(given):
        path = source / str(row["path"])
        if not path.exists():
            write_audio(path, seed=number)
    return file


def labels(source: Path, split: Mapping[str, Mapping[str, Any]]) -> Path:
    """The authors' JSON with the recordings beside it."""
    source.mkdir(parents=True, exist_ok=True)
    file = source / "label.json"
    file.write_text(json.dumps(split))
    for part in split.values():
        for number, name in enumerate(part):
            write_audio(source / "Audio_16k" / name, seed=number)
    return file
