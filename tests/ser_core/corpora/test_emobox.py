"""Corpora of EmoBox by their lists: published folds, labels' names, speakers, channels and excerpts; and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ser_core.corpora import emobox
from ser_core.corpora.audio import convert, load_audio
from ser_core.corpora.captions import caption_sentences
from ser_core.corpora.checks import structure_problems
from ser_core.corpora.emobox_corpora import BY_NAME, CORPORA, SHARED
from ser_core.corpora.emobox_lists import read_speakers
from ser_core.corpora.known import known_corpora, table_lines
from ser_core.corpora.lines import default_name, how_to_prepare
from ser_core.corpora.manifest import VALIDATION, load_manifest
from ser_core.corpora.prepare import prepare
from ser_core.errors import InputError
from tests.ser_core.corpora.emobox_source import Item, change_jsonl, flat, recorded, tiny, write_lists


def test_a_corpus_with_all_that_is_difficult(tmp_path: Path) -> None:
    """Folds of the test lists, merged labels, a label in another case, speakers; a list of nearly the same name is not read, and named."""
    file, audio = tiny(tmp_path)
    reading = emobox.read(file, audio=audio)
    assert reading.problems == ()
    assert reading.folds == ("1", "2", "3")
    assert {(u.speaker, u.fold) for u in reading.found} == {("one", "1"), ("two", "2"), ("three", "3")}
    assert Counter(u.label for u in reading.found) == {"angry": 3, "neutral": 3, "happy": 3}
    assert [u.path.relative_to(audio).as_posix() for u in reading.found][:2] == ["speaker one/anger/001.wav", "speaker one/neutral/001.wav"]
    assert reading.notes == (
        "label neutral is read as Neutral: the map of labels has it in another case",
        "not read, as no list of a fold is called so: tiny_test_fold1.jsonl",
    )


def test_its_samples_are_those_of_the_channel_and_of_the_excerpt(tmp_path: Path) -> None:
    """The third channel alone, resampled; excerpts of one file bit for bit. Again: nothing is converted; another excerpt: only that one."""
    file, audio = tiny(tmp_path)
    manifest = prepare("emobox", file, tmp_path / "tiny", audio=audio)
    assert manifest == load_manifest(tmp_path / "tiny")
    assert manifest.corpus == "tiny"
    assert manifest.source["benchmark_corpus"] == "tiny"
    assert "shared_speakers" not in manifest.source
    assert caption_sentences(manifest) == ()
    samples = {u.id: load_audio(manifest, u) for u in manifest.utterances}
    whole, _ = soundfile.read(audio / "three.flac", dtype="float32")
    np.testing.assert_array_equal(samples["tiny-three-neutral"], whole[4_000:8_000])
    np.testing.assert_array_equal(samples["tiny-three-happy"], whole[12_000:])
    three, rate = soundfile.read(audio / "two/anger/001.wav")
    soundfile.write(tmp_path / "third.wav", three[:, 2], rate, subtype="PCM_16")
    np.testing.assert_array_equal(samples["tiny-two-anger"], convert(tmp_path / "third.wav").samples / np.float32(32768))
    calls: list[int] = []
    prepare("emobox", file, tmp_path / "tiny", audio=audio, progress=lambda done, _: calls.append(done))
    assert calls == [9]
    change_jsonl(file, lambda records: records[8].update(start_time=0.5))
    calls.clear()
    again = prepare("emobox", file, tmp_path / "tiny", audio=audio, progress=lambda done, _: calls.append(done))
    assert calls == [8, 9]
    assert {u.id for u, v in zip(manifest.utterances, again.utterances, strict=True) if u != v} == {"tiny-three-happy"}


def remove_audio(name: str) -> Callable[[Path, Path], None]:
    return lambda file, audio: (audio / name).unlink()


def change_list(name: str, change: Callable[[list[dict[str, object]]], object]) -> Callable[[Path, Path], None]:
    return lambda file, audio: change_jsonl(file.parent / name, change)


def convert_to_two_channels(file: Path, audio: Path) -> None:
    soundfile.write(audio / "two/happy/001.wav", np.zeros((4_000, 2)), 16_000)


def as_video(file: Path, audio: Path) -> None:
    (audio / "two/happy/001.wav").rename(audio / "two/happy/001.mp4")
    change_jsonl(file, lambda records: records[5].update(wav="downloads/tiny/two/happy/001.mp4"))


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (remove_audio("two/happy/001.wav"), ["tiny.jsonl: tiny-two-happy: no audio: two/happy/001.wav is not below"]),
        (
            change_list("fold_2/tiny_train_fold_2.jsonl", lambda records: records.pop()),
            ["tiny_train_fold_2.jsonl: lacks recordings that are neither for test nor for validation: 1, the first is tiny-three-happy"],
        ),
        (
            change_list("fold_2/tiny_train_fold_2.jsonl", lambda records: records.append({"key": "tiny-two-happy"})),
            ["tiny_train_fold_2.jsonl: names recordings that are for test or validation: 1, the first is tiny-two-happy"],
        ),
        (
            change_list("fold_3/tiny_test_fold_3.jsonl", lambda records: records.append({"key": "03a01Wa"})),
            ["tiny_test_fold_3.jsonl: names recordings that tiny.jsonl lacks: 1, the first is 03a01Wa"],
        ),
        (
            change_list("tiny.jsonl", lambda records: records[4].update(emo="bored")),
            ["tiny.jsonl: tiny-two-neutral: label 'bored' is not in the map of labels, which has anger Neutral happy excited"],
        ),
        (as_video, ["tiny: recordings of the type .mp4, which cannot be read: 1; convert them beside the originals: find "]),
        (convert_to_two_channels, ["two/happy/001.wav: no channel 3: it has 2; convert the original with all its channels"]),
        (
            change_list("tiny.jsonl", lambda records: records[8].update(end_time=1.5)),
            ["three.flac: no samples from 0.75 to 1.5 s: it is 1 s long"],
        ),
    ],
)
def test_problems_name_the_list_and_the_recording(tmp_path: Path, change: Callable[[Path, Path], None], lines: list[str]) -> None:
    """One line each, and nothing is written."""
    file, audio = tiny(tmp_path)
    change(file, audio)
    with pytest.raises(InputError) as caught:
        prepare("emobox", file, tmp_path / "out", audio=audio)
    found = [line.removeprefix(f"{audio}/") for line in caught.value.problems]
    assert [line[: len(expected)] for line, expected in zip(found, lines, strict=True)] == lines
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"key": "a"}\n', r"tiny\.jsonl line 1: no recording of EmoBox \(KeyError\('wav'\)\)"),
        ("[]\n", r"line 1: not a JSON object"),
        ('{"key"\n', r"line 1: not JSON"),
        ('{"key": "a", "wav": "w", "emo": "e", "channel": 0}\n', "channel 0 of a; channels are numbered from 1"),
        ('{"key": "a", "wav": "w", "emo": "e"}\n' * 2, "line 2: duplicate of line 1: a"),
    ],
)
def test_a_list_of_another_format(tmp_path: Path, text: str, message: str) -> None:
    """The line is named."""
    file, audio = tiny(tmp_path)
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        emobox.read(file, audio=audio)


def test_what_must_be_given(tmp_path: Path) -> None:
    """A list and a folder of recordings; a list without folds beside it is none of EmoBox."""
    file, audio = tiny(tmp_path)
    with pytest.raises(InputError, match="--audio: no such folder"):
        emobox.read(file, audio=None)
    with pytest.raises(InputError, match="--meta must name the list of a corpus"):
        emobox.read(file.parent, audio=audio)
    (tmp_path / "alone").mkdir()
    alone = file.rename(tmp_path / "alone" / file.name)
    assert emobox.read(alone, audio=audio).problems[0].startswith(f"{alone.parent}: no fold_K/tiny_test_fold_K.jsonl")


def test_a_folder_with_none_of_the_recordings_is_one_line(tmp_path: Path) -> None:
    """As when `--audio` names EmoBox's folder of all corpora, or a speaker's; the folder that has them is named."""
    file, audio = tiny(tmp_path)
    (tmp_path / "downloads").mkdir()
    own = audio.rename(tmp_path / "downloads" / "tiny")
    what = "none of the recordings of tiny.jsonl; --audio must name the folder that its lists call downloads/tiny"
    for wrong in (own.parent, own / "two"):
        assert emobox.read(file, audio=wrong).problems == (f"{wrong}: {what}: did you mean {own}?",)
    (tmp_path / "empty").mkdir()
    assert emobox.read(file, audio=tmp_path / "empty").problems == (f"{tmp_path / 'empty'}: {what}",)
    assert emobox.read(file, audio=own).problems == ()


FOLDS = {"a": "1", "b": "2"}


def test_recordings_are_found_by_a_name_only_where_all_names_differ(tmp_path: Path) -> None:
    """Moved recordings are found by their names, not where two of the list have the same, as in CASIA; converted ones by another ending."""
    items = [
        Item(f"c-{s}-{n}", s, FOLDS[s], f"{s}/{n}.avi", "anger" if n % 2 else "happy")
        for s in "ab"
        for n in ((1, 2) if s == "a" else (3, 4))
    ]
    file, audio = flat(tmp_path / "unique", "c", items)
    for path in list(audio.rglob("*.avi")):
        path.rename(audio / f"{path.stem}.wav" if path.stem == "1" else path.with_suffix(".wav"))
    reading = emobox.read(file, audio=audio)
    assert reading.problems == ()
    assert [u.path.relative_to(audio).as_posix() for u in reading.found] == ["1.wav", "a/2.wav", "b/3.wav", "b/4.wav"]
    repeated = [Item(f"c-{s}-{n}", s, FOLDS[s], f"{s}/{n}.wav", "anger" if n == 1 else "happy") for s in "ab" for n in (1, 2)]
    file, audio = flat(tmp_path / "repeated", "c", repeated)
    (audio / "a" / "1.wav").unlink()
    (audio / "b" / "2.wav").unlink()
    assert [line.split(" is not")[0] for line in emobox.read(file, audio=audio).problems] == [
        "c.jsonl: c-a-1: no audio: a/1.wav",
        "c.jsonl: c-b-2: no audio: b/2.wav",
    ]


@pytest.mark.parametrize(
    ("listed", "unpacked"),
    [
        ("CaFE_48k/Col\u0160re", "CaFE_48k/Col\u00e8re"),  # CaFE's list: byte 8A of its archive, read in another code page
        ("CaFE_48k/Col\u0160re", "CaFE_48k/Col\udc8are"),  # unpacked without a code page
        ("Ore\u0301auFR_02/f", "Or\u00e9auFR_02/f"),  # Oreau's list: letter and accent apart
    ],
)
def test_folders_whose_names_are_written_otherwise(tmp_path: Path, listed: str, unpacked: str) -> None:
    """Letters that are not in ASCII depend on the program that unpacked the archive: recordings are found by their own names."""
    items = [Item(f"o-{s}-{emo}", s, fold, f"{listed}/{s}{emo}.wav", emo) for s, fold in FOLDS.items() for emo in ("anger", "happy")]
    file, audio = flat(tmp_path, "o", items)
    (audio / listed).rename(audio / listed.partition("/")[0] / "other")
    (audio / listed.partition("/")[0]).rename(audio / unpacked.partition("/")[0])
    (audio / unpacked.partition("/")[0] / "other").rename(audio / unpacked)
    manifest = prepare("emobox", file, tmp_path / "out", audio=audio)
    assert len(manifest.utterances) == 4


def shared_items(corpus: str = "emodb") -> list[Item]:
    return [
        Item(f"{corpus}-{s}{f}{e}", f"male_{s}", str(f), f"{s}{f}{e}.wav", e)
        for s in ("03", "10")
        for f in (1, 2)
        for e in ("anger", "happy")
    ]


def test_shared_speakers_are_accepted_only_if_that_is_asked_for(tmp_path: Path) -> None:
    """One line without the option; with it the manifest has the numbers, and captions state them."""
    file, audio = flat(tmp_path, "emodb", shared_items())
    with pytest.raises(
        InputError, match=r"share speakers between training and test part \(up to 2 in a fold\).*--shared-speakers"
    ) as caught:
        prepare("emobox", file, tmp_path / "out", audio=audio, check_counts=False)
    assert len(caught.value.problems) == 1
    manifest = prepare("emobox", file, tmp_path / "out", audio=audio, check_counts=False, shared_speakers=True)
    assert manifest.source["shared_speakers"] == {"1": 2, "2": 2}
    assert load_manifest(tmp_path / "out").source["shared_speakers"] == {"1": 2, "2": 2}
    assert caption_sentences(manifest) == (
        "The folds of out share speakers (in the training and the test part of a fold: 2 of 2), "
        "so the figures are not those for unknown speakers.",
    )


def test_the_published_number_of_recordings_is_checked(tmp_path: Path) -> None:
    """A list of EmoBox that was cut is noticed."""
    file, audio = flat(tmp_path, "emodb", shared_items())
    with pytest.raises(InputError, match="utterances 8 not 535"):
        prepare("emobox", file, tmp_path / "out", audio=audio, shared_speakers=True)


def test_one_fold_gives_parts(tmp_path: Path) -> None:
    """Training, validation and test part; the validation part is never trained on, and may share speakers."""
    split = [("s1", "train"), ("s2", "train"), ("s1", "valid"), ("s3", "test")]
    items = [Item(f"m-{s}-{p}-{e}", s, p, f"{s}{p}{e}.wav", e) for s, p in split for e in ("anger", "happy")]
    file, audio = flat(tmp_path, "m", items)
    manifest = prepare("emobox", file, tmp_path / "m", audio=audio)
    assert manifest.folds == ("test",)
    assert Counter(u.fold for u in manifest.utterances) == {"train": 4, VALIDATION: 2, "test": 2}
    assert {u.speaker for u in manifest.training("test")} == {"s1", "s2"}


def test_speakers_of_odd_lists(tmp_path: Path) -> None:
    """IEMOCAP's turn has the speaker, not the dialogue; a path before a name, a key with spaces; a recording's own name is no speaker."""
    turns = [f"Ses0{session}F_impro0{dialog}_{sex}000" for session in (1, 2) for dialog in (1, 2) for sex in "FM"]
    items = [Item(f"iemocap-{t}", t[:6], t[4], f"{t}.wav", "anger" if "impro01" in t else "happy") for t in turns]
    file, audio = flat(tmp_path, "iemocap", items)
    reading = emobox.read(file, audio=audio)
    assert {u.speaker for u in reading.found} == {"1F", "1M", "2F", "2M"}
    assert structure_problems(reading.found, reading.folds, tmp_path) == []
    odd = [
        Item("jl-male2-1", "downloads/jl/Raw JL corpus (unchecked)/JL(wav+txt)/male2", "1", "a.wav", "anger"),
        Item("resd-32 happy h.wav", "32 happy h.wav", "1", "b.wav", "anger"),
        Item("as-with space", "131", "2", "c.wav", "anger"),
        Item("ravdess-03-01-18", "18", "2", "d.wav", "anger"),
    ]
    found = read_speakers(write_lists(tmp_path / "odd", "odd", odd).parent)
    assert found == {"jl-male2-1": "male2", "as-with space": "131", "ravdess-03-01-18": "18"}


def test_unknown_speakers_and_dropped_labels_are_noted(tmp_path: Path) -> None:
    """ASVP-ESD's label 17 is left out, and said; without speakers the caption says that training and test part may share some."""
    items = [Item(f"asvpesd-{f}{e}", f"{f}{e}", f, f"{f}{e}.wav", e) for f in ("train", "test") for e in ("03", "04", "17")]
    file, audio = flat(tmp_path, "asvpesd", items, labels={"03": "Happy", "04": "Sad", "17": "UnKnown"})
    manifest = prepare("emobox", file, tmp_path / "asvpesd", audio=audio, check_counts=False)
    assert manifest.classes == ("happy", "sad")
    assert manifest.source["notes"] == ["recordings with the label 17, left out: 2", "recordings whose speaker is not known: 4 of 4"]
    assert caption_sentences(manifest) == (
        "Recordings of asvpesd whose speaker is not known: 4 of 4; training and test part may share some.",
    )


def esd_items() -> list[Item]:
    """A speaker a fold; folders of speaker and emotion, speakers that are numbers."""
    speakers = {"0001": "1", "0011": "2"}
    return [
        Item(f"esd-{speaker}-{number:06d}", speaker, fold, f"{speaker}/{emo}/{speaker}_{number:06d}.wav", emo)
        for speaker, fold in speakers.items()
        for number, emo in ((1, "Neutral"), (351, "Angry"))
    ]


def m3ed_items() -> list[Item]:
    """Files have a prefix that keys lack; speakers have names of their series, not in ASCII; a validation part."""
    parts = {"train": "shaonianpai", "valid": "zhihu", "test": "rucike"}
    return [
        Item(f"m3ed-{series}_1_{number}", f"{series}_林大为", part, f"modality_speech/A_{series}_1_{number}.wav", emo)
        for part, series in parts.items()
        for number, emo in ((1, "Anger"), (2, "Neutral"))
    ]


def mead_items() -> list[Item]:
    """The same file names for all speakers; all speakers in both parts."""
    return [
        Item(f"mead-{speaker}-{emo}-level-1-{number:03d}", speaker, part, f"{speaker}/audio/{emo}/level_1/{number:03d}.m4a", emo)
        for speaker in ("M003", "W019")
        for emo in ("angry", "surprised")
        for part, number in (("train", 1), ("test", 20))
    ]


def msppodcast_items() -> list[Item]:
    """Official parts; in each a label that is left out."""
    return [
        Item(f"msppodcast-MSP-PODCAST_{part}_{emo}", f"{part}1", part, f"Audio/MSP-PODCAST_{part}_{emo}.wav", emo)
        for part in ("train", "valid", "test")
        for emo in ("A", "N", "O", "X")
    ]


LARGE = {  # items, map of labels, folds, classes, speakers
    "esd": (esd_items(), {"Neutral": "Neutral", "Angry": "Angry"}, {"1": 2, "2": 2}, {"neutral", "angry"}, {"0001", "0011"}),
    "m3ed": (
        m3ed_items(),
        {"Neutral": "Neutral", "Anger": "Angry"},
        {"train": 2, VALIDATION: 2, "test": 2},
        {"neutral", "angry"},
        {"shaonianpai_林大为", "zhihu_林大为", "rucike_林大为"},
    ),
    "mead": (mead_items(), {"angry": "Angry", "surprised": "Surprise"}, {"train": 4, "test": 4}, {"angry", "surprise"}, {"M003", "W019"}),
    "msppodcast": (
        msppodcast_items(),
        {"A": "Angry", "N": "Neutral", "O": "Other", "X": "No-agreement"},
        {"train": 2, VALIDATION: 2, "test": 2},
        {"angry", "neutral"},
        {"train1", "valid1", "test1"},
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_largest_corpora_in_their_layouts(name: str, tmp_path: Path) -> None:
    """Paths, parts, labels, left out ones among them, and speakers as in EmoBox's lists of these corpora."""
    items, labels, folds, classes, speakers = LARGE[name]
    file, audio = flat(tmp_path, name, items, labels=labels)
    if name == "mead":
        originals = sorted(audio.rglob("*.m4a"))
        unread = emobox.read(file, audio=audio)
        assert [line.partition(";")[0] for line in unread.problems] == ["mead: recordings of the type .m4a, which cannot be read: 8"]
        for path in originals:  # as the command of that line leaves them
            path.with_suffix(".flac").write_bytes(path.read_bytes())
    reading = emobox.read(file, audio=audio)
    assert reading.problems == ()
    assert Counter(each.fold for each in reading.found) == folds
    assert {each.label for each in reading.found} == classes
    assert {each.speaker for each in reading.found} == speakers
    assert len({each.path for each in reading.found}) == sum(folds.values())
    assert all(each.path.suffix in (".wav", ".flac") for each in reading.found)
    dropped = sum(item.emo in BY_NAME[name].dropped for item in items)
    assert sum(folds.values()) + dropped == len(items)
    assert len([note for note in reading.notes if "left out" in note]) == (2 if dropped else 0)
    shared = BY_NAME[name].speakers == SHARED
    found = structure_problems(reading.found, reading.folds, tmp_path, published_folds=True)
    assert [line.partition(",")[0].partition(": ")[2] for line in found] == (
        ["folds that share speakers between training and test part (up to 2 in a fold)"] if shared else []
    )


def test_without_a_map_of_labels_classes_have_the_codes(tmp_path: Path) -> None:
    """`label_dict.json` is as good as `label_map.json`; without both the codes stay, and that is noted."""
    file, audio = tiny(tmp_path)
    (file.parent / "label_map.json").rename(file.parent / "label_dict.json")
    assert {u.label for u in emobox.read(file, audio=audio).found} == {"angry", "neutral", "happy"}
    (file.parent / "label_dict.json").unlink()
    reading = emobox.read(file, audio=audio)
    assert {u.label for u in reading.found} == {"anger", "neutral", "happy", "excited"}
    assert reading.notes[0].startswith("no label_map.json or label_dict.json")


def test_the_list_of_known_corpora() -> None:
    """32 corpora of EmoBox; those that share speakers are listed with the option; every line has a page but the user's own."""
    assert len(CORPORA) == len(BY_NAME) == 32
    assert sum(corpus.speakers == SHARED for corpus in CORPORA) == 18
    lines = table_lines(known_corpora())
    assert lines[0].split("  ")[0] == "Corpus"
    emodb = next(line for line in lines if line.startswith("EmoDB (EmoBox)"))
    assert "emobox --meta data/emodb/emodb.jsonl --audio DIR --shared-speakers" in emodb
    assert "German" in emodb
    assert "  5, shared speakers" in emodb
    assert sum("https://" in line or "http://" in line for line in lines) == len(lines) - 5


def test_names_of_prepared_corpora() -> None:
    """One of EmoBox does not replace the corpus that another reader prepares; the hint of a missing one names its list."""
    assert default_name("emobox", Path("data/emodb/emodb.jsonl")) == "emobox-emodb"
    assert [default_name(kind, Path("my list.csv")) for kind in ("emodb", "csv", "unlabelled")] == ["emodb", "my list", "my list"]
    assert default_name("unlabelled", Path()) == Path.cwd().stem
    assert "prepare emobox --meta data/emodb/emodb.jsonl --audio FOLDER`" in how_to_prepare("emobox-emodb")
    assert "prepare ravdess --source FOLDER`" in how_to_prepare("ravdess")
    assert "prepare csv --source FOLDER --name mine`" in how_to_prepare("mine")


def test_recorded_speech_in_the_layout(tmp_path: Path, emodb_source: Path) -> None:
    """EmoDB's recordings in EmoBox's layout, with folds of our own: each is the recording of its source, sample by sample."""
    file, audio = recorded(tmp_path, emodb_source, {"1": ["03"], "2": ["11"], "3": ["13"]})
    manifest = prepare("emobox", file, tmp_path / "mine", audio=audio)
    assert manifest.folds == ("1", "2", "3")
    assert manifest.classes == ("anger", "boredem", "disgust", "fear", "happy", "neutral", "sad")
    assert json.dumps(manifest.source["notes"]).count("in another case") == 7
    for utterance in manifest.utterances[::4]:
        original, _ = soundfile.read(emodb_source / "audio" / f"{utterance.id.removeprefix('mine-')}.flac", dtype="float32")
        np.testing.assert_array_equal(load_audio(manifest, utterance), original)
