"""Nested subsets of the training utterances of a fold, for experiments on data efficiency. Imports no third-party library.

A fold has one permutation of its utterances, from a hash of fold and utterance, so that it is the same on every machine. The subset of a
fraction is its beginning: a smaller subset is part of every larger one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

from ser_core.corpora.manifest import Manifest, Utterance
from ser_core.errors import InputError


def subset(manifest: Manifest, fold: str, utterances: Sequence[Utterance], fraction: float) -> tuple[Utterance, ...]:
    """The first `fraction` of the permuted utterances, rounded down, in the order of `utterances`; all of them for 1.

    Raises InputError if a class of the corpus that `utterances` have is not among them.
    """
    if fraction == 1:
        return tuple(utterances)
    size = int(len(utterances) * Fraction(repr(float(fraction))))
    chosen = {utterance.id for utterance in sorted(utterances, key=lambda utterance: _place(fold, utterance))[:size]}
    found = tuple(utterance for utterance in utterances if utterance.id in chosen)
    missing = sorted({utterance.label for utterance in utterances} - {utterance.label for utterance in found})
    if missing:
        raise InputError(
            f"recipe.training_fraction={fraction:g}: without a training utterance of class {missing[0]!r} when fold {fold!r} of "
            f"{manifest.corpus} is held out (utterances: {size} of {len(utterances)}); choose a larger fraction"
        )
    return found


def _place(fold: str, utterance: Utterance) -> str:
    return hashlib.sha256(f"{fold}\n{utterance.id}".encode()).hexdigest()
