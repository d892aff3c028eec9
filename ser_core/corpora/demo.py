"""Synthetic demo corpus: espeak-ng speaks short sentences in four emotions, stored in IEMOCAP's folder layout.

`prepare iemocap` reads it like the real corpus: sessions of two speakers, dialogs, label files with dimensions and annotators' lines, and
some turns with labels that are dropped. Emotions differ in pitch, pitch range, rate, loudness, spectral tilt and breath; speakers differ in
expressiveness, utterances in strength (1 on average): learnable across speakers, and not trivial.

A corpus of another strength has the same speakers and sentences in other takes: emotions are weaker or stronger, the neutral voice is not.

espeak keeps state between utterances, so the output is reproducible only for a fixed order in a new process: one process per session.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from ser_core.corpora.manifest import SAMPLE_RATE, Manifest, write_atomically
from ser_core.corpora.prepare import Progress, prepare, prepared_already
from ser_core.corpora.recordings import EXPECTED_COUNTS
from ser_core.corpora.staging import locked, replace_folder
from ser_core.errors import InputError

VERSION = 1  # increment it when the corpus changes
MARKER = "demo.json"  # written last: version and seed
SESSIONS = 5
DIALOGS = 4  # per session, with three sentences each

SENTENCES = (
    "The bus left an hour ago.",
    "She put it on the table.",
    "I will call you tonight.",
    "They moved to the city.",
    "He opened the window.",
    "We have seven more days.",
    "The letter came today.",
    "It is under the chair.",
    "You can leave it there.",
    "My brother drove us home.",
    "The shop closes at nine.",
    "He told me about it.",
)


@dataclass(frozen=True)
class Mood:
    """Acoustic parameters of an emotion, as changes of the speaker's neutral voice at strength 1; and valence, activation, dominance."""

    pitch: float  # espeak units (0 to 100)
    range: float  # espeak units (0 to 100)
    rate: float  # words per minute
    gain: float  # dB
    tilt: float  # dB per octave
    breath: float  # dB
    dimensions: tuple[float, float, float]


MOODS = {
    "neu": Mood(0, 0, 0, 0, 0, 0, (2.7, 2.4, 2.6)),
    "ang": Mood(8, 14, 18, 5, 2.0, 0, (1.8, 3.8, 3.9)),
    "hap": Mood(15, 28, 8, 2, 0.8, 0, (4.0, 3.4, 3.0)),
    "sad": Mood(-7, -22, -22, -5, -2.0, 6, (2.0, 1.8, 2.1)),
    "fru": Mood(4, 7, 10, 3, 1.2, 0, (2.3, 3.0, 3.3)),  # dropped by the recipe, as is xxx
    "xxx": Mood(3, 4, 3, 0, 0, 0, (2.7, 2.8, 2.8)),
}
SPREAD = 0.45  # standard deviation of an utterance's strength around 1
BREATH_FLOOR = -38.0  # dB relative to the voice


@dataclass(frozen=True)
class Turn:
    """One utterance to be synthesised."""

    name: str
    dialog: str
    speaker: str  # F | M
    label: str
    sentence: str


@dataclass(frozen=True)
class Speaker:
    """An espeak voice and its parameters."""

    voice: str
    pitch: float
    rate: float
    gain: float  # dB
    tilt: float  # dB per octave
    expressiveness: float  # factor of the emotion's parameters


def speakers(session: int, seed: int) -> dict[str, Speaker]:
    """Return the female and the male speaker ("F", "M") of a session (1 to 5)."""
    draw = np.random.default_rng([seed, session])
    voices = {"F": (f"en-us+f{session}", 58.0), "M": (f"en-us+m{session}", 42.0)}
    return {
        sex: Speaker(
            voice=voice,
            pitch=pitch + draw.normal(0, 5),
            rate=198 + draw.normal(0, 10),
            gain=draw.normal(0, 2),
            tilt=draw.normal(0, 0.7),
            expressiveness=draw.uniform(0.75, 1.25),
        )
        for sex, (voice, pitch) in voices.items()
    }


def turns(session: int) -> Iterator[Turn]:
    """Yield the turns of a session: both speakers say every sentence in every emotion; one turn per dialog has a label that is dropped."""
    for number in range(DIALOGS):
        dialog = f"Ses{session:02d}{'FM'[number % 2]}_synth{number:02d}"
        spoken = [
            (speaker, "exc" if label == "hap" and (position + number) % 2 else label, sentence)
            for position, sentence in enumerate(SENTENCES[number::DIALOGS])
            for label in ("neu", "ang", "hap", "sad")
            for speaker in "FM"
        ]
        spoken.append(("FM"[number % 2], ("fru", "xxx")[number // 2], SENTENCES[number]))
        count = {"F": 0, "M": 0}
        for speaker, label, sentence in spoken:
            yield Turn(f"{dialog}_{speaker}{count[speaker]:03d}", dialog, speaker, label, sentence)
            count[speaker] += 1


def expected_counts() -> dict[str, Any]:
    """Return the counts that `prepare iemocap` must find: 5 sessions x 2 speakers x 4 emotions x 12 sentences."""
    each = SESSIONS * 2 * len(SENTENCES)
    return {
        "utterances": 4 * each,
        "classes": dict.fromkeys(("angry", "happy", "neutral", "sad"), each),
        "folds": {str(session): 4 * each // SESSIONS for session in range(1, SESSIONS + 1)},
    }


def demo_name(strength: float) -> str:
    """Return the name of the demo corpus of a strength: `demo` for 1, else such as `demo-0.4`."""
    return "demo" if strength == 1 else f"demo-{strength:g}"


def prepare_demo(
    target: Path, source: Path, progress: Progress | None = None, *, strength: float = 1.0, name: str | None = None
) -> Manifest:
    """Prepare the demo corpus at `target`; synthesise it into `source` if that is missing or incomplete. Existing results are kept.

    `progress(done, total)` is called with numbers of utterances, first for the synthesis, then for the conversion. `strength`: mean factor
    of the emotions' acoustic parameters. `name`: of the corpus, by default `demo_name`.
    Raises InputError if espeakng-loader is not installed, or for a strength outside 0 to 2.
    """
    if not 0 < strength <= 2:
        raise InputError(f"prepare demo: --strength {strength:g}: must be above 0 and at most 2")
    facts = {"demo": _marker(1, strength)}
    done = prepared_already(target, facts)
    if done is not None:
        return done
    if not is_complete(source, seed=1, strength=strength):
        synthesise(source, seed=1, strength=strength, progress=progress)
    return prepare("iemocap", source, target, name=name or demo_name(strength), facts=facts, progress=progress)


def is_complete(folder: Path, *, seed: int, strength: float = 1.0) -> bool:
    """Whether `folder` holds the complete corpus of this version, seed and strength."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return marker == _marker(seed, strength) and all(
        _wav(folder, session, turn).is_file() and _label_file(folder, session, turn.dialog).is_file()
        for session in range(1, SESSIONS + 1)
        for turn in turns(session)
    )


def synthesise(target: Path, *, seed: int = 1, strength: float = 1.0, progress: Progress | None = None) -> None:
    """Write the corpus to the folder `target` atomically. The same seed and strength give the same bytes.

    Raises InputError if espeakng-loader is not installed, or if `target` holds other files.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise InputError("espeakng-loader is not installed; the demo corpus alone needs it: run `pip install espeakng-loader`")
    home = target.resolve()
    if home.exists() and not (home.is_dir() and ((home / MARKER).exists() or not any(home.iterdir()))):
        raise InputError(f"{target}: holds other things; the demo corpus needs a folder of its own")
    staging = home.with_name(f".{home.name}.synthesising")
    with locked(staging):
        for left in staging.iterdir():  # left by a killed process
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        total = sum(1 for session in range(1, SESSIONS + 1) for _ in turns(session))
        with ThreadPoolExecutor(min(SESSIONS, len(os.sched_getaffinity(0)))) as pool:
            futures = {pool.submit(_in_fresh_process, staging, session, seed, strength): session for session in range(1, SESSIONS + 1)}
            done = 0
            for future in as_completed(futures):
                future.result()
                done += sum(1 for _ in turns(futures[future]))
                if progress:
                    progress(done, total)
        write_atomically(staging / EXPECTED_COUNTS, json.dumps(expected_counts(), indent=1) + "\n")
        write_atomically(staging / MARKER, json.dumps(_marker(seed, strength), indent=1) + "\n")
        replace_folder(staging, home)


def _marker(seed: int, strength: float) -> dict[str, float]:
    return {"version": VERSION, "seed": seed, **({} if strength == 1 else {"strength": strength})}


def _in_fresh_process(folder: Path, session: int, seed: int, strength: float) -> None:
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "ser_core.corpora.demo", str(folder), str(session), str(seed), repr(strength)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise InputError(f"the demo corpus could not be synthesised: {(result.stderr.strip() or str(result.returncode)).splitlines()[-1]}")


class Espeak:
    """libespeak-ng through ctypes: text and voice parameters to samples. At most one instance per process."""

    RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
    SYNCHRONOUS, CHARACTERS, UTF8 = 2, 1, 1

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate: int = self._library.espeak_Initialize(self.SYNCHRONOUS, 0, os.fsencode(espeakng_loader.get_data_path()), 0)
        if self.sample_rate <= 0:
            raise RuntimeError("espeak-ng did not start")
        self._library.espeak_ng_SetRandSeed(1)
        self._pieces: list[bytes] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)  # the library keeps a pointer to it: it must not be collected
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: str, *, rate: float, pitch: float, range_: float) -> NDArray[np.float64]:
        """Return (samples,) in ±1 at `sample_rate`. `rate` in words per minute, `pitch` and `range_` in espeak units (0 to 100)."""
        self._pieces.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice}")
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, range_)):
            self._library.espeak_SetParameter(parameter, round(value), 0)
        encoded = text.encode()
        self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, self.CHARACTERS, 0, self.UTF8, None, None)
        self._library.espeak_Synchronize()
        return np.frombuffer(b"".join(self._pieces), dtype=np.int16).astype(np.float64) / (1 << 15)

    def _receive(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0  # continue the synthesis


def write_session(folder: Path, session: int, seed: int, strength: float = 1.0) -> None:
    """Synthesise one session (1 to 5) into `folder`. Call it once, in a new process.

    `strength`: mean factor of the emotions' parameters. Each has random numbers of its own, so that no two have a recording in common.
    """
    take = [] if strength == 1 else [round(1000 * strength)]
    espeak = Espeak()
    cast = speakers(session, seed)
    lines: dict[str, list[str]] = {}
    clock: dict[str, float] = {}
    for number, turn in enumerate(turns(session)):
        draw = np.random.default_rng([seed, session, number, *take])
        mood = MOODS["hap" if turn.label == "exc" else turn.label]
        speaker = cast[turn.speaker]
        own = strength * speaker.expressiveness * draw.normal(1, SPREAD)
        samples = _spoken(espeak, turn.sentence, speaker, mood, own, draw)
        path = _wav(folder, session, turn)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
        start = clock.get(turn.dialog, 0.8)
        end = start + len(samples) / SAMPLE_RATE
        clock[turn.dialog] = end + 0.4
        dimensions = [min(5.0, max(1.0, round(2 * (2.6 + own * (value - 2.6) + draw.normal(0, 0.3))) / 2)) for value in mood.dimensions]
        lines.setdefault(turn.dialog, []).append(_label_lines(turn, start, end, dimensions))
    for dialog, blocks in lines.items():
        path = _label_file(folder, session, dialog)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n" + "\n".join(blocks), encoding="utf-8")


def _spoken(espeak: Espeak, text: str, speaker: Speaker, mood: Mood, strength: float, draw: np.random.Generator) -> NDArray[np.float64]:
    """Synthesise one utterance: (samples,) in ±1 at 16 kHz."""
    voiced = espeak.speak(
        text,
        speaker.voice,
        rate=float(np.clip(speaker.rate + strength * mood.rate + draw.normal(0, 6), 120, 320)),
        pitch=float(np.clip(speaker.pitch + strength * mood.pitch + draw.normal(0, 4), 0, 99)),
        range_=float(np.clip(50 + strength * mood.range + draw.normal(0, 6), 0, 99)),
    )
    samples = soxr.resample(voiced, espeak.sample_rate, SAMPLE_RATE, quality="VHQ")
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    margin = SAMPLE_RATE // 50  # 20 ms of silence on either side
    samples = samples[max(0, loud[0] - margin) : loud[-1] + margin]
    samples = _tilted(samples, speaker.tilt + strength * mood.tilt + draw.normal(0, 0.4))
    envelope = np.sqrt(np.convolve(samples**2, np.full(320, 1 / 320), mode="same"))
    breath = BREATH_FLOOR + max(0.0, strength) * mood.breath * 1.5 + draw.normal(0, 3)
    samples = samples + _decibels(breath) * (envelope + 0.01) * _tilted(draw.normal(size=len(samples)), 2)
    samples = samples * (0.06 / np.sqrt(np.mean(samples**2)))
    samples = samples * _decibels(speaker.gain + strength * mood.gain + draw.normal(0, 1.5))
    peak = float(np.abs(samples).max())
    limited: NDArray[np.float64] = samples * min(1.0, 0.99 / peak)
    return limited


def _tilted(samples: NDArray[np.float64], slope: float) -> NDArray[np.float64]:
    """Tilt the spectrum of `samples` by `slope` dB per octave relative to 1 kHz, constant below 100 Hz."""
    size = 1 << len(samples).bit_length()  # a power of two; an FFT of another length may take a hundred times as long
    spectrum = np.fft.rfft(samples, size)
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 100.0)
    tilted: NDArray[np.float64] = np.fft.irfft(spectrum * 10 ** (slope * np.log2(frequencies / 1000) / 20), size)[: len(samples)]
    return tilted


def _decibels(value: float) -> float:
    return float(10 ** (value / 20))


def _label_lines(turn: Turn, start: float, end: float, dimensions: list[float]) -> str:
    """The lines of one turn in a label file: its label line, three annotators' categories and two annotators' dimensions."""
    names = {"neu": "Neutral", "ang": "Anger", "hap": "Happiness", "exc": "Excited", "sad": "Sadness", "fru": "Frustration", "xxx": "Other"}
    triple = ", ".join(f"{value:.4f}" for value in dimensions)
    valence, activation, dominance = (round(value) for value in dimensions)
    return "".join(
        [
            f"[{start:.4f} - {end:.4f}]\t{turn.name}\t{turn.label}\t[{triple}]\n",
            *(f"C-E{rater}:\t{names[turn.label]};\t()\n" for rater in (1, 2, 3)),
            *(f"A-E{rater}:\tval {valence}; act {activation}; dom  {dominance};\t()\n" for rater in (1, 2)),
        ]
    )


def _wav(folder: Path, session: int, turn: Turn) -> Path:
    return folder / f"Session{session}" / "sentences" / "wav" / turn.dialog / f"{turn.name}.wav"


def _label_file(folder: Path, session: int, dialog: str) -> Path:
    return folder / f"Session{session}" / "dialog" / "EmoEvaluation" / f"{dialog}.txt"


if __name__ == "__main__":
    write_session(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:]))
