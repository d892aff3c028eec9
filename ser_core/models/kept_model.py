"""A trained classifier as a folder: encoder and head, with everything that a reader of recordings must know, in transformers' format.

    FOLDER/config.json                the encoder's configuration, pooling, classes, sampling rate
    FOLDER/model.safetensors          every tensor of the classifier
    FOLDER/preprocessor_config.json   sampling rate, and whether waves are normalised

With the file MODELLING_FILE beside them (an export) transformers loads the folder with `trust_remote_code=True`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.disk import os_errors, raise_storage_error
from ser_core.errors import InputError, first_line
from ser_core.models.backbone import WEIGHTS_FILE
from ser_core.models.checkpoint_keys import key_problems
from ser_core.models.classifier import EmotionClassifier
from ser_core.models.model_types import CONFIG_FILE, MODEL_TYPES, NORMALISE_KEY, PREPROCESSOR_FILE
from ser_core.settings.finetune import Pooling

MODEL_TYPE = "ser-grid-classifier"  # of SpeechEmotionConfig (exported_model.py)
MODELLING_FILE = "modeling_ser_grid.py"
AUTO_MAP = {
    "AutoConfig": "modeling_ser_grid.SpeechEmotionConfig",
    "AutoModelForAudioClassification": "modeling_ser_grid.SpeechEmotionClassifier",
}


@dataclass(frozen=True)
class LoadedModel:
    """A classifier in evaluation mode; the first outputs of its head are the logits of `classes`."""

    model: EmotionClassifier
    classes: tuple[str, ...]


def save_model(model: EmotionClassifier, classes: Sequence[str], folder: Path) -> None:
    """Write a classifier that has no adaptors; outputs of its head beyond the logits of `classes` are left out. Same model, same bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state |= {name: state[name][: len(classes)].contiguous() for name in ("head.weight", "head.bias")}
    encoder = model.wav2vec2.config.to_dict()
    encoder.pop("_name_or_path", None)  # a local path
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["SpeechEmotionClassifier"],
        "auto_map": AUTO_MAP,
        "encoder": encoder,
        "pooling": model.pooling.name,
        "projector_units": 0 if model.projector is None else model.projector.out_features,
        "sampling_rate": SAMPLE_RATE,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "dtype": "float32",
    }
    with os_errors(folder / WEIGHTS_FILE):
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    normalise = bool(getattr(model.wav2vec2.config, NORMALISE_KEY, False))
    # The attention mask tells the model the length of each utterance in a padded batch.
    save_preprocessor(folder, normalise=normalise, attention_mask=True)


def save_preprocessor(folder: Path, *, normalise: bool, attention_mask: bool) -> None:
    """Write what transformers' Wav2Vec2FeatureExtractor reads."""
    values = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "do_normalize": normalise,
        "return_attention_mask": attention_mask,
    }
    with os_errors(folder / PREPROCESSOR_FILE):
        (folder / PREPROCESSOR_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> LoadedModel:
    """Load what `save_model` wrote, on the CPU in float32. Raises InputError for any other folder, or if a tensor does not fit."""
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _read(folder / CONFIG_FILE)
    if config.get("model_type") != MODEL_TYPE:
        raise InputError(f"{folder / CONFIG_FILE}: model_type={config.get('model_type')}: not an exported classifier ({MODEL_TYPE})")
    try:
        kind = MODEL_TYPES[config["encoder"]["model_type"]]
        values = {name: value for name, value in config["encoder"].items() if name != "model_type"}
        encoder = getattr(transformers, kind.model)(getattr(transformers, kind.config)(**values))
        encoder.set_attn_implementation("eager" if kind.eager else "sdpa")
        classes = tuple(config["id2label"][str(number)] for number in range(len(config["id2label"])))
        model = EmotionClassifier(encoder, len(classes), Pooling[config["pooling"]], projector=int(config["projector_units"]))
        state = load_file(folder / WEIGHTS_FILE)
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise_storage_error(error)
        raise InputError(f"{folder}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    own = model.state_dict()
    problems = key_problems(
        folder / WEIGHTS_FILE,
        {
            "missing": set(own) - set(state),
            "not in the model": set(state) - set(own),
            "of another shape": {name for name in set(state) & set(own) if state[name].shape != own[name].shape},
        },
        f"the weights do not fit {CONFIG_FILE}",
    )
    if problems:
        raise InputError(problems)
    model.load_state_dict(state)
    return LoadedModel(model.eval(), classes)


def is_kept_model(folder: Path) -> bool:
    """Whether a folder has the files of `save_model`."""
    return all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, PREPROCESSOR_FILE))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise_storage_error(error)
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a configuration")
    return found
