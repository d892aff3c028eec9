"""Scripts of IEMOCAP's turns, and parts without a script on both sides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ser_core.corpora.manifest import Utterance
from ser_core.corpora.scripts import kind_of, script_of, scripts_apart
from ser_core.errors import InputError
from tests.ser_core.text_cases import SCRIPTS, by_mood, corpus_of_texts


@pytest.mark.parametrize(
    ("name", "script", "kind"),
    [
        ("Ses01F_impro01_F000", "impro01", "improvised"),
        ("Ses04M_impro05a_M003", "impro05", "improvised"),
        ("Ses01F_script01_1_F002", "script01_1", "scripted"),
        ("Ses05M_script03_2b_M041", "script03_2", "scripted"),
        ("03a01Fa", None, None),
    ],
)
def test_names_of_turns(name: str, script: str | None, kind: str | None) -> None:
    """A take or a variant of a script, `b` in script01_1b, is the same script."""
    utterance = Utterance(name, "", 1, "", "", "")
    assert (script_of(utterance), kind_of(utterance)) == (script, kind)


def test_no_script_is_on_both_sides(tmp_path: Path) -> None:
    """Over the folds every script is tested once, with nothing of its own in training; folds and digest are the corpus'."""
    corpus = corpus_of_texts(tmp_path, by_mood)
    tested: list[str] = []
    for fold in corpus.folds:
        apart = scripts_apart(corpus, fold)
        of_training, of_test = ({script_of(each) or "" for each in part} for part in (apart.training(fold), apart.test(fold)))
        assert not of_training & of_test
        assert of_training | of_test == set(SCRIPTS)
        assert {each.fold for each in apart.test(fold)} == {fold}
        assert len(apart.training(fold)) == 3 * 6 * 4
        assert (apart.folds, apart.digest, apart.classes) == (corpus.folds, corpus.digest, corpus.classes)
        tested += of_test
    assert sorted(tested) == sorted(SCRIPTS)


def test_classes_that_a_part_lacks_are_refused(tmp_path: Path) -> None:
    """A class of one script cannot be trained where that script is tested."""
    corpus = corpus_of_texts(tmp_path, by_mood)
    utterances = tuple(replace(each, label="sad" if "impro01" in each.id else "angry") for each in corpus.utterances)
    alone = replace(corpus, utterances=utterances)
    with pytest.raises(InputError, match=r"no training utterance is 'sad' when fold '1' of texts is tested on impro01, script01_1"):
        scripts_apart(alone, "1")
