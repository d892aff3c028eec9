"""Load wav2vec v1 from a checkpoint written by fairseq (`wav2vec_large.pt`), without fairseq."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ser_core.disk import os_errors, raise_storage_error
from ser_core.errors import InputError, first_line, is_memory_error
from ser_core.models.checkpoint_keys import key_problems
from ser_core.models.identity import MISSING_WAV2VEC, NO_WAV2VEC, wav2vec_identity
from ser_core.models.model_types import CONFIG_FILE
from ser_core.settings.backbone import Wav2vecSettings

if TYPE_CHECKING:
    from torch import Tensor

    from ser_core.models.shapes import Layers, Wav2vecConfig
    from ser_core.models.wav2vec import Wav2vec

__all__ = ["build_wav2vec", "convert_checkpoint", "save_wav2vec", "wav2vec_identity"]

WEIGHTS_FILE = "model.safetensors"
MAX_LAYERS = 100  # of an extractor or aggregator; wav2vec_large has 7 and 12

# Keys of fairseq's pretraining head, which is not used here.
IGNORED_PREFIX = "wav2vec_predictions."

# fairseq's layers are nn.Sequential: (pad,) convolution, dropout, norm, activation. fairseq's key -> key of ser_core.models.wav2vec.
RENAMINGS = (
    (re.compile(r"^feature_extractor\.conv_layers\.(\d+)\.0\.(\w+)$"), r"extractor.layers.\1.conv.\2"),
    (re.compile(r"^feature_extractor\.conv_layers\.(\d+)\.2\.(\w+)$"), r"extractor.layers.\1.norm.\2"),
    (re.compile(r"^feature_aggregator\.conv_layers\.(\d+)\.1\.(\w+)$"), r"aggregator.layers.\1.conv.\2"),
    (re.compile(r"^feature_aggregator\.conv_layers\.(\d+)\.3\.(\w+)$"), r"aggregator.layers.\1.norm.\2"),
    (re.compile(r"^feature_aggregator\.residual_proj\.(\d+)\.(\w+)$"), r"aggregator.residuals.\1.\2"),
)


def build_wav2vec(settings: Wav2vecSettings) -> Wav2vec:
    """Build wav2vec v1 in evaluation mode: from a fairseq checkpoint, a folder written by `save_wav2vec`, or a configuration and its seed.

    Raises InputError if a checkpoint cannot be found or read, or if its keys do not match the model.
    """
    import torch

    from ser_core.models.shapes import parse_config
    from ser_core.models.wav2vec import Wav2vec

    if settings.checkpoint is None:
        if not settings.config:
            raise InputError(NO_WAV2VEC)
        config = parse_config(settings.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.init_seed)
            return Wav2vec(config).eval()
    path = Path(settings.checkpoint).expanduser()
    if path.is_dir():
        return _open_folder(path)
    return _with_weights(*convert_checkpoint(path), path)


def save_wav2vec(model: Wav2vec, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`; the same model gives the same bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(model.config), indent=2, sort_keys=True) + "\n")


def convert_checkpoint(path: Path) -> tuple[Wav2vecConfig, dict[str, Tensor]]:
    """Return configuration and state dict of a fairseq checkpoint, with the keys of `Wav2vec`. Raises InputError for any other file.

    Nothing in the file is executed: it is read by torch's `weights_only` loader, and fairseq, which evaluates strings of a checkpoint as
    Python, is not involved.
    """
    if not path.is_file():
        raise InputError(f"{path}: {MISSING_WAV2VEC}")
    checkpoint = _read(path)
    state, values = checkpoint.get("model"), _settings_of(checkpoint)
    if not isinstance(state, Mapping) or values is None:
        raise InputError(f"{path}: not a fairseq checkpoint: no weights under `model`, or neither `args` nor `cfg`")
    return _converted_config(path, values), _converted_state(path, state)


class _Ignored:
    """Stands in for fairseq's counters of a training run, which old checkpoints contain; they are not used."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


def _read(path: Path) -> Mapping[str, Any]:
    import torch

    counters = [
        (_Ignored, f"fairseq.{module}.{name}")
        for module in ("meters", "logging.meters")
        for name in ("AverageMeter", "TimeMeter", "StopwatchMeter")
    ]
    try:
        # Old checkpoints hold their settings as a Namespace; the loader refuses every class that is not listed.
        with torch.serialization.safe_globals([argparse.Namespace, *counters]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, KeyError, AttributeError, ValueError, TypeError, EOFError, OSError) as error:
        raise_storage_error(error)
        if is_memory_error(error):
            raise
        raise InputError(f"{path}: not a checkpoint that can be read safely: {first_line(error)}") from error
    return loaded if isinstance(loaded, Mapping) else {}


def _settings_of(checkpoint: Mapping[str, Any]) -> Mapping[Any, Any] | None:
    """The model's settings: `cfg.model` of newer checkpoints, `args` of older ones; None if there are none."""
    configuration, arguments = checkpoint.get("cfg"), checkpoint.get("args")
    values = configuration.get("model") if isinstance(configuration, Mapping) else arguments
    if isinstance(values, argparse.Namespace):
        return vars(values)
    return values if isinstance(values, Mapping) else None


def _converted_config(path: Path, values: Mapping[Any, Any]) -> Wav2vecConfig:
    from ser_core.models.shapes import Wav2vecConfig, parse_config

    # Older checkpoints lack newer keys; the defaults of Wav2vecConfig are fairseq's.
    default = Wav2vecConfig()
    problems = []
    if str(values.get("aggregator", "cnn")) != "cnn":
        problems.append(f"{path}: aggregator {values['aggregator']!r}; only the convolutional one is supported")
    if str(values.get("vq_type", "none")) not in ("none", "None"):
        problems.append(f"{path}: a vq-wav2vec checkpoint (vq_type {values['vq_type']!r}); a plain wav2vec one is needed")
    if problems:
        raise InputError(problems)
    try:
        return parse_config(
            {
                "conv_feature_layers": _layers(values.get("conv_feature_layers"), default.conv_feature_layers),
                "conv_aggregator_layers": _layers(values.get("conv_aggregator_layers"), default.conv_aggregator_layers),
                "log_compression": bool(values.get("log_compression", default.log_compression)),
                "skip_connections_feat": bool(values.get("skip_connections_feat", default.skip_connections_feat)),
                "skip_connections_agg": bool(values.get("skip_connections_agg", default.skip_connections_agg)),
                "residual_scale": float(values.get("residual_scale", default.residual_scale)),
                "conv_bias": not values.get("no_conv_bias", not default.conv_bias),
                "zero_pad": bool(values.get("agg_zero_pad", default.zero_pad)),
                "affine": not values.get("non_affine_group_norm", not default.affine),
                "activation": str(values.get("activation", default.activation)),
                "dropout": float(values.get("dropout", default.dropout)),
            }
        )
    except (ValueError, TypeError, InputError) as error:
        raise InputError(f"{path}: its settings cannot be used: {first_line(error)}") from error


def _layers(text: object, default: Layers) -> Layers:
    """Convolution layers (channels, kernel, stride) from fairseq's text; ValueError or TypeError if it is anything else."""
    if text is None:
        return default
    try:
        return tuple(
            (int(channels), int(kernel), int(stride)) for channels, kernel, stride in _evaluate(ast.parse(str(text), mode="eval").body)
        )
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"convolution layers {str(text)[:80]!r}") from error


def _evaluate(node: ast.expr) -> list[Any]:
    """Evaluate list expressions as fairseq writes them, `[(512, 10, 5)] + [(512, 4, 2)] * 3`; ValueError or TypeError for anything else."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left) + _evaluate(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        layers, times = _evaluate(node.left), ast.literal_eval(node.right)
        if not isinstance(times, int) or len(layers) * times > MAX_LAYERS:
            raise ValueError(f"more than {MAX_LAYERS} layers")
        return layers * times
    found = ast.literal_eval(node)
    if not isinstance(found, list | tuple):
        raise TypeError(f"{type(found).__name__} in place of a list")
    return list(found)


def _converted_state(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    converted: dict[str, Tensor] = {}
    unmatched = []
    for name, tensor in state.items():
        if str(name).startswith(IGNORED_PREFIX):
            continue
        for pattern, ours in RENAMINGS:
            if pattern.match(str(name)) and isinstance(tensor, torch.Tensor):
                converted[pattern.sub(ours, name)] = tensor.detach().float().clone()
                break
        else:
            unmatched.append(str(name))
    if unmatched:
        raise InputError(key_problems(path, {"not in the model": unmatched}, "not a plain wav2vec v1 model"))
    return converted


def _open_folder(folder: Path) -> Wav2vec:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ser_core.models.shapes import parse_config

    try:
        config = parse_config(json.loads((folder / CONFIG_FILE).read_text()))
        with os_errors(folder / WEIGHTS_FILE):
            state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise_storage_error(error)
        raise InputError(f"{folder}: not a saved wav2vec model: {error}") from error
    return _with_weights(config, state, folder)


def _with_weights(config: Wav2vecConfig, state: Mapping[str, Tensor], path: Path) -> Wav2vec:
    import torch

    from ser_core.models.wav2vec import Wav2vec

    with torch.device("meta"):  # no memory is allocated for a configuration that does not fit its weights
        wanted = Wav2vec(config).state_dict()
    wrong = {
        "missing": set(wanted) - set(state),
        "not in the model": set(state) - set(wanted),
        "of another shape": {name for name in set(state) & set(wanted) if state[name].shape != wanted[name].shape},
    }
    problems = key_problems(path, wrong, "the checkpoint does not fit its own configuration")
    if problems:
        raise InputError(problems)
    model = Wav2vec(config)
    model.load_state_dict(dict(state))
    return model.eval()
