"""Manifests: identity, splits, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_core.corpora.manifest import VALIDATION, Manifest, Utterance, content_digest, load_manifest, natural_order, write_manifest
from ser_core.errors import InputError

ROOT = Path(__file__).resolve().parents[3]


def utterance(number: int, fold: str, label: str = "a") -> Utterance:
    return Utterance(
        f"u{number:03d}", f"audio/u{number:03d}.flac", 16_000 + number, label, f"s{fold}", fold, (1.0, 2.5, 3.0), f"{number:064x}"
    )


TEN = tuple(utterance(number, str(number % 5 + 1), "ab"[number % 2]) for number in range(10))
FOLDS = ("1", "2", "3", "4", "5")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.sampled_from(["1", "2", "3", "4"]))
def test_training_and_test_split_the_corpus(folds: list[int], held: str) -> None:
    """Every utterance is trained on or tested, never both, and the test part is exactly the held-out fold."""
    members = tuple(utterance(number, str(fold)) for number, fold in enumerate(folds))
    manifest = Manifest("c", "", ("a",), ("1", "2", "3", "4"), members, Path("nowhere"))
    training, test = manifest.training(held), manifest.test(held)
    assert {u.fold for u in test} <= {held}
    assert sorted([*training, *test], key=lambda u: u.id) == list(members)
    assert not {u.speaker for u in training} & {u.speaker for u in test}


def test_validation_is_never_trained_on() -> None:
    """The validation part of a fixed split is in neither half, but a fold that happens to be called so is an ordinary fold."""
    members = tuple(utterance(number, fold) for number, fold in enumerate(["train", VALIDATION, "test"]))
    fixed = Manifest("c", "", ("a",), ("test",), members, Path("nowhere"))
    assert [u.fold for u in fixed.training("test")] == ["train"]
    folds = Manifest("c", "", ("a",), ("test", "train", VALIDATION), members, Path("nowhere"))
    assert [u.fold for u in folds.training("test")] == ["train", VALIDATION]


def test_unknown_fold_is_named() -> None:
    """Asking for a fold that is not there says which there are."""
    manifest = Manifest("c", "", ("a",), FOLDS, TEN, Path("nowhere"))
    with pytest.raises(InputError, match="no fold '6'; it has 1, 2, 3, 4, 5"):
        manifest.training("6")


@given(st.permutations(TEN))
def test_digest_ignores_order(members: list[Utterance]) -> None:
    """The digest is of the content, not of the order it was found in."""
    assert content_digest(("b", "a"), reversed(FOLDS), members) == content_digest(("a", "b"), FOLDS, TEN)


@pytest.mark.parametrize(
    "changed",
    [
        replace(TEN[3], id="other"),
        replace(TEN[3], label="b" if TEN[3].label == "a" else "a"),
        replace(TEN[3], speaker="other"),
        replace(TEN[3], fold="1"),
        replace(TEN[3], dimensions=None),
        replace(TEN[3], audio_digest="0" * 64),
    ],
)
def test_digest_depends_on_every_field(changed: Utterance) -> None:
    """Whatever can change a result changes the digest; the file's name and place do not."""
    before = content_digest(("a", "b"), FOLDS, TEN)
    assert content_digest(("a", "b"), FOLDS, [*TEN[:3], changed, *TEN[4:]]) != before
    assert content_digest(("a", "b"), FOLDS, [*TEN[:3], replace(TEN[3], audio="elsewhere.wav"), *TEN[4:]]) == before


def test_round_trip(tmp_path: Path) -> None:
    """What is written is what is read, ordered by id, wherever the folder lies by then."""
    written = write_manifest(tmp_path, "c", FOLDS, reversed(TEN), {"kind": "csv"})
    assert load_manifest(tmp_path) == written
    assert written.utterances == TEN
    assert [written.class_index(u) for u in written.utterances[:2]] == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(tmp_path / "manifest.json", moved)
    assert load_manifest(moved).digest == written.digest
    assert load_manifest(moved).audio_path(TEN[0]) == moved / "audio" / "u000.flac"


def test_missing_manifest_says_what_to_run(tmp_path: Path) -> None:
    """No corpus: one line that names the folder and the command."""
    with pytest.raises(InputError, match=r"manifest\.json: no prepared corpus here; run `python launch\.py prepare`"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "sample_rate": 16000, "utterances": [{}]}'])
def test_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    """An incomplete file, another file or a newer schema is an InputError with the file's name."""
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json"):
        load_manifest(tmp_path)


def test_an_edited_manifest_is_detected(tmp_path: Path) -> None:
    """A label changed by hand no longer fits the digest: results computed from it would be filed under the old identity."""
    write_manifest(tmp_path, "c", FOLDS, TEN)
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    record["utterances"][0]["label"] = "b"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="does not fit its digest"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("removed", [1, len(TEN)])
def test_missing_audio_digests_do_not_turn_the_check_off(removed: int, tmp_path: Path) -> None:
    """A manifest from which digests were removed does not fit its own; one that was written without them does."""
    write_manifest(tmp_path, "c", FOLDS, TEN)
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    for entry in record["utterances"][:removed]:
        del entry["audio_digest"]
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="does not fit its digest"):
        load_manifest(tmp_path)
    kept = write_manifest(tmp_path, "c", FOLDS, [replace(each, audio_digest="") for each in TEN[:removed]] + list(TEN[removed:]))
    assert load_manifest(tmp_path) == kept
    record = json.loads(path.read_text())
    record["utterances"][-1]["label"] = "a"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="does not fit its digest"):
        load_manifest(tmp_path)


def test_reading_a_manifest_imports_nothing_heavy() -> None:
    """The command line reads digests at every start: no numpy, no soundfile, no torch for that."""
    code = "import sys, ser_core.corpora.manifest; print([n for n in ('numpy', 'torch', 'soundfile') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_natural_order() -> None:
    """Numbers in names count as numbers."""
    assert sorted(["10", "2", "fold10", "fold9", "1", ""], key=natural_order) == ["", "1", "2", "10", "fold9", "fold10"]
