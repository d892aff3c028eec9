"""Our wav2vec v1 is fairseq's on the same weights, however the checkpoint was saved; anything else is refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ser_core.errors import InputError
from ser_core.models.fairseq_checkpoint import build_wav2vec, convert_checkpoint, save_wav2vec, wav2vec_identity
from ser_core.models.shapes import Wav2vecConfig, parse_config
from ser_core.settings.backbone import Wav2vecSettings
from tests.ser_core.models import rebuild
from tests.ser_core.models.unsafe import RunsCode

FEATURE = "[(12, 10, 5)] + [(12, 4, 2)] * 2 + [(16, 1, 1)]"
AGGREGATOR = "[(16, 2, 1), (16, 3, 1), (20, 4, 1)]"
VARIANTS: list[dict[str, Any]] = [
    {"log_compression": True, "skip_connections_agg": True, "residual_scale": 0.5},
    {"log_compression": False, "skip_connections_feat": True, "skip_connections_agg": False, "agg_zero_pad": True},
    {"no_conv_bias": True, "activation": "gelu", "residual_scale": 0.25},
    {"non_affine_group_norm": True},
]


def fairseq_model(**options: Any) -> tuple[Any, dict[str, Any]]:
    from fairseq.models.wav2vec.wav2vec import Wav2VecConfig, Wav2VecModel

    values = {"conv_feature_layers": FEATURE, "conv_aggregator_layers": AGGREGATOR, "prediction_steps": 2, **options}
    config = Wav2VecConfig(**values)
    config.infonce = False
    model = Wav2VecModel(config)
    rebuild.fill(dict(model.named_parameters()), seed=11)
    return model.eval(), values


def save(state_dict: dict[str, torch.Tensor], values: dict[str, Any], path: Path, style: str) -> Path:
    """Write a checkpoint as fairseq has it: old ones with a Namespace, later ones with a plain dictionary of settings."""
    state: dict[str, Any] = {
        "model": state_dict,
        "optimizer_history": [
            {"criterion_name": "Wav2vecCriterion", "optimizer_name": "FairseqAdam", "num_updates": 10, "lr_scheduler_state": {"best": 1.0}}
        ],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }
    if style == "args":
        state["args"] = argparse.Namespace(
            arch="wav2vec",
            task="audio_pretraining",
            criterion="binary_cross_entropy",
            data="",
            sample_rate=16000,
            normalize=False,
            **values,
        )
    else:
        state["args"] = None
        state["cfg"] = {
            "model": {"_name": "wav2vec", **values, "infonce": False},
            "task": {"_name": "audio_pretraining", "data": "", "sample_rate": 16000, "normalize": False},
        }
    torch.save(state, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("style", "options"), [*zip(["args", "cfg", "args", "cfg"], VARIANTS, strict=True), ("cfg", VARIANTS[0])])
def test_equal_to_fairseq(tmp_path: Path, style: str, options: dict[str, Any]) -> None:
    """Extracted and aggregated frames of a converted checkpoint agree to 1e-6 relative."""
    theirs, values = fairseq_model(**options)
    ours = build_wav2vec(Wav2vecSettings(checkpoint=str(save(theirs.state_dict(), values, tmp_path / "w2v.pt", style))))
    wave = torch.from_numpy(rebuild.waves()[0])[None]
    with torch.no_grad():
        expected, frames = theirs.feature_extractor(wave), ours.extractor(wave)
        aggregated = theirs.feature_aggregator(expected)
        pairs = [(frames, expected), (ours.aggregator(frames), aggregated), (ours(wave), aggregated)]
    for found, wanted in pairs:
        assert float((found - wanted).norm() / wanted.norm()) < 1e-6
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=5e-6)  # sums in another order, where little is left of large terms


@pytest.mark.slow
def test_a_checkpoint_is_opened_without_fairseq(tmp_path: Path) -> None:
    """Also an old one that contains the counters of its training run."""
    from fairseq.logging.meters import AverageMeter, StopwatchMeter, TimeMeter

    theirs, values = fairseq_model(**VARIANTS[0])
    path = save(theirs.state_dict(), values, tmp_path / "w2v.pt", "args")
    state = torch.load(path, weights_only=False)
    state["extra_state"]["train_meters"] = {"loss": AverageMeter(), "ups": TimeMeter(), "wall": StopwatchMeter()}
    torch.save(state, path)
    code = (
        "import sys; sys.modules['fairseq'] = None; from pathlib import Path; "
        "from ser_core.models.fairseq_checkpoint import convert_checkpoint; "
        f"config, state = convert_checkpoint(Path({str(path)!r})); print(len(state), config.log_compression)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    ours = build_wav2vec(Wav2vecSettings(checkpoint=str(path)))
    assert done.stdout.split() == [str(len(ours.state_dict())), "True"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers",
    [
        "__import__('pathlib').Path('MARK').touch() or [(12, 10, 5)]",
        "[(12, 10, 5)] * 1000000000",
        "[(12, 10, 5)] * (2 ** 40)",
        "'a' * 99",
        "[(1000000000, 1000000000, 1)]",
        "[(-1, 2, 1)]",
        "[]",
        "[(12, 10)]",
    ],
)
def test_settings_of_a_checkpoint_are_not_executed(layers: str, tmp_path: Path) -> None:
    """fairseq evaluates its layers as Python; here they are layers that fit the weights, or an error."""
    theirs, values = fairseq_model()
    mark = tmp_path / "mark"
    for style in ("args", "cfg"):
        path = save(
            theirs.state_dict(), {**values, "conv_feature_layers": layers.replace("MARK", str(mark))}, tmp_path / f"{style}.pt", style
        )
        with pytest.raises(InputError, match=rf"{style}\.pt"):
            build_wav2vec(Wav2vecSettings(checkpoint=str(path)))
    assert not mark.exists()


@pytest.mark.parametrize("place", ["model", "args", "extra_state"])
def test_a_pickle_that_runs_code_is_refused(place: str, tmp_path: Path) -> None:
    """Wherever it is in the file."""
    theirs, values = fairseq_model()
    path = save(theirs.state_dict(), values, tmp_path / "w2v.pt", "args")
    state = torch.load(path, weights_only=False)
    state[place] = {"x": RunsCode(tmp_path / "mark")}
    torch.save(state, path)
    with pytest.raises(InputError, match=r"w2v\.pt: not a checkpoint that can be read safely"):
        convert_checkpoint(path)
    assert not (tmp_path / "mark").exists()


def test_save_and_load_in_our_format(tmp_path: Path) -> None:
    """A converted model is written and read without fairseq; the same bytes each time."""
    theirs, values = fairseq_model(**VARIANTS[0])
    model = build_wav2vec(Wav2vecSettings(checkpoint=str(save(theirs.state_dict(), values, tmp_path / "w2v.pt", "args"))))
    for name in ("first", "second"):
        save_wav2vec(model, tmp_path / name)
    again = build_wav2vec(Wav2vecSettings(checkpoint=str(tmp_path / "first")))
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_default_shape_is_fairseqs(tmp_path: Path) -> None:
    """Settings a checkpoint does not mention are fairseq's defaults: the same fields, the same network."""
    from fairseq.models.wav2vec.wav2vec import Wav2VecConfig

    theirs, ours = Wav2VecConfig(), Wav2vecConfig()
    assert str([tuple(layer) for layer in ours.conv_feature_layers]) == theirs.conv_feature_layers
    assert str([tuple(layer) for layer in ours.conv_aggregator_layers]) == theirs.conv_aggregator_layers
    for name in ("log_compression", "skip_connections_feat", "skip_connections_agg", "residual_scale", "dropout"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.conv_bias, ours.zero_pad, ours.affine) == (not theirs.no_conv_bias, theirs.agg_zero_pad, not theirs.non_affine_group_norm)


@pytest.mark.slow
def test_invalid_checkpoints_are_input_errors(tmp_path: Path) -> None:
    """No file, not a checkpoint, keys without a place, keys missing: one line each, naming the path."""
    theirs, values = fairseq_model()
    missing, unmatched = dict(theirs.state_dict()), dict(theirs.state_dict())
    del missing["feature_aggregator.conv_layers.0.1.weight"]
    unmatched["extra.weight"] = torch.zeros(1)
    for name, state in (("missing", missing), ("unmatched", unmatched)):
        path = save(state, values, tmp_path / f"{name}.pt", "args")
        with pytest.raises(InputError, match=rf"{name}\.pt: 1 key .*(feature_aggregator|aggregator.layers|extra.weight)"):
            build_wav2vec(Wav2vecSettings(checkpoint=str(path)))
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(InputError, match=r"torn\.pt: not a checkpoint that can be read safely"):
        convert_checkpoint(tmp_path / "torn.pt")
    with pytest.raises(InputError, match="no such wav2vec checkpoint"):
        convert_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="neither checkpoint nor config"):
        build_wav2vec(Wav2vecSettings())


def test_vq_checkpoint(tmp_path: Path) -> None:
    """vq-wav2vec is another model: said so, instead of loaded without its quantizer."""
    theirs, values = fairseq_model(vq_type="gumbel", vq_vars=4, vq_groups=2)
    with pytest.raises(InputError, match="vq-wav2vec"):
        convert_checkpoint(save(theirs.state_dict(), values, tmp_path / "vq.pt", "args"))


def test_configuration() -> None:
    """Plain values of YAML become a configuration; each wrong key or value is named."""
    config = parse_config(rebuild.WAV2VEC)
    assert config.conv_aggregator_layers == ((20, 2, 1), (20, 3, 1), (24, 4, 1))
    assert parse_config(dataclasses.asdict(config)) == config
    with pytest.raises(InputError) as caught:
        parse_config({"log_compresion": True, "conv_feature_layers": [[1, 2]], "residual_scale": "much", "activation": "tanh"})
    assert len(caught.value.problems) == 4
    assert "did you mean log_compression" in caught.value.problems[0]


def test_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identity follows the content: of a checkpoint its digest, of a random model its configuration and seed."""
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    assert wav2vec_identity(Wav2vecSettings(checkpoint=str(first))) == wav2vec_identity(Wav2vecSettings(checkpoint=str(second)))
    monkeypatch.setenv("HOME", str(tmp_path))  # `~` is known to planning as it is to loading
    assert wav2vec_identity(Wav2vecSettings(checkpoint="~/a.pt")) == wav2vec_identity(Wav2vecSettings(checkpoint=str(first)))
    assert wav2vec_identity(Wav2vecSettings(config=rebuild.WAV2VEC, init_seed=3)) == {"config": rebuild.WAV2VEC, "init_seed": 3}
    with pytest.raises(InputError, match="no such wav2vec checkpoint"):
        wav2vec_identity(Wav2vecSettings(checkpoint=str(tmp_path / "c.pt")))
