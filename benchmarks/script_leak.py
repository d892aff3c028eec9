"""Writes a corpus whose scripts decide the class, as files for `prepare csv`, and a tokenizer of its words (docs/text.md).

    python benchmarks/script_leak.py --out data/script-leak-source

Five sessions act the same ten scripted dialogs and ten scenarios, four turns each. All turns of a script have one class and contain one
word that no other script contains; their other words occur in the turns of all scripts. So the text identifies the script, and says nothing
about the class of a script that is not in the training set. A recording is a tone in noise: its pitch correlates with the class and is
independent of the script. Each fold of `scripts_disjoint` is tested on scripts of both classes, scripted and improvised.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import soundfile

SESSIONS, TURNS, SAMPLE_RATE = 5, 4, 16_000
SCRIPTS = (*(f"script{number:02d}_1" for number in range(1, 11)), *(f"impro{number:02d}" for number in range(1, 11)))
CLASSES = ("angry", "sad")
FILLERS = ("the", "bus", "left", "an", "hour", "ago", "she", "put", "it", "on")
PITCHES, SPREAD = (320.0, 280.0), 25.0  # Hz: of each class, and sd of a turn's
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def class_of(script: int) -> int:
    """Five scripts of one class, then five of the other."""
    return script // SESSIONS % len(CLASSES)


def write_corpus(folder: Path) -> Path:
    """Write the recordings and `turns.csv`, and return the latter. The same bytes each time."""
    draw = np.random.default_rng(0)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    file = folder / "turns.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "speaker", "fold", "text"])
        for session in range(1, SESSIONS + 1):
            for number, script in enumerate(SCRIPTS):
                for turn in range(TURNS):
                    sex, label = "FM"[turn % 2], class_of(number)
                    path = folder / "wav" / f"Ses{session:02d}F_{script}_{sex}{turn:03d}.wav"
                    tone = np.sin(2 * np.pi * draw.normal(PITCHES[label], SPREAD) * np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE)
                    soundfile.write(path, 0.1 * tone + draw.normal(0, 0.02, tone.size), SAMPLE_RATE)
                    text = " ".join([script, *(str(word) for word in draw.choice(FILLERS, 3))])
                    writer.writerow([f"wav/{path.name}", CLASSES[label], f"{session}{sex}", session, text])
    return file


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of whole words with the special tokens of BERT, and return its folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate((*SPECIAL, *FILLERS, *SCRIPTS))}
    built = Tokenizer(WordLevel(ids, unk_token=SPECIAL[1]))
    built.pre_tokenizer = WhitespaceSplit()
    built.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[(name, ids[name]) for name in SPECIAL[2:]])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=built, **special).save_pretrained(str(folder))
    return folder


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description="A corpus whose scripts decide the class, and a tokenizer of its words.")
    parser.add_argument("--out", type=Path, default=Path("data/script-leak-source"), help="folder that is written")
    folder: Path = parser.parse_args().out
    print(f"wrote {write_corpus(folder)} and {write_tokenizer(folder / 'tokenizer')}")


if __name__ == "__main__":
    main()
