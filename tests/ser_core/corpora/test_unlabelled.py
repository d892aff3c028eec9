"""Speech without labels: LibriSpeech's layout and a folder per speaker; what is wrong is named, and nothing can be trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ser_core.corpora.prepare import prepare
from ser_core.errors import InputError
from ser_core.registry import REGISTRY
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.recipe import Recipe
from tests.ser_core.corpora.sources import write_audio


def test_librispeech_and_folders_of_speakers(tmp_path: Path) -> None:
    """A speaker is the first number of LibriSpeech's names, in any folder, else the first folder."""
    source = tmp_path / "LibriSpeech"
    for name in ("test-clean/1089/134686/1089-134686-0000.flac", "test-clean/121/1/121-1-0001.flac", "anna/take one.wav", "alone.wav"):
        write_audio(source / name)
    (source / "test-clean/1089/134686/1089-134686.trans.txt").write_text("1089-134686-0000 HE HOPED")
    manifest = prepare("unlabelled", source, tmp_path / "data" / "librispeech")
    assert manifest.corpus == "librispeech"
    assert {utterance.id: utterance.speaker for utterance in manifest.utterances} == {
        "1089-134686-0000": "1089",
        "121-1-0001": "121",
        "alone": "",
        "take one": "anna",
    }
    assert (manifest.classes, manifest.folds) == (("unlabelled",), ("all",))


def test_a_folder_without_speech_or_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no wav or FLAC file"):
        prepare("unlabelled", tmp_path / "empty", tmp_path / "data" / "a")
    for folder in ("anna", "bert"):
        write_audio(tmp_path / "twice" / folder / "1.wav")
    with pytest.raises(InputError, match=r"bert/1\.wav: duplicate turn 1, also in anna/1\.wav"):
        prepare("unlabelled", tmp_path / "twice", tmp_path / "data" / "b")
    assert not (tmp_path / "data").exists()


def test_it_can_be_measured_and_not_trained_on(tmp_path: Path) -> None:
    """Refused before a launch, by the corpus; `pretraining_loss` is not."""
    write_audio(tmp_path / "speech" / "1-2-3.wav")
    prepare("unlabelled", tmp_path / "speech", tmp_path / "data")
    recipe = Recipe(backbone=BackboneSettings(checkpoint=None))
    REGISTRY.check_corpus(tmp_path / "data", [("pretraining_loss", recipe)], {"all": ()})
    with pytest.raises(InputError, match="no utterances to train on when fold 'all' is held out"):
        REGISTRY.check_corpus(tmp_path / "data", [("vft", recipe)], {"all": ()})
