"""A small corpus in the layout of EmoBox: its lists in `data/NAME`, its recordings in another folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tests.ser_core.corpora.sources import noise

RATE = 16_000
CODES = {"anger": "Angry", "Neutral": "Neutral", "happy": "Happy", "excited": "Happy"}  # the data have `neutral`


@dataclass(frozen=True)
class Item:
    """One recording of the list."""

    key: str
    speaker: str
    fold: str  # where it is tested; a part of a corpus with one fold
    wav: str  # below downloads/NAME
    emo: str
    extra: Mapping[str, Any] = field(default_factory=lambda: {"channel": 1})


def write_lists(root: Path, name: str, items: Sequence[Item], *, labels: Mapping[str, str] | None = None) -> Path:
    """Write the lists and return `data/NAME/NAME.jsonl`. `labels`: the map of labels."""
    folder = root / "data" / name
    folder.mkdir(parents=True)
    records = {
        item.key: {
            "key": item.key,
            "dataset": name,
            "wav": f"downloads/{name}/{item.wav}",
            "task": "category",
            "emo": item.emo,
            **item.extra,
        }
        for item in items
    }
    write_jsonl(folder / f"{name}.jsonl", records.values())
    (folder / "label_map.json").write_text(json.dumps(CODES if labels is None else labels))
    lines = [f"{i.key} 1 {i.speaker} 0 1.0 <id={i.key},lang=en,spk={i.speaker},emotion={i.emo}> {i.emo}\n" for i in items]
    (folder / "data.seg.wrd.stm").write_text("".join(lines))
    parts = {item.fold for item in items}
    if "test" in parts:
        split = {"1": {part: [i.key for i in items if i.fold == part] for part in parts}}
    else:
        split = {
            fold: {"test": [i.key for i in items if i.fold == fold], "train": [i.key for i in items if i.fold != fold]} for fold in parts
        }
    for fold, lists in split.items():
        (folder / f"fold_{fold}").mkdir()
        for part, keys in lists.items():
            write_jsonl(folder / f"fold_{fold}" / f"{name}_{part}_fold_{fold}.jsonl", (records[key] for key in keys))
    return folder / f"{name}.jsonl"


def write_jsonl(file: Path, records: Iterable[Any]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def change_jsonl(file: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Write a list again after `change` of its records."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    change(records)
    write_jsonl(file, records)


def tiny(root: Path) -> tuple[Path, Path]:
    """The list and the folder of the recordings of a corpus with what is difficult in EmoBox's: three speakers, a fold each.

    `one`: a space in the path; file names that repeat. `two`: the third of three channels at 48 kHz. `three`: excerpts of one file.
    The map of labels has one label in another case, and the folder of a fold has a list with other keys and nearly the same name.
    """
    name = "tiny"
    items = [Item(f"{name}-one-{emo}", "one", "1", f"speaker one/{emo}/001.wav", emo) for emo in ("anger", "neutral", "excited")]
    items += [Item(f"{name}-two-{emo}", "two", "2", f"two/{emo}/001.wav", emo, {"channel": 3}) for emo in ("anger", "neutral", "happy")]
    items += [
        Item(f"{name}-three-{emo}", "three", "3", "three.flac", emo, {"channel": 1, "start_time": start, "end_time": start + 0.25})
        for start, emo in ((0.0, "anger"), (0.25, "neutral"), (0.75, "happy"))
    ]
    file = write_lists(root, name, items)
    write_jsonl(file.parent / "fold_1" / f"{name}_test_fold1.jsonl", [{"key": "03a01Wa"}])
    audio = root / "recordings"
    for number, item in enumerate(items[:6]):
        path = audio / item.wav
        path.parent.mkdir(parents=True)
        rate, channels = (RATE, 1) if number < 3 else (48_000, 3)
        samples = np.stack([noise(0.2, rate, seed=10 * number + channel) for channel in range(channels)], axis=1)
        soundfile.write(path, samples, rate, subtype="PCM_16")
    soundfile.write(audio / "three.flac", noise(1.0, RATE, seed=99), RATE, subtype="PCM_16")
    return file, audio


def flat(root: Path, name: str, items: Sequence[Item], *, labels: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """The list and the folder of the recordings of a corpus of noise, a file an item."""
    audio = root / "recordings"
    for number, item in enumerate(items):
        (audio / item.wav).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(audio / item.wav, noise(0.1, RATE, seed=number), RATE, subtype="PCM_16", format="WAV")
    return write_lists(root, name, items, labels=labels), audio


def recorded(root: Path, speech: Path, parts: Mapping[str, Sequence[str]], letters: str = "WLEAFTN") -> tuple[Path, Path]:
    """EmoDB in EmoBox's layout with a split of our own: in each part, a recording of every class of each of its speakers.

    `parts`: fold, or part of a corpus with one fold -> speakers. A speaker in several parts has other recordings in each.
    `letters`: the classes, as in EmoDB's names.
    """
    codes = {"W": "anger", "L": "boredem", "E": "disgust", "A": "fear", "F": "happy", "T": "sad", "N": "neutral"}
    items: list[Item] = []
    audio = root / "recordings" / "spoken by actors"
    audio.mkdir(parents=True)
    for part, speakers in parts.items():
        for speaker in speakers:
            for letter in letters:
                left = (path for path in sorted(speech.glob(f"audio/{speaker}???{letter}?.flac")) if not (audio / path.name).exists())
                path = next(left)
                shutil.copy(path, audio)
                items.append(Item(f"mine-{path.stem}", speaker, part, f"spoken by actors/{path.stem}.wav", codes[letter]))
    labels = {code.capitalize(): code.capitalize() for code in codes.values()}  # in another case than the data
    return write_lists(root, "mine", items, labels=labels), audio.parent
