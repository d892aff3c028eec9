"""Readers of all corpora: correct results, and every kind of problem reported with the file name."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_core.corpora import csv_corpus, emodb, iemocap, labels, savee
from ser_core.corpora.checks import count_problems, structure_problems
from ser_core.corpora.recordings import ExpectedCounts, Recording, SourceListing
from ser_core.errors import InputError
from tests.ser_core.corpora import sources

IMPRO = "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt"


def test_iemocap(tmp_path: Path) -> None:
    """Four classes, excited is happy, others dropped, speakers from turn names, dimensions kept, files of macOS ignored."""
    reading = iemocap.read(sources.iemocap(tmp_path))
    assert reading.problems == ()
    assert reading.folds == ("1", "2", "3", "4", "5")
    assert Counter(u.label for u in reading.found) == {"neutral": 20, "happy": 40, "angry": 20, "sad": 20}
    assert {(u.speaker, u.fold) for u in reading.found} == {(f"{n}{sex}", str(n)) for n in range(1, 6) for sex in "FM"}
    assert {u.dimensions for u in reading.found} == {(2.5, 3.0, 3.5)}
    assert reading.facts == {"dropped_turns_of_other_labels": 20}
    turn = next(u for u in reading.found if u.id == "Ses04M_script01_1b_F002")
    assert (turn.label, turn.speaker, turn.path.name) == ("happy", "4F", "Ses04M_script01_1b_F002.wav")


def test_iemocap_inside_its_release_folder(tmp_path: Path) -> None:
    """The folder that the archive unpacks to may be named as well as the one that holds it."""
    sources.iemocap(tmp_path / "IEMOCAP_full_release")
    assert len(iemocap.read(tmp_path).found) == len(iemocap.read(tmp_path / "IEMOCAP_full_release").found) == 100


def test_published_counts_add_up() -> None:
    """The counts that a source is compared with agree with themselves and with the corpora's descriptions."""
    for counts, total in ((iemocap.COUNTS, 5531), (savee.COUNTS, 480), (emodb.counts(False), 535)):
        assert counts.classes is not None
        assert counts.folds is not None
        assert sum(counts.classes.values()) == sum(counts.folds.values()) == counts.utterances == total
    assert emodb.counts(True).utterances == 339


def add_line(line: str, name: str = IMPRO) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / name
        path.write_text(path.read_text() + line)

    return change


def remove(name: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        shutil.rmtree(source / name) if (source / name).is_dir() else (source / name).unlink()

    return change


def copy_turn(source: Path) -> None:
    wav = source / "Session2/sentences/wav"
    shutil.copy(wav / "Ses02F_impro01/Ses02F_impro01_F000.wav", wav / "Ses02M_script01_1b")


def garble(source: Path) -> None:
    (source / IMPRO).write_bytes(bytes(100))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (remove("Session2"), "Session2: missing"),
        (remove("Session2/dialog/EmoEvaluation"), "Session2/dialog/EmoEvaluation: missing"),
        (remove("Session2/sentences/wav"), "Session2/sentences/wav: missing"),
        (remove("Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F000.wav"), f"{IMPRO} line 3: turn Ses02F_impro01_F000 has no audio"),
        (add_line(sources.label_line("Ses02F_impro01_F000", "neu")), f"{IMPRO} line 51: duplicate turn Ses02F_impro01_F000"),
        (copy_turn, "Session2/sentences/wav/Ses02M_script01_1b/Ses02F_impro01_F000.wav: duplicate turn"),
        (add_line(sources.label_line("Ses02F_impro01_F077", "hpy")), f"{IMPRO} line 51: unknown label 'hpy' of turn Ses02F_impro01_F077"),
        (add_line("[0.1 - 0.2]\tSes02F_impro01_F077\n"), f"{IMPRO} line 51: not a label line"),
        (add_line(sources.label_line("somebody", "neu")), f"{IMPRO} line 51: not a label line"),
        (garble, f"{IMPRO}: holds no labelled turn"),
    ],
)
def test_iemocap_problems(tmp_path: Path, change: Callable[[Path], None], line: str) -> None:
    """One line each, with the file, the line in it, and the turn."""
    source = sources.iemocap(tmp_path)
    change(source)
    reading = iemocap.read(source)
    assert len(reading.problems) == 1
    assert reading.problems[0].startswith(line)


def test_iemocap_dropped_turns_need_no_audio(tmp_path: Path) -> None:
    """A turn with a dropped label needs no recording."""
    source = sources.iemocap(tmp_path)
    (source / "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F005.wav").unlink()
    assert iemocap.read(source).problems == ()


def test_iemocap_of_some_sessions(tmp_path: Path) -> None:
    """Two sessions are a mistake, unless they are meant."""
    source = sources.iemocap(tmp_path, sessions=(2, 4))
    assert [line.split(":")[0] for line in iemocap.read(source).problems] == ["Session1", "Session3", "Session5"]
    assert iemocap.read(source, required=None).folds == ("2", "4")


@pytest.mark.parametrize(
    "name", ["{speaker}_{code}{number:02d}.wav", "{speaker}/{code}{number:02d}.wav", "AudioData/{speaker}/{code}{number:02d}.wav"]
)
def test_savee(tmp_path: Path, name: str) -> None:
    """However the archive was unpacked, the same utterances come out, named alike."""
    reading = savee.read(sources.savee(tmp_path, name=name))
    assert reading.problems == ()
    assert reading.folds == ("DC", "JE", "JK", "KL")
    assert Counter(u.label for u in reading.found) == dict.fromkeys(("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"), 8)
    assert all(u.speaker == u.fold == u.id[:2] for u in reading.found)
    assert {u.id for u in reading.found if u.label == "sad"} == {f"{s}_sa{n:02d}" for s in savee.SPEAKERS for n in (1, 2)}


def test_savee_problems(tmp_path: Path) -> None:
    """Unknown names, labels and speakers, a missing speaker: all at once."""
    source = sources.savee(tmp_path)
    for path in source.glob("KL_*"):
        path.unlink()
    for name in ("DC_q01.wav", "XX_a01.wav", "notes on recording.wav"):
        sources.write_audio(source / name)
    lines = savee.read(source).problems
    assert [line.split(":")[0] for line in lines] == ["DC_q01.wav", "XX_a01.wav", "notes on recording.wav", str(source)]
    assert "unknown label 'q'" in lines[0]
    assert "unknown speaker 'XX'" in lines[1]
    assert "speaker KL is missing" in lines[3]


def test_savee_in_two_layouts_at_once_is_a_duplicate(tmp_path: Path) -> None:
    """The same recording under both of its names would count twice."""
    source = sources.savee(tmp_path)
    sources.write_audio(source / "DC" / "a01.wav")
    reading = savee.read(source)
    lines = structure_problems(reading.found, reading.folds, source)
    assert lines == ["DC/a01.wav: duplicate turn DC_a01, also in DC_a01.wav; keep one"]


def test_emodb(tmp_path: Path) -> None:
    """Seven emotions, five folds of one man and one woman, or the four classes of IEMOCAP."""
    reading = emodb.read(sources.emodb(tmp_path))
    assert reading.problems == ()
    assert reading.folds == ("03-08", "10-09", "11-13", "12-14", "15-16")
    assert Counter(u.label for u in reading.found) == dict.fromkeys(("angry", "boredom", "disgust", "fear", "happy", "neutral", "sad"), 10)
    assert all(u.speaker in u.fold.split("-") for u in reading.found)
    four = emodb.read(tmp_path, four_classes=True)
    assert {u.label for u in four.found} == {"angry", "happy", "neutral", "sad"}


def test_emodb_problems(tmp_path: Path) -> None:
    """Unknown speaker, letter or name, and a missing speaker, by file name."""
    source = sources.emodb(tmp_path)
    for path in source.rglob("14*.wav"):
        path.unlink()
    for name in ("03a01Xa.wav", "77a01Fa.wav", "track.wav"):
        sources.write_audio(source / name)
    assert [line.split(";")[0] for line in emodb.read(source).problems] == [
        "03a01Xa.wav: unknown label 'X'",
        "77a01Fa.wav: unknown speaker '77'",
        "track.wav: not a name of EmoDB, such as 03a01Fa.wav",
        f"{source}: speaker 14 is missing",
    ]


@pytest.mark.parametrize("read", [iemocap.read, savee.read, emodb.read])
def test_empty_or_absent_source(tmp_path: Path, read: Callable[[Path], SourceListing]) -> None:
    """A folder with nothing in it, and none at all, are told apart."""
    assert len(read(tmp_path).problems) == 1
    with pytest.raises(InputError, match="no such folder"):
        read(tmp_path / "absent")


def test_csv(tmp_path: Path) -> None:
    """Paths count from the file, folds are ordered as numbers, a folder with one file will do, other columns are left alone."""
    file = sources.csv_corpus(tmp_path)
    reading = csv_corpus.read(file)
    assert reading.problems == ()
    assert reading.folds == ("1", "2", "10")
    assert reading.found[0] == Recording("s1_calm", tmp_path / "clips/s1_calm.wav", "calm", "s1", "1")
    assert csv_corpus.read(tmp_path) == reading
    file.write_text("\n".join(f"{line},{'age' if number == 0 else 40}" for number, line in enumerate(file.read_text().splitlines())))
    assert csv_corpus.read(file) == reading


def test_csv_dimensions(tmp_path: Path) -> None:
    """Valence, activation and dominance are taken where the columns are there."""
    row = {"path": "a.wav", "label": "x", "speaker": "s", "fold": "1", "valence": 1.5, "activation": 2, "dominance": -3}
    header = "path,label,speaker,fold,valence,activation,dominance"
    assert csv_corpus.read(sources.csv_corpus(tmp_path, [row], header)).found[0].dimensions == (1.5, 2.0, -3.0)
    (tmp_path / "corpus.csv").write_text(f"{header}\na.wav,x,s,1,1,2,high\n")
    assert "must be numbers" in csv_corpus.read(tmp_path).problems[0]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,label,fold", "no column speaker in its header"),
        ("file,emotion,speaker,fold", "no column path and no column label"),
        ("path;label;speaker;fold", "separate columns by commas"),
        ("path,label,speaker,fold,label", "two columns are called label"),
    ],
)
def test_csv_header_problems(tmp_path: Path, header: str, message: str) -> None:
    """A header that does not fit is refused as a whole: no row can be understood without it."""
    (tmp_path / "corpus.csv").write_text(f"{header}\na.wav,x,s,1\n")
    with pytest.raises(InputError, match=message):
        csv_corpus.read(tmp_path / "corpus.csv")


def test_csv_row_problems(tmp_path: Path) -> None:
    """Every bad row has its line, the good ones notwithstanding."""
    file = sources.csv_corpus(tmp_path)
    with file.open("a") as stream:
        stream.write("clips/gone.wav,calm,s1,1\nclips/s1_calm.wav,loud,s1,1\nclips/s1_loud.wav,loud,s1,1,extra\n,calm,,1\n\n")
    assert [line.split(";")[0] for line in csv_corpus.read(file).problems] == [
        "corpus.csv line 8: no audio: clips/gone.wav does not exist (paths are relative to corpus.csv)",
        "corpus.csv line 9: duplicate of line 2: clips/s1_calm.wav",
        "corpus.csv line 10: 5 values, but the header has 4 columns",
        "corpus.csv line 11: no path and no speaker for this row",
    ]


def test_csv_absent(tmp_path: Path) -> None:
    """No file, or several to choose from, is an error that says what to name."""
    with pytest.raises(InputError, match="must name a CSV file"):
        csv_corpus.read(tmp_path)


NAMES = st.text(st.sampled_from("ab_. -/ü"), min_size=1, max_size=6).map(lambda name: f"{name}.wav")


@given(st.lists(NAMES, unique=True, max_size=6))
def test_identifiers_are_file_names(paths: list[str]) -> None:
    """An identifier never leaves its folder, hides, or is empty; one for each path."""
    names = csv_corpus.identifiers(paths)
    assert len(names) == len(paths)
    assert all(name and "/" not in name and not name.startswith(".") for name in names)


def test_identifiers_tell_folders_apart() -> None:
    """Recordings of one name in two folders keep both; where names differ the folder is left out: moving files changes no identity."""
    assert csv_corpus.identifiers(["s1/a.wav", "s2/a.wav"]) == ["s1__a", "s2__a"]
    assert csv_corpus.identifiers(["s1/a.wav", "s2/b.wav"]) == ["a", "b"]
    assert csv_corpus.identifiers(["spk1.utt1", "spk1.utt2"]) == ["spk1.utt1", "spk1.utt2"]


def split() -> dict[str, dict[str, object]]:
    return {
        "Train": {f"Ses0{n}F_impro01_{sex}000.wav": label for n in (1, 2, 3) for sex, label in (("F", "anger"), ("M", "joy"))},
        "Val": {"Ses04F_impro01_F000.wav": "joy"},
        "Test": {"Ses05F_impro01_F000.wav": "joy", "Ses05F_impro01_M000": "anger"},
    }


def test_labels(tmp_path: Path) -> None:
    """One held-out fold; speakers are known where the names say them; recordings lie below the JSON file, or where they are said to."""
    given_split = split()
    file = sources.labels(
        tmp_path, {part: {f"{Path(name).stem}.wav": label for name, label in given_split[part].items()} for part in given_split}
    )
    file.write_text(json.dumps(given_split))
    reading = labels.read(file)
    assert reading.problems == ()
    assert reading.folds == ("test",)
    assert Counter(u.fold for u in reading.found) == {"train": 6, "validation": 1, "test": 2}
    assert {u.speaker for u in reading.found if u.fold == "test"} == {"5F", "5M"}
    assert labels.read(tmp_path, audio=tmp_path / "Audio_16k") == reading


def test_labels_of_unknown_speakers(tmp_path: Path) -> None:
    """Names that follow no known scheme leave the speaker open, and the manifest says so."""
    reading = labels.read(sources.labels(tmp_path, {"Train": {"a.wav": "x", "b.wav": "y"}, "Test": {"c.wav": "x"}}))
    assert reading.problems == ()
    assert {u.speaker for u in reading.found} == {""}
    assert reading.facts == {"speakers": "not known"}


def test_labels_problems(tmp_path: Path) -> None:
    """A recording in two parts, twice in one, without audio, without a label, or with two files: one line each."""
    file = sources.labels(tmp_path, {"Train": {"a.wav": "x", "b.wav": "y"}, "Test": {"c.wav": "x", "e.wav": "x"}})
    sources.write_audio(tmp_path / "copy" / "e.wav")
    text = '{"Train": {"a.wav": "x", "a.wav": "x", "b.wav": 3}, "Val": {}, "Test": {"a.wav": "x", "d.wav": "x", "e.wav": "x"}}'
    file.write_text(text)
    assert [line.split(";")[0] for line in labels.read(file).problems] == [
        "label.json: Train names a.wav twice",
        "label.json: Train: b.wav: unknown label 3",
        "label.json: Test: a.wav: duplicate turn, also in Train",
        f"label.json: Test: d.wav: no audio: there is no such file below {tmp_path}",
        "label.json: Test: e.wav: 2 files of this name, Audio_16k/e.wav and copy/e.wav",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"train": {}}', '{"Train": ["a"]}', '{"Train": {"a": "x"}, "Dev": {}}'])
def test_labels_in_another_format(tmp_path: Path, text: str) -> None:
    """Anything but the authors' form is refused with the form."""
    (tmp_path / "label.json").write_text(text)
    with pytest.raises(InputError, match=r"label\.json"):
        labels.read(tmp_path / "label.json")


def found(name: str, label: str, speaker: str, fold: str) -> Recording:
    return Recording(name, Path(f"{name}.wav"), label, speaker, fold)


GOOD = [found(f"{speaker}{label}", label, speaker, fold) for speaker, fold in (("p", "1"), ("q", "2"), ("r", "3")) for label in "ab"]


def test_a_consistent_corpus_has_no_problem() -> None:
    """The checks pass what is right."""
    assert structure_problems(GOOD, ("1", "2", "3"), Path()) == []


@pytest.mark.parametrize(
    ("wrong", "folds", "line"),
    [
        (
            [*GOOD, found("pc", "a", "p", "2")],
            ("1", "2", "3"),
            "pc.wav: speaker p is in two folds: fold 2 (pc.wav), fold 1 (pa.wav and 1 more)",
        ),
        ([*GOOD, found("pa", "a", "p", "1")], ("1", "2", "3"), "pa.wav: duplicate turn pa, also in pa.wav"),
        ([*GOOD, found("pc", "c", "p", "1")], ("1", "2", "3"), "pc.wav: class 'c' is missing in the training part of fold 1"),
        (
            [*GOOD, found("zc", "c", "z", "validation"), found("pc", "c", "p", "1")],
            ("1",),
            "pc.wav: class 'c' is missing in the training part",
        ),
        (GOOD[:2], ("1",), ".: fewer than two folds (1)"),
        ([GOOD[0], GOOD[2]], ("1", "2"), ".: every utterance is labelled 'a'"),
    ],
)
def test_structure_problems(wrong: list[Recording], folds: tuple[str, ...], line: str) -> None:
    """Speakers in two folds, duplicate turns and classes without training utterances are reported with a file name."""
    lines = structure_problems(wrong, folds, Path())
    assert any(problem.startswith(line) for problem in lines), lines


def test_a_validation_part_may_share_speakers() -> None:
    """It is never trained on, so nothing leaks."""
    members = [
        found("a", "x", "p", "train"),
        found("b", "y", "p", "train"),
        found("c", "x", "p", "validation"),
        found("d", "x", "q", "test"),
    ]
    assert structure_problems(members, ("test",), Path()) == []


def test_counts() -> None:
    """A difference in the total, a class or a fold is reported with both numbers, in one line that says how to state a subset."""
    assert count_problems(GOOD, ExpectedCounts(6, {"a": 3, "b": 3}, {"1": 2, "2": 2, "3": 2}), Path("src")) == []
    (line,) = count_problems(GOOD, ExpectedCounts(7, {"a": 4, "b": 3}, {"1": 2, "2": 2, "3": 2, "4": 1}), Path("src"))
    assert line.startswith("src: does not hold what it should: utterances 6 not 7, class a 3 not 4, fold 4 0 not 1;")
    assert line.endswith("src/expected_counts.json")
