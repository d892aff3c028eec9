"""A corpus of transcripts without audio, and a small random text encoder with a tokenizer of its own: nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ser_core.corpora.manifest import Manifest, Utterance, write_manifest
from ser_core.settings.execution import ExecutionSettings, Precision
from ser_core.settings.recipe import Recipe
from ser_core.settings.text import TextEncoderSettings, TextSettings

SCRIPTS = ("script01_1", "script01_2", "script02_1", "script02_2", "impro01", "impro02", "impro03", "impro04")
SESSIONS = ("1", "2", "3", "4")
CLASSES = ("angry", "sad")
FILLERS = ("the", "bus", "left", "an", "hour", "ago", "she", "put", "it", "on")
MOODS = {"angry": ("damn", "shout"), "sad": ("sorry", "alone")}
# `sorry` and `alone` are words of many utterances; each script has a word of its own.
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *(word for words in MOODS.values() for word in words), *SCRIPTS)


def by_mood(label: str, script: str, rng: np.random.Generator) -> str:
    """A sentence whose class follows from one word."""
    words = [*rng.choice(FILLERS, 4), str(rng.choice(MOODS[label]))]
    return " ".join(str(word) for word in rng.permutation(words)).capitalize()


def by_script(label: str, script: str, rng: np.random.Generator) -> str:
    """A sentence from which only its script follows."""
    return " ".join([script, *(str(word) for word in rng.choice(FILLERS, 3))])


def by_nothing(label: str, script: str, rng: np.random.Generator) -> str:
    """A sentence that says nothing of class or script, as those of the demo."""
    return " ".join(str(word) for word in rng.choice(FILLERS, 4))


def corpus_of_texts(folder: Path, text: Callable[[str, str, np.random.Generator], str], *, turns: int = 4) -> Manifest:
    """Four sessions that act all scripts, `turns` each; the class follows from the script, by turns in the order of the scripts."""
    rng = np.random.default_rng(0)
    utterances = []
    for session in SESSIONS:
        for number, script in enumerate(SCRIPTS):
            for turn in range(turns):
                label = CLASSES[(number // 2 + number) % 2]
                name = f"Ses0{session}F_{script}_F{turn:03d}"
                speaker = f"{session}{'FM'[turn % 2]}"
                utterances.append(Utterance(name, f"{name}.flac", 16_000, label, speaker, session, text=text(label, script, rng)))
    folder.mkdir(parents=True, exist_ok=True)
    return write_manifest(folder, "texts", SESSIONS, utterances)


def tokenizer_folder(folder: Path) -> Path:
    """A tokenizer of whole words, with BERT's special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(VOCABULARY)}
    built = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    built.pre_tokenizer = Whitespace()
    built.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=built, **special).save_pretrained(str(folder))
    return folder


def text_recipe(tokenizer: Path, **changes: Any) -> Recipe:
    """Two layers of 32 channels, a few steps in float32."""
    config = {
        "model_type": "bert",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    encoder = TextEncoderSettings(checkpoint=None, config=config, tokenizer=str(tokenizer))
    settings = {"epochs": 4, "batch_size": 16, "learning_rate": 5e-3, "max_tokens": 16, "precision": Precision.float32, **changes}
    return Recipe(text=TextSettings(encoder=encoder, **settings), execution=ExecutionSettings(device="cpu", log_every=1))
