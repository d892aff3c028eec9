"""Confusion matrices: scores, files, pictures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, recall_score

from jobs.errors import UsageError
from jobs.store.scores import Confusion, confusion_of, summed
from jobs.tables.confusion import CORNER, file_name, picture, to_csv, write_confusions
from tests.jobs.table_cases import graph, result

PNG = b"\x89PNG\r\n\x1a\n"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_scores_agree_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    """UA, WA and macro-F1 from the counts are scikit-learn's, also where a class is absent from the fold."""
    counts = tuple(tuple(pairs.count((true, predicted)) for predicted in range(4)) for true in range(4))
    found = Confusion(("a", "b", "c", "d"), counts)
    true, predicted = [true for true, _ in pairs], [predicted for _, predicted in pairs]
    assert found.ua == pytest.approx(100 * recall_score(true, predicted, average="macro", labels=sorted(set(true)), zero_division=0))
    assert found.wa == pytest.approx(100 * accuracy_score(true, predicted))
    assert found.macro_f1 == pytest.approx(100 * f1_score(true, predicted, average="macro", zero_division=0))


def test_scores_are_exact() -> None:
    """Percentages come from fractions: 57 of 100 is 57.0."""
    assert Confusion(("a",), ((1,),)).ua == 100.0
    assert Confusion(("a", "b"), ((57, 43), (0, 0))).ua == 57.0


def test_sum_matches_classes_by_name() -> None:
    """Matrices with another order or set of classes are added class by class."""
    found = summed([Confusion(("a", "b"), ((1, 2), (3, 4))), Confusion(("b", "a", "c"), ((40, 30, 0), (20, 10, 5), (0, 0, 7)))])
    assert found == Confusion(("a", "b", "c"), ((11, 22, 5), (33, 44, 0), (0, 0, 7)))


@pytest.mark.parametrize(
    ("counts", "classes"),
    [
        (((1, 2), (3, 4)), ("a",)),
        (((1, 2), (3,)), ("a", "b")),
        (((1, 2), (3, -4)), ("a", "b")),
        (((1, 2), (3, 4)), ("a", "a")),
        (((0, 0), (0, 0)), ("a", "b")),
        ((), ("a", "b")),
        (((1,),), ()),
    ],
)
def test_unusable_matrices_are_named(counts: tuple[tuple[int, ...], ...], classes: tuple[str, ...]) -> None:
    """A matrix that is no matrix of counts is an error that names the result."""
    [run] = graph(methods=("vft",), folds=("1",), slots=1).runs
    with pytest.raises(UsageError, match=f"finetune/{run.key}"):
        confusion_of(result(run, counts, classes))


def test_csv_reads_back_through_pandas(tmp_path: Path) -> None:
    """The CSV has true classes as rows and predicted ones as columns, names with commas and quotes included."""
    classes = ("angry", 'sad, "very"', "neutral")
    file = tmp_path / "confusion.csv"
    file.write_text(to_csv(Confusion(classes, ((1, 2, 3), (4, 5, 6), (7, 8, 9)))), encoding="utf-8")
    frame = pd.read_csv(file, index_col=0)
    assert frame.index.name == CORNER
    assert tuple(frame.index) == tuple(frame.columns) == classes
    assert frame.to_numpy().tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_picture_takes_any_name() -> None:
    """A class called like a formula or in another script still gives a picture, and the same one every time."""
    found = Confusion(("$\\frac{", "100 % _x", "喜"), ((5, 0, 1), (0, 0, 0), (1, 1, 1)))
    image = picture(found, "$title_{")
    assert image.startswith(PNG)
    assert image == picture(found, "$title_{")


def test_files_of_an_experiment(tmp_path: Path) -> None:
    """One CSV per run that is in, one sum and one picture per method; a second call writes nothing."""
    made = graph(methods=("vft", "tapt"), folds=("1", "../x"), slots=2)
    results = {run.key: result(run, ((3 + run.slot, 1), (0, 4)), ("a", "b")) for run in made.runs if run.method == "vft"}
    paths = write_confusions(tmp_path, made, results, {"vft": "V-FT"})
    assert [path.name for path in paths] == ["vft.csv", "vft.png"]
    assert paths[1].read_bytes().startswith(PNG)
    assert paths[0].read_text(encoding="utf-8").splitlines() == [f"{CORNER},a,b", "a,14,4", "b,0,16"]
    written = {path.relative_to(tmp_path).as_posix(): path.stat().st_ino for path in tmp_path.rglob("*.*") if path.is_file()}
    assert sorted(written) == [
        "vft.csv",
        "vft.png",
        "vft/fold_%2E.%2Fx_slot_0_seed_100.csv",
        "vft/fold_%2E.%2Fx_slot_1_seed_101.csv",
        "vft/fold_1_slot_0_seed_100.csv",
        "vft/fold_1_slot_1_seed_101.csv",
    ]
    write_confusions(tmp_path, made, results, {"vft": "V-FT"})
    assert {path.relative_to(tmp_path).as_posix(): path.stat().st_ino for path in tmp_path.rglob("*.*") if path.is_file()} == written


NAMES = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=60)
@given(NAMES, NAMES)
def test_names_stay_inside_their_folder(one: str, other: str) -> None:
    """No name from a configuration leaves the folder or hides, and two names never share a file."""
    assert "/" not in file_name(one)
    assert "\0" not in file_name(one)
    assert not file_name(one).startswith(".")
    assert (file_name(one) == file_name(other)) == (one == other)
