"""wav2vec 2.0: a checkpoint or a small random model in, checked key by key; a folder of safetensors and JSON out.

torch and transformers are imported inside the functions, so that `backbone_identity` and `frame_count` cost nothing to import.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from ser_core.disk import os_errors
from ser_core.errors import InputError, is_memory_error
from ser_core.models.identity import CONFIG_FILE, backbone_identity, checkpoint_folder
from ser_core.settings import Attention, BackboneSettings

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining, Wav2Vec2Model

__all__ = [
    "backbone_identity",
    "build_backbone",
    "frame_count",
    "hop_samples",
    "load_encoder",
    "minimum_samples",
    "save_backbone",
    "save_encoder",
]

WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"

# Parts of wav2vec 2.0 checkpoints that stand beside the encoder: of pretraining, of a speech recogniser. Where only the encoder is asked
# for they are left aside; any other key without a place is an error.
HEAD_PREFIXES = ("quantizer.", "project_hid.", "project_q.", "lm_head.")

# Kept in the saved configuration, so that a model trained further on normalised waves goes on being fed with them.
NORMALISE_KEY = "normalise_waves"

SHOWN_KEYS = 4


def build_backbone(settings: BackboneSettings | Path, *, attention: Attention = Attention.sdpa) -> Wav2Vec2ForPreTraining:
    """Build the model with its pretraining heads, in evaluation mode, on the CPU in float32.

    `settings` may be a folder that `save_backbone` wrote. Raises InputError where a checkpoint cannot be found or read, and where keys
    are unmatched, missing or of another shape.
    """
    from transformers import Wav2Vec2ForPreTraining

    chosen = _as_settings(settings)
    if chosen.checkpoint is None:
        return _from_config(chosen, attention)
    return _from_checkpoint(Wav2Vec2ForPreTraining, chosen, attention, ignored=())


def load_encoder(settings: BackboneSettings | Path, *, attention: Attention = Attention.sdpa) -> Wav2Vec2Model:
    """Load the model without pretraining heads, in evaluation mode, on the CPU in float32.

    `settings` may be a folder that `save_encoder` or `save_backbone` wrote. Heads of pretraining or of a recogniser in the checkpoint are
    left aside; every other unmatched, missing or misshapen key is an InputError.
    """
    from transformers import Wav2Vec2Model

    chosen = _as_settings(settings)
    if chosen.checkpoint is None:
        return _from_config(chosen, attention).wav2vec2
    return _from_checkpoint(Wav2Vec2Model, chosen, attention, ignored=HEAD_PREFIXES)


def save_backbone(model: Wav2Vec2ForPreTraining, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` of a model with pretraining heads; the same model gives the same bytes."""
    _save(model, folder)


def save_encoder(model: Wav2Vec2Model, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` of a model without pretraining heads; the same model gives the same bytes."""
    _save(model, folder)


@overload
def frame_count(config: Wav2Vec2Config, samples: int) -> int: ...
@overload
def frame_count(config: Wav2Vec2Config, samples: NDArray[np.integer]) -> NDArray[np.int64]: ...
def frame_count(config: Wav2Vec2Config, samples: int | NDArray[np.integer]) -> int | NDArray[np.int64]:
    """Return how many frames the convolutions make of so many samples; 0 where there are too few (see `minimum_samples`)."""
    counts = np.asarray(samples, dtype=np.int64)
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        counts = np.maximum((counts - kernel) // stride + 1, 0)
    return int(counts) if isinstance(samples, int) else counts


def minimum_samples(config: Wav2Vec2Config) -> int:
    """Return how many samples give one frame; shorter clips are padded with zeros up to here."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return int(samples)


def hop_samples(config: Wav2Vec2Config) -> int:
    """Return the samples from one frame to the next (320 for wav2vec2-base: 20 ms)."""
    return int(np.prod(config.conv_stride))


def _as_settings(settings: BackboneSettings | Path) -> BackboneSettings:
    if isinstance(settings, Path):
        if not settings.is_dir():
            raise InputError(f"{settings}: no such backbone folder")
        return BackboneSettings(checkpoint=str(settings))
    return settings


def _from_config(settings: BackboneSettings, attention: Attention) -> Wav2Vec2ForPreTraining:
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

    if not settings.config:
        raise InputError("backbone: neither checkpoint nor config is set; name a wav2vec 2.0 checkpoint or give the keys of a small model")
    known = set(Wav2Vec2Config().to_dict())
    problems = []
    for key in sorted(set(settings.config) - known):
        near = difflib.get_close_matches(key, known, n=1)
        problems.append(
            f"backbone.config.{key}: no such key of a wav2vec 2.0 configuration" + (f"; did you mean {near[0]}?" if near else "")
        )
    if problems:
        raise InputError(problems)
    values = dict(settings.config)
    if "conv_dim" in values:
        values.setdefault("num_feat_extract_layers", len(values["conv_dim"]))
    try:
        config = Wav2Vec2Config(**values)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.init_seed)
            model = Wav2Vec2ForPreTraining(config)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        if is_memory_error(error):
            raise
        # transformers wraps what a check of its configuration says into an error that names only the check.
        raise InputError(f"backbone.config: {_first_line(error.__cause__ or error)}") from error
    model.set_attn_implementation(attention.value)
    return _ready(model, "backbone.config")


def _from_checkpoint(model_class: Any, settings: BackboneSettings, attention: Attention, ignored: tuple[str, ...]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    name = settings.checkpoint
    if name is None:
        raise ValueError("a checkpoint must be named")
    folder = checkpoint_folder(name)
    source = str(folder) if folder is not None else name
    if folder is not None and not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder}: not a checkpoint: {CONFIG_FILE} is missing")
    options: dict[str, Any] = {
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that they are listed below with the other keys instead of raised alone
        "attn_implementation": attention.value,
    }
    if folder is None and settings.revision is not None:
        options["revision"] = settings.revision
    with _quiet_transformers():
        try:
            # What is in the local cache is taken without asking the hub, so that jobs on nodes without network work.
            model, report = model_class.from_pretrained(source, local_files_only=True, **options)
        except OSError as error:
            if folder is not None:
                raise InputError(f"{folder}: cannot be loaded: {_first_line(error)}") from error
            model, report = _from_hub(model_class, source, options)
        except (ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError, SafetensorError, StrictDataclassError) as error:
            if is_memory_error(error):
                raise
            raise InputError(f"{source}: cannot be loaded as wav2vec 2.0: {_first_line(error)}") from error
    _check_keys(source, report, ignored)
    if not hasattr(model.config, NORMALISE_KEY) and _normalises(source, folder, model.config, options.get("revision")):
        setattr(model.config, NORMALISE_KEY, True)
    return _ready(model, source)


def _from_hub(model_class: Any, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        model, report = model_class.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: not in the local cache and not to be had from the Hugging Face hub ({_first_line(error)}); "
            "download it where there is network and set backbone.checkpoint to its folder"
        ) from error
    return model, report


def _check_keys(source: str, report: dict[str, Any], ignored: tuple[str, ...]) -> None:
    unexpected = [key for key in report["unexpected_keys"] if not key.startswith(ignored)] if ignored else list(report["unexpected_keys"])
    mismatched = [str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in report["mismatched_keys"]]
    problems = []
    for word, keys in (("missing", list(report["missing_keys"])), ("unmatched", unexpected), ("of another shape", mismatched)):
        if keys:
            shown = ", ".join(sorted(keys)[:SHOWN_KEYS])
            more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
            problems.append(f"{source}: {len(keys)} keys {word}: {shown}{more}; the checkpoint does not fit this model")
    if problems:
        raise InputError(problems)


def _normalises(source: str, folder: Path | None, config: Any, revision: str | None) -> bool:
    """Whether waves are brought to zero mean and unit variance first.

    Only layer-norm models need it: the group norm of wav2vec2-base's first convolution takes scale and offset out anyhow, and the authors
    feed it plain waves.
    """
    if config.feat_extract_norm != "layer":
        return False
    path: str | Path | None
    if folder is not None:
        path = folder / PREPROCESSOR_FILE
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, PREPROCESSOR_FILE, revision=revision)
        path = found if isinstance(found, str) else None
        if path is None:
            from transformers import AutoFeatureExtractor

            try:
                return bool(AutoFeatureExtractor.from_pretrained(source, revision=revision).do_normalize)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{source}: {PREPROCESSOR_FILE} cannot be had ({_first_line(error)}); it says whether waves are normalised"
                ) from error
    if path is None or not Path(path).is_file():
        return False
    try:
        return bool(json.loads(Path(path).read_text()).get("do_normalize", False))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _save(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with os_errors(folder / WEIGHTS_FILE):
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # a path of this machine
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float32"  # of the weights; transformers leaves it open for a model built from a configuration
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _ready(model: Any, source: str) -> Any:
    if not hasattr(getattr(model, "wav2vec2", model), "masked_spec_embed"):
        raise InputError(f"{source}: has no mask embedding because mask_time_prob is 0 in its configuration; every stage masks frames")
    if model.config.add_adapter:
        raise InputError(f"{source}: has an adapter behind the transformer (add_adapter); a checkpoint without one is needed")
    model.float()
    model.eval()
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' load report and progress bars off the terminal: keys are judged here, strictly."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
