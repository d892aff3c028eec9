"""Folds of a CSV corpus that has none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ser_core.corpora.manifest import load_manifest
from ser_core.corpora.prepare import prepare
from ser_core.corpora.recordings import Recording, SourceListing
from ser_core.corpora.speaker_folds import LEAVE_ONE_OUT, with_folds
from ser_core.errors import InputError
from tests.ser_core.corpora import sources

SPOKEN = {f"s{number}": 4 + number % 3 for number in range(12)}  # speaker -> recordings of a class
LISTING = SourceListing(
    tuple(
        Recording(f"{speaker}-{label}-{take}", Path("a.wav"), label, speaker, "")
        for speaker, takes in SPOKEN.items()
        for label in ("calm", "loud")
        for take in range(takes)
    ),
    (),
    (),
)


def folds_of_speakers(listing: SourceListing) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for each in listing.found:
        found.setdefault(each.speaker, set()).add(each.fold)
    return found


def test_leave_one_speaker_out() -> None:
    """A fold for each speaker, in natural order."""
    listing = with_folds(LISTING, LEAVE_ONE_OUT)
    assert listing.folds == tuple(f"s{number}" for number in range(12))
    assert folds_of_speakers(listing) == {speaker: {speaker} for speaker in SPOKEN}
    assert listing.facts == {"folds": LEAVE_ONE_OUT}


def test_some_folds_of_disjoint_speakers() -> None:
    """A speaker is in one fold; folds differ by no more than one speaker's recordings; the order of the rows does not matter."""
    listing = with_folds(LISTING, "4")
    assert listing.folds == ("1", "2", "3", "4")
    folds = folds_of_speakers(listing)
    assert all(len(each) == 1 for each in folds.values())
    sizes = Counter(each.fold for each in listing.found)
    assert max(sizes.values()) - min(sizes.values()) <= 2 * max(SPOKEN.values())
    backwards = with_folds(replace(LISTING, found=LISTING.found[::-1]), "4")
    assert folds_of_speakers(backwards) == folds
    assert listing.facts == {"folds": "4", "folds_seed": 0}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("13", r"--folds 13: more folds than speakers .12."),
        ("1", r"--folds 1: name leave-one-speaker-out"),
        ("some", r"a number of folds"),
    ],
)
def test_impossible_rules(rule: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_folds(LISTING, rule)


def test_the_manifest_has_the_folds_and_the_rule(tmp_path: Path) -> None:
    """Preparing again with another rule changes folds and digest; a file with the column refuses the option, one without names it."""
    file = sources.csv_corpus(tmp_path / "source", header="path,label,speaker")
    target = tmp_path / "data" / "mine"
    prepare("csv", file, target, folds=LEAVE_ONE_OUT)
    first = load_manifest(target)
    assert {(each.speaker, each.fold) for each in first.utterances} == {("s1", "s1"), ("s2", "s2"), ("s10", "s10")}
    assert first.source["folds"] == LEAVE_ONE_OUT
    prepare("csv", file, target, folds="2")
    second = load_manifest(target)
    assert (second.folds, second.source["folds"], second.source["folds_seed"]) == (("1", "2"), "2", 0)
    assert second.digest != first.digest
    with pytest.raises(InputError, match=r"no column fold .*; without folds of its own: --folds leave-one-speaker-out"):
        prepare("csv", file, target)
    sources.csv_corpus(tmp_path / "source")
    with pytest.raises(InputError, match="has a column fold: leave out --folds"):
        prepare("csv", file, target, folds="2")
    with pytest.raises(InputError, match="--folds is for csv only"):
        prepare("emodb", tmp_path, target, folds="2")
