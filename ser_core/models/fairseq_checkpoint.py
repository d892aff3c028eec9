"""Load wav2vec v1 from a fairseq checkpoint (`wav2vec_large.pt`). The only module that imports fairseq."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import json
import logging
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ser_core.errors import InputError, first_line, is_memory_error
from ser_core.models.checkpoint_keys import key_problems
from ser_core.models.identity import CONFIG_FILE, MISSING_WAV2VEC, NO_WAV2VEC, wav2vec_identity
from ser_core.settings import Wav2vecSettings

if TYPE_CHECKING:
    from torch import Tensor

    from ser_core.models.shapes import Layers, Wav2vecConfig
    from ser_core.models.wav2vec import Wav2vec

__all__ = ["build_wav2vec", "convert_checkpoint", "save_wav2vec", "wav2vec_identity"]

WEIGHTS_FILE = "model.safetensors"

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
    config, state = convert_checkpoint(path)
    return _with_weights(Wav2vec(config), state, path)


def save_wav2vec(model: Wav2vec, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`; the same model gives the same bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(model.config), indent=2, sort_keys=True) + "\n")


def convert_checkpoint(path: Path) -> tuple[Wav2vecConfig, dict[str, Tensor]]:
    """Return configuration and state dict of a fairseq checkpoint, with the keys of `Wav2vec`. Raises InputError for any other model."""
    import torch

    if not path.is_file():
        raise InputError(f"{path}: {MISSING_WAV2VEC}")
    try:
        # Old checkpoints hold their arguments as a Namespace; torch.load refuses any other class.
        with _logging_restored(), torch.serialization.safe_globals([argparse.Namespace]):
            from fairseq import checkpoint_utils

            models, configuration, _task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    except (pickle.UnpicklingError, RuntimeError, KeyError, AttributeError, ValueError, TypeError, EOFError, OSError) as error:
        if is_memory_error(error):
            raise
        raise InputError(f"{path}: fairseq cannot open it as a wav2vec checkpoint: {first_line(error)}") from error
    values = configuration["model"]
    config = _converted_config(path, values if isinstance(values, Mapping) else vars(values))
    return config, _converted_state(path, models[0].state_dict())


@contextlib.contextmanager
def _logging_restored() -> Iterator[None]:
    """Context that undoes what importing fairseq does: it sets the root logger to debug level with a handler, and hydra warns."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _converted_config(path: Path, values: Mapping[Any, Any]) -> Wav2vecConfig:
    from ser_core.models.shapes import Wav2vecConfig

    # Older checkpoints lack newer keys; the defaults of Wav2vecConfig are fairseq's.
    default = Wav2vecConfig()
    problems = []
    if str(values.get("aggregator", "cnn")) != "cnn":
        problems.append(f"{path}: aggregator {values['aggregator']!r}; only the convolutional one is supported")
    if str(values.get("vq_type", "none")) not in ("none", "None"):
        problems.append(f"{path}: a vq-wav2vec checkpoint (vq_type {values['vq_type']!r}); a plain wav2vec one is needed")
    if problems:
        raise InputError(problems)
    return Wav2vecConfig(
        conv_feature_layers=_layers(path, values.get("conv_feature_layers"), default.conv_feature_layers),
        conv_aggregator_layers=_layers(path, values.get("conv_aggregator_layers"), default.conv_aggregator_layers),
        log_compression=bool(values.get("log_compression", default.log_compression)),
        skip_connections_feat=bool(values.get("skip_connections_feat", default.skip_connections_feat)),
        skip_connections_agg=bool(values.get("skip_connections_agg", default.skip_connections_agg)),
        residual_scale=float(values.get("residual_scale", default.residual_scale)),
        conv_bias=not values.get("no_conv_bias", not default.conv_bias),
        zero_pad=bool(values.get("agg_zero_pad", default.zero_pad)),
        affine=not values.get("non_affine_group_norm", not default.affine),
        activation=str(values.get("activation", default.activation)),
        dropout=float(values.get("dropout", default.dropout)),
    )


def _layers(path: Path, text: object, default: Layers) -> Layers:
    if text is None:
        return default
    try:
        value = _evaluate(ast.parse(str(text), mode="eval").body)
        return tuple((int(channels), int(kernel), int(stride)) for channels, kernel, stride in value)
    except (SyntaxError, ValueError, TypeError) as error:
        raise InputError(f"{path}: convolution layers {text!r} cannot be read") from error


def _evaluate(node: ast.expr) -> Any:
    """Evaluate list expressions as fairseq writes them, `[(512, 10, 5)] + [(512, 4, 2)] * 3`; ValueError or TypeError for anything else."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left) + _evaluate(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _evaluate(node.left) * _evaluate(node.right)
    return ast.literal_eval(node)


def _converted_state(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    unmatched = []
    for name, tensor in state.items():
        if name.startswith(IGNORED_PREFIX):
            continue
        for pattern, ours in RENAMINGS:
            if pattern.match(name):
                converted[pattern.sub(ours, name)] = tensor.detach().float().clone()
                break
        else:
            unmatched.append(name)
    if unmatched:
        raise InputError(key_problems(path, {"not in the model": unmatched}, "not a plain wav2vec v1 model"))
    return converted


def _open_folder(folder: Path) -> Wav2vec:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ser_core.models.shapes import parse_config
    from ser_core.models.wav2vec import Wav2vec

    try:
        config = parse_config(json.loads((folder / CONFIG_FILE).read_text()))
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: not a saved wav2vec model: {error}") from error
    return _with_weights(Wav2vec(config), state, folder)


def _with_weights(model: Wav2vec, state: Mapping[str, Tensor], path: Path) -> Wav2vec:
    wanted = model.state_dict()
    wrong = {
        "missing": set(wanted) - set(state),
        "not in the model": set(state) - set(wanted),
        "of another shape": {name for name in set(state) & set(wanted) if state[name].shape != wanted[name].shape},
    }
    problems = key_problems(path, wrong, "the checkpoint does not fit its own configuration")
    if problems:
        raise InputError(problems)
    model.load_state_dict(dict(state))
    return model.eval()
