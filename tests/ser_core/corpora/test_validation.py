"""Choice of validation speakers: the corpus' own part, the next fold, or half of the speakers; and what is an error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_core.corpora.manifest import VALIDATION, Manifest, Utterance
from ser_core.corpora.validation import FIXED_PART, is_fixed_part, training_and_validation, validation_speakers
from ser_core.errors import InputError

Row = tuple[str, str, str]  # fold, speaker, label


def corpus(rows: Iterable[Row], folds: Sequence[str]) -> Manifest:
    utterances = tuple(
        Utterance(f"u{number:03d}", f"u{number:03d}.flac", 16_000, label, speaker, fold)
        for number, (fold, speaker, label) in enumerate(rows)
    )
    return Manifest("c", "", tuple(sorted({u.label for u in utterances})), tuple(folds), utterances, Path("nowhere"))


def both(fold: str, *speakers: str) -> list[Row]:
    """Each speaker says both classes."""
    return [(fold, speaker, label) for speaker in speakers for label in "ab"]


def sessions(count: int) -> Manifest:
    """As IEMOCAP: a woman and a man in each session."""
    folds = [str(number + 1) for number in range(count)]
    return corpus([row for fold in folds for row in both(fold, f"F{fold}", f"M{fold}")], folds)


def test_the_next_fold_validates() -> None:
    """In the corpus' order, the first after the last: every fold validates once."""
    manifest = sessions(5)
    assert {fold: validation_speakers(manifest, fold) for fold in manifest.folds} == {
        "1": ("F2", "M2"),
        "2": ("F3", "M3"),
        "3": ("F4", "M4"),
        "4": ("F5", "M5"),
        "5": ("F1", "M1"),
    }


def test_of_two_folds_half_of_the_speakers_validate() -> None:
    """The first in natural order, rounded down; one of two."""
    many = corpus([*both("1", "s"), *both("2", "s10", "s9", "s8", "s2", "s1")], ["1", "2"])
    assert validation_speakers(many, "1") == ("s1", "s2")
    assert validation_speakers(sessions(2), "1") == ("F2",)


def test_a_fixed_split_without_a_validation_part_is_as_two_folds() -> None:
    manifest = corpus([*both("train", "a", "b", "c", "d"), *both("test", "e")], ["test"])
    assert validation_speakers(manifest, "test") == ("a", "b")


def test_the_validation_part_of_a_fixed_split_validates() -> None:
    """It is not trained on anyway, so training is all of the grid's; a held-out fold that happens to be called so is an ordinary fold."""
    rows = [*both("train", "a"), *both(VALIDATION, "b"), *both("test", "c")]
    fixed = corpus(rows, ["test"])
    assert validation_speakers(fixed, "test") == FIXED_PART
    training, held = training_and_validation(fixed, "test", list(FIXED_PART))
    assert training == fixed.training("test")
    assert {utterance.speaker for utterance in held} == {"b"}
    assert is_fixed_part(list(FIXED_PART))
    assert not is_fixed_part(("b",))
    assert validation_speakers(corpus(rows, ["test", "train", VALIDATION]), "test") == ("a",)


def test_a_speaker_who_is_also_elsewhere_in_training_leaves_it_whole() -> None:
    """No utterance of a validation speaker is trained on, whatever its fold."""
    manifest = corpus([*both("1", "a"), *both("2", "b"), *both("3", "b", "c")], ["1", "2", "3"])
    assert validation_speakers(manifest, "1") == ("b",)
    training, held = training_and_validation(manifest, "1", ("b",))
    assert ({u.speaker for u in training}, {u.speaker for u in held}) == ({"c"}, {"b"})
    assert {u.fold for u in held} == {"2", "3"}


@pytest.mark.parametrize(
    ("rows", "folds", "line"),
    [
        ([*both("1", "a"), *both("2", "b")], "12", "no validation speakers are left"),
        ([*both("1", "a"), *both("2", ""), *both("3", "c")], "123", "the speaker of u002 is not known"),
        ([*both("1", ""), *both("2", "b"), *both("3", "c")], "123", "the speaker of u000 is not known"),
        ([*both("1", "a"), *both("2", "a"), *both("3", "c")], "123", "validation speaker a is tested too"),
        ([*both("1", "a"), *both("2", "b"), ("3", "c", "a")], "123", r"without the validation speakers \(b\) no training utterance is 'b'"),
        ([*both("1", "a"), *both("2", "b"), *both(VALIDATION, "a")], "1", "validation speaker a is tested too"),
        ([*both("1", "a"), *both("2", "b"), *both(VALIDATION, "b")], "1", "validation speaker b is trained on too"),
        ([*both("1", "a"), *both("2", "b"), *both(VALIDATION, "")], "1", "the speaker of u004 is not known"),
    ],
)
def test_impossible_validation_is_one_line(rows: list[Row], folds: str, line: str) -> None:
    """It names corpus and fold."""
    with pytest.raises(InputError, match=f"^c, fold '1': {line}[^\n]*$"):
        validation_speakers(corpus(rows, tuple(folds)), "1")


@pytest.mark.parametrize(
    ("validation", "line"),
    [
        (("nobody",), "no utterances to validate on when fold '1' is held out and validation is 'nobody'"),
        ((), "no utterances to validate on .* validation is empty"),
        (FIXED_PART, "no utterances to validate on"),
        (("F1",), "no utterances to validate on"),  # of the held-out fold
        (("F2", "M2"), "no utterances to train on"),
    ],
)
def test_a_division_with_nothing_on_one_side_is_refused(validation: tuple[str, ...], line: str) -> None:
    with pytest.raises(InputError, match=line):
        training_and_validation(sessions(2), "1", validation)


@given(
    st.lists(st.tuples(st.sampled_from([*"1234", VALIDATION]), st.sampled_from("stuvw"), st.sampled_from("ab")), min_size=1, max_size=30),
    st.sampled_from("1234"),
)
def test_no_speaker_is_on_two_sides(rows: list[Row], fold: str) -> None:
    """Whatever the corpus: what is accepted trains on every class, and no speaker of validation is trained on or tested."""
    manifest = corpus(rows, "1234")
    try:
        chosen = validation_speakers(manifest, fold)
    except InputError:
        return
    training, held = training_and_validation(manifest, fold, chosen)
    test = manifest.test(fold)
    assert not {*training, *held} & set(test)
    assert not {u.speaker for u in held} & {u.speaker for u in (*training, *test)}
    assert {u.label for u in training} == {u.label for u in manifest.training(fold)}
    assert is_fixed_part(chosen) or {u.speaker for u in held} == set(chosen)
