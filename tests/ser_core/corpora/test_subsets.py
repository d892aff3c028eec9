"""Nested subsets of the training utterances: sizes, nesting, what they do not depend on, and the refusal of too small ones."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_core.corpora.manifest import Manifest, Utterance
from ser_core.corpora.subsets import subset
from ser_core.errors import InputError


def corpus_of(number: int, classes: int = 2) -> Manifest:
    utterances = tuple(Utterance(f"u{place:03d}", "", 16_000, f"class{place % classes}", "s", "1") for place in range(number))
    return Manifest("c", "d", tuple(f"class{each}" for each in range(classes)), ("1",), utterances, Path())


@settings(max_examples=40, deadline=None)
@given(st.integers(64, 400), st.sampled_from(["1", "2", "x y"]))
def test_halvings_are_nested(number: int, fold: str) -> None:
    """n, n/2, n/4 and n/8 utterances, rounded down, each a part of the one before, in the order of the corpus."""
    corpus = corpus_of(number, classes=1)
    parts = [subset(corpus, fold, corpus.utterances, 0.5**halvings) for halvings in range(4)]
    assert [len(part) for part in parts] == [number, number // 2, number // 4, number // 8]
    for larger, smaller in itertools.pairwise(parts):
        assert set(smaller) < set(larger)
        assert list(smaller) == sorted(smaller, key=corpus.utterances.index)


def test_a_subset_depends_on_the_utterances_and_the_fold_alone() -> None:
    """Not on their order; another fold has another permutation. The choice is pinned: artifacts are identified by the fraction."""
    corpus = corpus_of(40)
    found = subset(corpus, "1", corpus.utterances, 0.25)
    shuffled = list(corpus.utterances)
    random.Random(0).shuffle(shuffled)
    assert set(subset(corpus, "1", shuffled, 0.25)) == set(found)
    assert set(subset(corpus, "2", corpus.utterances, 0.25)) != set(found)
    assert [utterance.id for utterance in found] == ["u002", "u003", "u006", "u008", "u014", "u015", "u016", "u029", "u033", "u039"]


def test_decimal_fractions_are_exact() -> None:
    """0.3 of 10 utterances are 3, although the binary number 0.3 is below 3/10."""
    corpus = corpus_of(10, classes=1)
    assert [len(subset(corpus, "1", corpus.utterances, fraction)) for fraction in (0.3, 0.7, 0.1)] == [3, 7, 1]


def test_a_subset_without_a_class_is_refused() -> None:
    """One line with the class, the fold, the numbers and what to do; a class that the fold has not at all is not missed."""
    corpus = corpus_of(32)
    rare = (*corpus.utterances, Utterance("v", "", 16_000, "rare", "s", "1"))
    message = r"training_fraction=0\.125: without .* 'rare' when fold '1' of c .* \(utterances: 4 of 33.*larger fraction"
    with pytest.raises(InputError, match=message):
        subset(corpus, "1", rare, 0.125)
    with pytest.raises(InputError, match="utterances: 0 of 32"):
        subset(corpus, "1", corpus.utterances, 0.01)
    assert len(subset(corpus, "1", [each for each in corpus.utterances if each.label == "class0"], 0.5)) == 8
