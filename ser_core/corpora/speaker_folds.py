"""Folds for a corpus that has none: each speaker's recordings in one fold."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ser_core.corpora.manifest import natural_order
from ser_core.corpora.recordings import Recording, SourceListing
from ser_core.errors import InputError

LEAVE_ONE_OUT = "leave-one-speaker-out"
SEED = 0


def with_folds(listing: SourceListing, rule: str) -> SourceListing:
    """The listing with the fold of each recording chosen by `rule`; the rule is one of its facts.

    `rule`: LEAVE_ONE_OUT (a fold for each speaker, with the speaker's name), or a number K: folds 1 to K of disjoint speakers, about equal
    in size and shares of classes, by scikit-learn's StratifiedGroupKFold with shuffling under the seed SEED.
    Raises InputError for another rule, and for more folds than speakers.
    """
    facts: dict[str, Any] = {**listing.facts, "folds": rule}
    if rule == LEAVE_ONE_OUT:
        found = [replace(each, fold=each.speaker) for each in listing.found]
    elif rule.isdecimal() and int(rule) >= 2:
        facts["folds_seed"] = SEED
        found = [replace(each, fold=fold) for each, fold in zip(listing.found, _balanced(listing.found, int(rule)), strict=True)]
    else:
        raise InputError(f"--folds {rule}: name {LEAVE_ONE_OUT}, or a number of folds from 2")
    folds = tuple(sorted({each.fold for each in found}, key=natural_order))
    return replace(listing, found=tuple(found), folds=folds, facts=facts)


def _balanced(found: Sequence[Recording], count: int) -> list[str]:
    """The fold of each recording; independent of the order of the recordings."""
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    ordered = sorted(range(len(found)), key=lambda position: found[position].id)
    speakers = [found[position].speaker for position in ordered]
    if count > len(set(speakers)):
        raise InputError(f"--folds {count}: more folds than speakers ({len(set(speakers))}); a speaker belongs to one fold")
    labels = [found[position].label for position in ordered]
    most = max(labels.count(label) for label in set(labels))
    if most < count:
        raise InputError(f"--folds {count}: more folds than recordings of the largest class ({most})")
    folds = [""] * len(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class with fewer recordings than folds, which some folds then lack
        splits = StratifiedGroupKFold(count, shuffle=True, random_state=SEED).split(np.zeros(len(labels)), labels, speakers)
        for number, (_, held_out) in enumerate(splits, start=1):
            for position in held_out:
                folds[ordered[position]] = str(number)
    return folds
