"""Load a backbone from a checkpoint or a configuration, with every key checked; save it as a folder of safetensors and JSON.

torch and transformers are imported inside the functions, so that importing `backbone_identity` and `frame_count` is cheap.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from ser_core.disk import os_errors, raise_storage_error
from ser_core.errors import InputError, first_line, is_memory_error
from ser_core.models.checkpoint_keys import key_problems
from ser_core.models.hub import pinned_revision
from ser_core.models.identity import NO_BACKBONE, backbone_identity, checkpoint_folder
from ser_core.models.model_types import (
    BATCH_NORM,
    CONFIG_FILE,
    MODEL_TYPES,
    NORMALISE_KEY,
    PREPROCESSOR_FILE,
    WAV2VEC2,
    has_layer_norm,
    method_problem,
    missing_preprocessor,
    model_type_of,
    type_problem,
    unknown_keys,
)
from ser_core.settings.backbone import BackboneSettings, Normalise
from ser_core.settings.execution import Attention

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining, Wav2Vec2Model

__all__ = [
    "backbone_identity",
    "build_backbone",
    "frame_count",
    "hop_samples",
    "load_encoder",
    "minimum_samples",
    "quiet_transformers",
    "save_backbone",
    "save_encoder",
]

WEIGHTS_FILE = "model.safetensors"

# Keys of pretraining and speech-recognition heads in checkpoints, ignored by `load_encoder`; other unknown keys are an error.
HEAD_PREFIXES = ("quantizer.", "project_hid.", "project_q.", "lm_head.")


def build_backbone(settings: BackboneSettings | Path, *, attention: Attention = Attention.sdpa) -> Wav2Vec2ForPreTraining:
    """Build wav2vec 2.0 with its pretraining heads, in evaluation mode, on the CPU in float32.

    `settings` may be a folder written by `save_backbone`. Raises InputError for another kind of model, if a checkpoint cannot be found or
    read, or if keys are unknown, missing or of another shape.
    """
    from transformers import Wav2Vec2ForPreTraining

    chosen = _as_settings(settings)
    if problem := method_problem("tapt", _known_type(chosen)):
        raise InputError(problem)
    if chosen.checkpoint is None:
        return _from_config(chosen, attention)
    return _from_checkpoint(Wav2Vec2ForPreTraining, chosen, attention, ignored=(), own=isinstance(settings, Path))


def load_encoder(settings: BackboneSettings | Path, *, attention: Attention = Attention.sdpa) -> Wav2Vec2Model:
    """Load a model without pretraining heads, in evaluation mode, on the CPU in float32: of any kind in `MODEL_TYPES`.

    `settings` may be a folder written by `save_encoder` or `save_backbone`. Pretraining and speech-recognition heads in the checkpoint are
    ignored; for every other key that is unknown, missing or of another shape InputError is raised.
    """
    import transformers

    chosen = _as_settings(settings)
    kind = MODEL_TYPES[_known_type(chosen)]
    if kind.eager:
        attention = Attention.eager
    if chosen.checkpoint is None:
        model = _from_config(chosen, attention)
        return getattr(model, "wav2vec2", model)
    model_class = getattr(transformers, kind.model)
    return _from_checkpoint(model_class, chosen, attention, ignored=HEAD_PREFIXES, own=isinstance(settings, Path))


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
    """Return the number of frames that the convolutions compute from `samples`; 0 for too few samples (see `minimum_samples`)."""
    counts = np.asarray(samples, dtype=np.int64)
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        counts = np.maximum((counts - kernel) // stride + 1, 0)
    return int(counts) if isinstance(samples, int) else counts


def minimum_samples(config: Wav2Vec2Config) -> int:
    """Return the number of samples of one frame (receptive field); shorter utterances are padded with zeros to it."""
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


def _known_type(settings: BackboneSettings) -> str:
    """The `model_type` of a backbone, read from the hub if it is not here. Raises InputError for one that is not supported."""
    from transformers import AutoConfig

    found = model_type_of(settings)
    name = settings.checkpoint
    if name is not None and found is None and checkpoint_folder(name) is None:
        with quiet_transformers():
            try:
                found = AutoConfig.from_pretrained(name, revision=pinned_revision(settings)).model_type
            except (OSError, ValueError):
                found = WAV2VEC2  # loading it states what is wrong
    problem = type_problem(name or "recipe.backbone.config", WAV2VEC2 if found is None else found)
    if problem:
        raise InputError(problem)
    return WAV2VEC2 if found is None else found


def _from_config(settings: BackboneSettings, attention: Attention) -> Any:
    """Build a model with random weights: wav2vec 2.0 with its pretraining heads, others without."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    if not settings.config:
        raise InputError(NO_BACKBONE)
    model_type = _known_type(settings)
    kind = MODEL_TYPES[model_type]
    problems = list(unknown_keys(settings.config, set(), "recipe.backbone.config"))
    if problems:
        raise InputError(problems)
    values = {key: value for key, value in settings.config.items() if key != "model_type"}
    if "conv_dim" in values:
        values.setdefault("num_feat_extract_layers", len(values["conv_dim"]))
    try:
        config = getattr(transformers, kind.config)(**values)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.init_seed)
            model_class = transformers.Wav2Vec2ForPreTraining if model_type == WAV2VEC2 else getattr(transformers, kind.model)
            model = model_class(config)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        if is_memory_error(error):
            raise
        # transformers wraps the error of a configuration check in one that only names the check.
        raise InputError(f"recipe.backbone.config: {first_line(error.__cause__ or error)}") from error
    model.set_attn_implementation(attention.value)
    if settings.normalise is Normalise.always:
        setattr(model.config, NORMALISE_KEY, True)
    return _ready(model, "recipe.backbone.config")


def _from_checkpoint(model_class: Any, settings: BackboneSettings, attention: Attention, *, ignored: tuple[str, ...], own: bool) -> Any:
    """Load a model; `own`: from a folder that `_save` wrote, which states whether waves are normalised, or they are not."""
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
        "ignore_mismatched_sizes": True,  # `_check_keys` reports them together with the other keys
        "attn_implementation": attention.value,
    }
    if folder is None and (revision := pinned_revision(settings)) is not None:
        options["revision"] = revision
    with quiet_transformers():
        try:
            # The local cache is used without asking the hub, so that jobs on nodes without network work.
            model, report = model_class.from_pretrained(source, local_files_only=True, **options)
        except OSError as error:
            raise_storage_error(error)
            if folder is not None:
                raise InputError(f"{folder}: cannot be loaded: {first_line(error)}") from error
            model, report = _from_hub(model_class, source, options)
        except (ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError, SafetensorError, StrictDataclassError) as error:
            if is_memory_error(error):
                raise
            raise InputError(f"{source}: cannot be loaded as {model_class.__name__}: {first_line(error)}") from error
    _check_keys(source, report, ignored)
    if settings.normalise is not Normalise.auto:
        setattr(model.config, NORMALISE_KEY, settings.normalise is Normalise.always)
    elif not hasattr(model.config, NORMALISE_KEY) and _normalises(source, folder, model.config, options.get("revision"), own=own):
        setattr(model.config, NORMALISE_KEY, True)
    return _ready(model, source)


def _from_hub(model_class: Any, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        model, report = model_class.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError) as error:
        pinned = options.get("revision")
        raise InputError(
            f"{name}{f', revision {pinned}' if pinned else ''}: not in the local cache and cannot be downloaded from the Hugging Face hub "
            f"({first_line(error)}); download it where there is network and set recipe.backbone.checkpoint to its folder"
            f"{', or, if this model has no such revision, set recipe.backbone.revision to one of its own or to null' if pinned else ''}"
        ) from error
    return model, report


def _check_keys(source: str, report: dict[str, Any], ignored: tuple[str, ...]) -> None:
    unexpected = [key for key in report["unexpected_keys"] if not key.startswith(ignored)] if ignored else list(report["unexpected_keys"])
    mismatched = [str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in report["mismatched_keys"]]
    wrong = {"missing": report["missing_keys"], "not in the model": unexpected, "of another shape": mismatched}
    problems = key_problems(source, wrong, "the checkpoint does not fit this model")
    if problems:
        raise InputError(problems)


def _normalises(source: str, folder: Path | None, config: Any, revision: str | None, *, own: bool) -> bool:
    """Whether the model expects waves normalised to zero mean and unit variance (`do_normalize` of its feature extractor).

    Always False for group-norm models: the group norm of wav2vec2-base's first convolution removes offset and scale, and the authors' code
    does not normalise. Raises InputError for a layer-norm model without the file.
    """
    if not has_layer_norm(config.to_dict()):
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
                    f"{source}: {PREPROCESSOR_FILE} cannot be read ({first_line(error)}); it states whether waves are normalised"
                ) from error
    if path is None or not Path(path).is_file():
        if own:
            return False
        raise InputError(missing_preprocessor(source))
    try:
        return bool(json.loads(Path(path).read_text()).get("do_normalize", False))
    except (OSError, ValueError) as error:
        raise_storage_error(error)
        raise InputError(f"{path}: cannot be read: {error}") from error


def _save(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with os_errors(folder / WEIGHTS_FILE):
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # a local path
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float32"  # transformers does not set it for a model built from a configuration
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _ready(model: Any, source: str) -> Any:
    if not hasattr(getattr(model, "wav2vec2", model), "masked_spec_embed"):
        raise InputError(f"{source}: has no mask embedding because mask_time_prob is 0 in its configuration; every stage masks frames")
    if getattr(model.config, "conv_pos_batch_norm", False):
        raise InputError(f"{source}: {BATCH_NORM}")
    if getattr(model.config, "add_adapter", False):
        raise InputError(f"{source}: has an adapter after the transformer (add_adapter); a checkpoint without one is needed")
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            # A checkpoint's configuration may switch it on: wasted time here, and the authors' code switches it off too.
            module.gradient_checkpointing = False
    model.float()
    model.eval()
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context without transformers' load report and progress bars; `_check_keys` checks the keys."""
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
