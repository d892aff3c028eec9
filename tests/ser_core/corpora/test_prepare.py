"""Prepare: atomic, only what changed, resumed after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ser_core.corpora.audio import load_audio
from ser_core.corpora.checks import speakers_in_two_folds
from ser_core.corpora.manifest import Manifest, load_manifest
from ser_core.corpora.prepare import prepare
from ser_core.corpora.recordings import Recording
from ser_core.errors import InputError
from tests.ser_core.corpora import sources

ROOT = Path(__file__).resolve().parents[3]


def anonymous_labels(source: Path) -> Path:
    return sources.labels(
        source,
        {"Train": {f"DC_{code}.wav": code[0] for code in ("a1", "a2", "h1", "h2")}, "Val": {"JE_a1.wav": "a"}, "Test": {"KL_a1.wav": "a"}},
    )


KINDS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "iemocap": (sources.iemocap, 100),
    "savee": (sources.savee, 56),
    "emodb": (sources.emodb, 70),
    "ravdess": (sources.ravdess, 48),
    "cremad": (sources.cremad, 30),
    "tess": (sources.tess, 14),
    "csv": (sources.csv_corpus, 6),
    "labels": (anonymous_labels, 6),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reused(kind: str, source: Path, target: Path, **options: bool) -> tuple[int, Manifest]:
    """How many utterances were there already when prepare began to convert, and the manifest."""
    calls: list[int] = []
    manifest = prepare(kind, source, target, progress=lambda done, _total: calls.append(done), **options)  # type: ignore[arg-type]
    return calls[0], manifest


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path: Path, kind: str) -> None:
    """A manifest with every utterance at 16 kHz, no speaker on both sides of any fold, every class trained on, progress to the end."""
    build, count = KINDS[kind]
    calls: list[tuple[int, int]] = []
    target = tmp_path / "data" / kind
    manifest = prepare(kind, build(tmp_path / "source"), target, progress=lambda done, total: calls.append((done, total)))
    assert manifest == load_manifest(target)
    assert manifest.corpus == kind
    assert len(manifest.utterances) == count
    assert calls[-1] == (count, count)
    for fold in manifest.folds:
        training, test = manifest.training(fold), manifest.test(fold)
        assert test
        assert {u.label for u in training} == set(manifest.classes)
        assert not {u.speaker for u in training} & {u.speaker for u in test}
        assert not {u.id for u in training} & {u.id for u in test}
    for utterance in manifest.utterances[::7]:
        assert load_audio(manifest, utterance).shape == (utterance.samples,)
        assert soundfile.info(manifest.audio_path(utterance)).samplerate == 16_000
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [kind]


@pytest.mark.slow
def test_recorded_speech(tmp_path: Path, emodb_source: Path) -> None:
    """Real recordings: 535 files with the published counts, stored bit for bit, and no speaker on both sides of a fold."""
    manifest = prepare("emodb", emodb_source, tmp_path / "emodb")
    assert len(manifest.utterances) == 535
    assert 1030 < manifest.seconds < 1040
    assert [len(manifest.test(fold)) for fold in manifest.folds] == [107, 81, 116, 104, 127]
    for fold in manifest.folds:
        assert not {u.speaker for u in manifest.training(fold)} & {u.speaker for u in manifest.test(fold)}
    for utterance in manifest.utterances[::50]:
        original, _ = soundfile.read(emodb_source / "audio" / f"{utterance.id}.flac", dtype="float32")
        np.testing.assert_array_equal(load_audio(manifest, utterance), original)
    four = prepare("emodb", emodb_source, tmp_path / "four", name="emodb4", four_classes=True)
    assert (four.corpus, len(four.utterances), four.classes) == ("emodb4", 339, ("angry", "happy", "neutral", "sad"))


def test_digest_does_not_depend_on_the_place(tmp_path: Path) -> None:
    """Another folder, another time stamp, another name, WAV or FLAC: the same corpus."""
    one = sources.savee(tmp_path / "one")
    other = sources.savee(tmp_path / "elsewhere" / "other", name="{speaker}/{code}{number:02d}.flac")
    first = prepare("savee", one, tmp_path / "a")
    second = prepare("savee", other, tmp_path / "b" / "c", name="mine", workers=1)
    assert first.digest == second.digest
    sources.write_audio(one / "KL_su02.wav", rate=44_100, seed=99)
    assert prepare("savee", one, tmp_path / "a").digest != first.digest


def test_preparing_twice_changes_nothing(tmp_path: Path) -> None:
    """Nothing is converted, and no file is touched, the second time."""
    source, target = sources.savee(tmp_path / "source"), tmp_path / "savee"
    prepare("savee", source, target)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    count, _ = reused("savee", source, target)
    assert count == 56
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_only_what_changed_is_converted_again(tmp_path: Path) -> None:
    """One new source file and one damaged stored file: two conversions, and the corpus is right again."""
    source, target = sources.savee(tmp_path / "source"), tmp_path / "savee"
    before = prepare("savee", source, target)
    (target / "audio" / "DC_a01.flac").write_bytes(b"damaged")
    sources.write_audio(source / "KL_su02.wav", rate=44_100, seed=99)
    count, after = reused("savee", source, target)
    assert count == 54
    changed = [u.id for u, v in zip(before.utterances, after.utterances, strict=True) if u != v]
    assert changed == ["KL_su02"]
    assert load_audio(after, after.utterances[0]).shape == (after.utterances[0].samples,)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_utterance_taken_out_leaves_no_file(tmp_path: Path) -> None:
    """A corpus folder holds the manifest's files and no other."""
    source, target = sources.csv_corpus(tmp_path / "source"), tmp_path / "mine"
    prepare("csv", source, target)
    source.write_text("\n".join(line for line in source.read_text().splitlines() if "s10_loud" not in line))
    count, manifest = reused("csv", source, target)
    assert (count, manifest.corpus) == (5, "mine")
    assert {f"audio/{path.name}" for path in (target / "audio").iterdir()} == {u.audio for u in manifest.utterances}


KILLED = """
import os, signal, sys
from pathlib import Path
from ser_core.corpora.prepare import prepare

def progress(done, total):
    if done == 20:
        os.kill(os.getpid(), signal.SIGKILL)

prepare("savee", Path(sys.argv[1]), Path(sys.argv[2]), workers=1, progress=progress)
"""


def test_a_killed_prepare_is_resumed(tmp_path: Path) -> None:
    """After SIGKILL there is no corpus; the next prepare converts the rest only and ends with the same bytes as one that was left alone."""
    source, target = sources.savee(tmp_path / "source"), tmp_path / "data" / "savee"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(target)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    with (target.parent / ".savee.preparing" / "conversions.jsonl").open("a") as journal:
        journal.write('{"id": "DC_a0')  # as a kill in the middle of a line leaves it
    count, resumed = reused("savee", source, target)
    assert count == 20
    assert resumed.digest == prepare("savee", source, tmp_path / "whole").digest
    assert tree(target) == tree(tmp_path / "whole")
    assert [path.name for path in target.parent.iterdir()] == ["savee"]


def test_a_torn_file_of_a_killed_prepare_is_converted_again(tmp_path: Path) -> None:
    """A file left incomplete by a power failure is detected although the journal names it."""
    source, target = sources.savee(tmp_path / "source"), tmp_path / "savee"
    subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(target)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    torn = sorted((tmp_path / ".savee.preparing" / "audio").iterdir())[0]
    torn.write_bytes(torn.read_bytes()[:100])
    count, manifest = reused("savee", source, target)
    assert count == 19
    assert all(load_audio(manifest, u).shape == (u.samples,) for u in manifest.utterances)


def test_all_problems_at_once_and_nothing_written(tmp_path: Path) -> None:
    """Labels and audio, each file by name, in one go; not even the target's parent appears."""
    source = sources.iemocap(tmp_path / "source")
    wav = source / "Session4/sentences/wav/Ses04F_impro01"
    (wav / "Ses04F_impro01_F000.wav").write_bytes(b"")
    (wav / "Ses04F_impro01_F001.wav").write_bytes(b"junk" * 100)
    soundfile.write(wav / "Ses04F_impro01_F002.wav", np.full(9000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(wav / "Ses04F_impro01_F003.wav", sources.noise(1), 200)
    (wav / "Ses04F_impro01_M000.wav").unlink()
    labels = source / "Session3/dialog/EmoEvaluation/Ses03F_impro01.txt"
    labels.write_text(labels.read_text().replace("\tsad\t", "\tgloomy\t", 1) + sources.label_line("Ses03F_impro01_F000", "neu"))
    moved = source / "Session5/dialog/EmoEvaluation/Ses05F_impro01.txt"
    moved.write_text(moved.read_text() + sources.label_line("Ses01F_impro07_F000", "neu"))
    sources.write_audio(source / "Session5/sentences/wav/Ses05F_impro01/Ses01F_impro07_F000.wav")
    shutil.rmtree(source / "Session2")
    (source / "expected_counts.json").unlink()
    with pytest.raises(InputError) as caught:
        prepare("iemocap", source, tmp_path / "data" / "iemocap")
    assert [line.split(";")[0][:110] for line in caught.value.problems] == [
        "Session2: missing",
        "Session3/dialog/EmoEvaluation/Ses03F_impro01.txt line 19: unknown label 'gloomy' of turn Ses03F_impro01_F004",
        "Session3/dialog/EmoEvaluation/Ses03F_impro01.txt line 51: duplicate turn Ses03F_impro01_F000, labelled before "[:110],
        "Session4/dialog/EmoEvaluation/Ses04F_impro01.txt line 27: turn Ses04F_impro01_M000 has no audio: Ses04F_impro0"[:110],
        "Session5/sentences/wav/Ses05F_impro01/Ses01F_impro07_F000.wav: speaker 1F is in two folds: fold 5 (Session5/se"[:110],
        "Session4/sentences/wav/Ses04F_impro01/Ses04F_impro01_F000.wav: empty: the file has no bytes",
        "Session4/sentences/wav/Ses04F_impro01/Ses04F_impro01_F001.wav: unreadable: Format not recognised.",
        "Session4/sentences/wav/Ses04F_impro01/Ses04F_impro01_F002.wav: holds 9000 NaN or infinite samples",
        "Session4/sentences/wav/Ses04F_impro01/Ses04F_impro01_F003.wav: wrong rate: the header says 200 Hz",
    ]
    assert not (tmp_path / "data").exists()


def test_a_bad_recording_found_on_the_way_leaves_the_corpus_as_it_was(tmp_path: Path) -> None:
    """The existing corpus stays unchanged if the source has become unreadable."""
    source, target = sources.savee(tmp_path / "source"), tmp_path / "data" / "savee"
    prepare("savee", source, target)
    before = tree(target)
    (source / "JE_f02.wav").write_bytes(b"")
    sources.write_audio(source / "KL_su02.wav", rate=44_100, seed=99)
    with pytest.raises(InputError) as caught:
        prepare("savee", source, target)
    assert caught.value.problems == ("JE_f02.wav: empty: the file has no bytes",)
    assert tree(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["savee"]


def test_counts_are_checked(tmp_path: Path) -> None:
    """Too few recordings of a published corpus are an error; a stated subset must match its counts; without the check any will do."""
    source = sources.savee(tmp_path / "source")
    (source / "expected_counts.json").unlink()
    with pytest.raises(InputError, match="utterances 56 not 480, class angry 8 not 60"):
        prepare("savee", source, tmp_path / "savee")
    assert not (tmp_path / "savee").exists()
    assert len(prepare("savee", source, tmp_path / "unchecked", check_counts=False).utterances) == 56
    (source / "expected_counts.json").write_text(json.dumps({"classes": {"angry": 9}}))
    with pytest.raises(InputError, match="class angry 8 not 9"):
        prepare("savee", source, tmp_path / "savee")
    (source / "expected_counts.json").write_text(json.dumps({"speakers": 4}))
    with pytest.raises(InputError, match=r"expected_counts\.json: it must be an object"):
        prepare("savee", source, tmp_path / "savee")


def test_a_stated_subset_of_sessions(tmp_path: Path) -> None:
    """Two sessions of IEMOCAP, meant: two folds."""
    source = sources.iemocap(tmp_path / "source", sessions=(2, 4))
    manifest = prepare("iemocap", source, tmp_path / "iemocap")
    assert manifest.folds == ("2", "4")
    (source / "expected_counts.json").write_text(json.dumps({"folds": {"2": 20, "3": 20, "4": 20}}))
    with pytest.raises(InputError, match="Session3: missing"):
        prepare("iemocap", source, tmp_path / "iemocap")
    assert prepare("iemocap", source, tmp_path / "iemocap", check_counts=False).digest == manifest.digest
    assert manifest.utterances[0].dimensions == (2.5, 3.0, 3.5)
    assert manifest.source == {"kind": "iemocap", "dropped_turns_of_other_labels": 8}


def test_a_target_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    """A target that holds other things is never replaced."""
    source = sources.savee(tmp_path / "source")
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds other things"):
        prepare("savee", source, target)
    with pytest.raises(InputError, match="is a file"):
        prepare("savee", source, target / "thesis.tex")
    assert tree(target) == {"thesis.tex": b""}


def test_two_prepares_of_one_target(tmp_path: Path) -> None:
    """The second of two simultaneous prepares of one target is an error."""
    source, target = sources.savee(tmp_path / "source"), tmp_path / "savee"
    refused: list[InputError] = []

    def intrude(done: int, _total: int) -> None:
        if done == 5:
            with pytest.raises(InputError, match="another process is preparing") as caught:
                prepare("savee", source, target)
            refused.append(caught.value)

    assert len(prepare("savee", source, target, progress=intrude, workers=1).utterances) == 56
    assert len(refused) == 1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("imocap", {}, "unknown kind of corpus 'imocap'; known are iemocap, savee, emodb, ravdess, cremad, tess, emobox, csv, labels"),
        ("savee", {"four_classes": True}, "for emodb only"),
        ("savee", {"audio": Path()}, "for labels and emobox only"),
        ("savee", {"shared_speakers": True}, "--shared-speakers is for emobox, csv, labels: no fold of savee"),
    ],
)
def test_invalid_arguments(tmp_path: Path, kind: str, options: dict[str, bool], message: str) -> None:
    """A kind or an option that is not there is named."""
    with pytest.raises(InputError, match=message):
        prepare(kind, sources.savee(tmp_path / "source"), tmp_path / "target", **options)  # type: ignore[arg-type]


def test_speakers_in_two_folds_are_found() -> None:
    """The check behind every corpus: it finds a speaker on both sides, and passes unknown ones."""
    members = [Recording("a", Path("a"), "x", "p", "1"), Recording("b", Path("b"), "x", "p", "2"), Recording("c", Path("c"), "x", "", "1")]
    assert list(speakers_in_two_folds([*members, Recording("d", Path("d"), "x", "", "2")])) == ["p"]
