"""The shape of wav2vec v1 as planning expects it; that counts are those of the network, test_states.py tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ser_core.errors import InputError
from ser_core.models.fairseq_checkpoint import build_wav2vec, save_wav2vec
from ser_core.models.shapes import Wav2vecConfig, expected_shape, parse_config
from ser_core.settings.backbone import Wav2vecSettings
from tests.ser_core.models import rebuild


def test_expected_of_a_recipe(tmp_path: Path) -> None:
    """A configuration and a converted checkpoint say it; a fairseq file is expected to be as the published one."""
    settings = Wav2vecSettings(config=rebuild.WAV2VEC)
    save_wav2vec(build_wav2vec(settings), tmp_path / "converted")
    (tmp_path / "wav2vec_large.pt").write_bytes(b"not opened")
    assert expected_shape(settings) == parse_config(rebuild.WAV2VEC)
    assert expected_shape(Wav2vecSettings(checkpoint=str(tmp_path / "converted"))) == parse_config(rebuild.WAV2VEC)
    assert expected_shape(Wav2vecSettings(checkpoint=str(tmp_path / "wav2vec_large.pt"))) == Wav2vecConfig()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (Wav2vecSettings(), "neither checkpoint nor config"),
        (Wav2vecSettings(checkpoint="/nowhere/wav2vec_large.pt"), "no such wav2vec checkpoint"),
        (Wav2vecSettings(config={"layers": []}), "no such key"),
    ],
)
def test_invalid_wav2vec_settings_are_input_errors(settings: Wav2vecSettings, line: str) -> None:
    with pytest.raises(InputError, match=line):
        expected_shape(settings)
