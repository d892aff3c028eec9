"""RAVDESS, CREMA-D and TESS: readers of corpora whose file names have everything, and silent recordings."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ser_core.corpora import cremad, ravdess, tess
from ser_core.corpora.checks import structure_problems
from ser_core.corpora.prepare import prepare
from ser_core.corpora.recordings import SourceListing
from ser_core.errors import InputError
from tests.ser_core.corpora import sources


def test_ravdess(tmp_path: Path) -> None:
    """Eight emotions, six folds of four actors, each actor in one; songs are left out, and that is noted."""
    reading = ravdess.read(sources.ravdess(tmp_path))
    assert reading.problems == ()
    assert reading.folds == ("1", "2", "3", "4", "5", "6")
    assert Counter(u.fold for u in reading.found) == dict.fromkeys(reading.folds, 8)
    assert {u.speaker for u in reading.found if u.fold == "1"} == {"01", "11", "20", "21"}
    assert sorted(u.speaker for u in reading.found) == sorted(f"{actor:02d}" for actor in range(1, 25) for _ in range(2))
    assert next(u for u in reading.found if u.id == "03-01-03-01-01-01-01").label == "happy"
    assert reading.notes == ("songs and sound of videos left out: 1",)


def test_cremad(tmp_path: Path) -> None:
    """Six emotions, and folds of 18 or 19 actors that do not depend on which recordings are there."""
    reading = cremad.read(sources.cremad(tmp_path), required=None)
    assert reading.problems == ()
    assert [(u.speaker, u.fold) for u in reading.found[::6]] == [("1001", "2"), ("1014", "4"), ("1023", "5"), ("1033", "3"), ("1066", "1")]
    assert {u.label for u in reading.found} == set(cremad.LABELS.values())
    assert Counter(cremad.folds_of_actors().values()) == {"1": 19, "2": 18, "3": 18, "4": 18, "5": 18}
    missing = cremad.read(tmp_path).problems
    assert len(missing) == 91 - 5
    assert missing[0] == f"{tmp_path}: actor 1002 is missing; unpack all of AudioWAV"


def test_tess(tmp_path: Path) -> None:
    """`ps` is surprise; a fold is a speaker; the recording that is distributed under a wrong name has the right speaker."""
    reading = tess.read(sources.tess(tmp_path))
    assert reading.problems == ()
    assert reading.folds == ("OAF", "YAF")
    assert Counter(u.label for u in reading.found) == dict.fromkeys(tess.LABELS.values(), 2)
    assert all(u.speaker == u.fold == u.id[:3] for u in reading.found)
    assert "OAF_bite_neutral" in {u.id for u in reading.found}


def test_published_counts_add_up() -> None:
    """Classes and folds of each corpus have as many recordings as the corpus."""
    for counts in (ravdess.COUNTS, cremad.COUNTS, tess.COUNTS):
        assert counts.classes is not None
        assert counts.folds is not None
        assert sum(counts.classes.values()) == sum(counts.folds.values()) == counts.utterances


@pytest.mark.parametrize(
    ("build", "read", "name", "problem"),
    [
        (sources.ravdess, ravdess.read, "03-01-09-01-01-01-01", "unknown label '09'"),
        (sources.ravdess, ravdess.read, "03-01-01-01-01-01-25", "unknown actor '25'"),
        (sources.ravdess, ravdess.read, "03-01-01", "not a name of RAVDESS"),
        (sources.cremad, cremad.read, "1066_DFA_JOY_XX", "unknown label 'JOY'"),
        (sources.cremad, cremad.read, "1099_DFA_ANG_XX", "unknown actor '1099'"),
        (sources.cremad, cremad.read, "1066-DFA-ANG", "not a name of CREMA-D"),
        (sources.tess, tess.read, "OAF_back_calm", "unknown label 'calm'"),
        (sources.tess, tess.read, "MAF_back_sad", "unknown speaker 'MAF'"),
        (sources.tess, tess.read, "back_sad", "not a name of TESS"),
    ],
)
def test_a_file_that_does_not_belong(
    tmp_path: Path, build: Callable[[Path], Path], read: Callable[..., SourceListing], name: str, problem: str
) -> None:
    """One line with the file."""
    source = build(tmp_path)
    sources.write_audio(source / f"{name}.wav")
    lines = [line for line in read(source, required=None).problems if line.startswith(f"{name}.wav: {problem}")]
    assert len(lines) == 1


@pytest.mark.parametrize(("build", "read"), [(sources.ravdess, ravdess.read), (sources.tess, tess.read)])
def test_a_corpus_that_was_unpacked_twice(tmp_path: Path, build: Callable[[Path], Path], read: Callable[..., SourceListing]) -> None:
    """The archives of some mirrors hold the same recordings a second time: each is named with its twin."""
    source = build(tmp_path / "source")
    shutil.copytree(source, tmp_path / "twin")
    (tmp_path / "twin").rename(source / "again")
    reading = read(source)
    lines = structure_problems(reading.found, reading.folds, source)
    assert len(lines) == len(reading.found) // 2
    assert all(": duplicate turn " in line for line in lines)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    """An actor, and an empty folder."""
    shutil.rmtree(sources.ravdess(tmp_path / "a") / "Actor_24")
    assert ravdess.read(tmp_path / "a").problems == (
        f"{tmp_path / 'a'}: actor 24 is missing; unpack all 24 folders of the audio-only speech",
    )
    (tmp_path / "empty").mkdir()
    for reader in (ravdess, cremad, tess):
        assert "holds no wav or FLAC file" in reader.read(tmp_path / "empty").problems[0]
        with pytest.raises(InputError, match="no such folder"):
            reader.read(tmp_path / "nowhere")


def test_a_silent_recording_is_kept_and_named(tmp_path: Path) -> None:
    """As 1076_MTI_SAD_XX of CREMA-D: it counts as published, and the manifest names it, also when nothing is converted again."""
    source = sources.cremad(tmp_path / "source")
    soundfile.write(source / "AudioWAV" / "1066_DFA_SAD_XX.wav", np.zeros(4_000, dtype=np.int16), 16_000)
    for _ in range(2):
        manifest = prepare("cremad", source, tmp_path / "cremad")
        assert manifest.source["notes"] == ["AudioWAV/1066_DFA_SAD_XX.wav: silent, all its samples are equal"]
    assert len(manifest.utterances) == 30
