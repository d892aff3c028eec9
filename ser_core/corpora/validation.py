"""Validation split of a sweep: speakers of the training folds that are excluded from training, so that the held-out fold stays unused.

It is the corpus' own `validation` part if it has one (FIXED_PART stands for it), otherwise the speakers of the next fold in the corpus'
order, so that every fold is used for validation once. If no fold would be left to train on, half of the training speakers.
Imports no third-party library.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ser_core.corpora.manifest import VALIDATION, Manifest, Utterance, natural_order
from ser_core.errors import InputError

# Stands for the validation part of a fixed split in place of speaker names. No stage trains on it in any case.
FIXED_PART = ("(validation part)",)

NONE_LEFT = "a sweep cannot be scored without the held-out fold: prepare the corpus with more speakers or folds"


def is_fixed_part(validation: Sequence[str]) -> bool:
    """Whether `validation` is FIXED_PART, as a tuple or as a list from JSON."""
    return tuple(validation) == FIXED_PART


def training_and_validation(
    manifest: Manifest, fold: str, validation: Sequence[str]
) -> tuple[tuple[Utterance, ...], tuple[Utterance, ...]]:
    """Return the utterances to train on and to validate on, by speakers (or FIXED_PART), without the held-out `fold`.

    Raises InputError if one of the two is empty.
    """
    reachable = manifest.training(fold)
    if is_fixed_part(validation):
        training, held = reachable, _fixed_part(manifest)
    else:
        speakers = frozenset(validation)
        training = tuple(utterance for utterance in reachable if utterance.speaker not in speakers)
        held = tuple(utterance for utterance in reachable if utterance.speaker in speakers)
    without = f"when fold {fold!r} is held out and validation is {', '.join(map(repr, validation)) or 'empty'}"
    if not training:
        raise InputError(f"{manifest.corpus}: no utterances to train on {without}")
    if not held:
        raise InputError(f"{manifest.corpus}: no utterances to validate on {without}")
    return training, held


def validation_speakers(manifest: Manifest, fold: str) -> tuple[str, ...]:
    """Return the validation speakers if `fold` is held out, sorted, or FIXED_PART if the corpus has a validation part.

    Raises InputError if speakers are unknown, if no speaker or not every class is left to train on, or if a validation speaker is also in
    the training or test part.
    """
    where = f"{manifest.corpus}, fold {fold!r}"
    reachable, test = manifest.training(fold), manifest.test(fold)
    fixed = _fixed_part(manifest)
    unknown = [utterance.id for utterance in (*reachable, *fixed, *test) if not utterance.speaker]
    if unknown:
        raise InputError(
            f"{where}: the speaker of {unknown[0]} is not known, so validation speakers cannot be chosen; prepare the corpus with speakers"
        )
    chosen = FIXED_PART if fixed else tuple(sorted(_chosen(manifest, fold, reachable)))
    if not chosen:
        raise InputError(f"{where}: no validation speakers are left beside those to train on; {NONE_LEFT}")
    training, held = training_and_validation(manifest, fold, chosen)
    _check_apart(where, held, "is tested", test)
    _check_apart(where, held, "is trained on", training)
    missing = sorted({utterance.label for utterance in reachable} - {utterance.label for utterance in training})
    if missing:
        raise InputError(
            f"{where}: without the validation speakers ({', '.join(chosen)}) no training utterance is {missing[0]!r}; {NONE_LEFT}"
        )
    return chosen


def _chosen(manifest: Manifest, fold: str, reachable: Sequence[Utterance]) -> frozenset[str]:
    """Speakers of the next fold, or half of the training speakers; empty if no speaker would be left to train on."""
    after = manifest.folds.index(fold) + 1
    held = {utterance.fold for utterance in reachable}
    following = next((each for each in (*manifest.folds[after:], *manifest.folds[:after]) if each in held), None)
    if following is not None:
        speakers = _speakers(utterance for utterance in reachable if utterance.fold == following)
        if _speakers(reachable) - speakers:
            return speakers
    ordered = sorted(_speakers(reachable), key=natural_order)
    return frozenset(ordered[: max(1, len(ordered) // 2)]) if len(ordered) > 1 else frozenset()


def _fixed_part(manifest: Manifest) -> tuple[Utterance, ...]:
    """The utterances of a fixed split's validation part; none if `validation` is the name of a held-out fold."""
    if VALIDATION in manifest.folds:
        return ()
    return tuple(utterance for utterance in manifest.utterances if utterance.fold == VALIDATION)


def _speakers(utterances: Iterable[Utterance]) -> frozenset[str]:
    return frozenset(utterance.speaker for utterance in utterances)


def _check_apart(where: str, held: Sequence[Utterance], otherwise: str, others: Sequence[Utterance]) -> None:
    shared = sorted(_speakers(held) & _speakers(others), key=natural_order)
    if shared:
        raise InputError(f"{where}: validation speaker {shared[0]} {otherwise} too; a sweep needs validation speakers of their own")
