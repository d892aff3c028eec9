"""Consistency checks of a corpus before it is prepared: pure functions from recordings to lists of problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ser_core.corpora.manifest import VALIDATION, natural_order
from ser_core.corpora.recordings import EXPECTED_COUNTS, ExpectedCounts, Recording, relative


def structure_problems(
    found: Sequence[Recording],
    folds: Sequence[str],
    source: Path,
    *,
    labelled: bool = True,
    shared_speakers: bool = False,
    published_folds: bool = False,
) -> list[str]:
    """One line per duplicate turn, and, if `labelled`, per speaker in two folds and fold without a class in its training part.

    `shared_speakers`: a speaker may be in two folds. `published_folds`: one line for all of these, as moving a recording is no remedy.
    """
    if not labelled:
        return _duplicates(found, source)
    shared = [] if shared_speakers else _speakers_in_two_folds(found, source)
    if shared and published_folds:
        worst = max(speakers_trained_and_tested(found, folds).values())
        shared = [
            f"{source}: folds that share speakers between training and test part (up to {worst} in a fold), so that results "
            "are not those for unknown speakers; --shared-speakers accepts them, and every caption states it"
        ]
    return [*_duplicates(found, source), *shared, *_untrainable(found, folds, source)]


def count_problems(found: Sequence[Recording], counts: ExpectedCounts, source: Path) -> list[str]:
    """One line with all differences from the expected numbers of utterances of classes and folds; no line if there are none."""
    differences = []
    if counts.utterances is not None and counts.utterances != len(found):
        differences.append(f"utterances {len(found)} not {counts.utterances}")
    differences += _differences("class", Counter(utterance.label for utterance in found), counts.classes)
    differences += _differences("fold", Counter(utterance.fold for utterance in found), counts.folds)
    if not differences:
        return []
    return [
        f"{source}: does not hold what it should: {', '.join(differences)}; unpack all of it, or state a deliberate subset's counts in "
        f"{source / EXPECTED_COUNTS}"
    ]


def speakers_in_two_folds(found: Iterable[Recording]) -> dict[str, dict[str, list[Recording]]]:
    """Return speaker -> fold -> recordings for every speaker with recordings in more than one fold.

    The validation part of a fixed split is never trained on, so it may share speakers with training and test part.
    """
    folds_of: dict[str, dict[str, list[Recording]]] = {}
    for utterance in found:
        if utterance.speaker and utterance.fold != VALIDATION:
            folds_of.setdefault(utterance.speaker, {}).setdefault(utterance.fold, []).append(utterance)
    return {speaker: folds for speaker, folds in folds_of.items() if len(folds) > 1}


def speakers_trained_and_tested(found: Sequence[Recording], folds: Sequence[str]) -> dict[str, int]:
    """Return held-out fold -> how many of its speakers are in its training part too."""
    shared = speakers_in_two_folds(found)
    return {fold: sum(fold in places for places in shared.values()) for fold in folds}


def _speakers_in_two_folds(found: Sequence[Recording], source: Path) -> list[str]:
    lines = []
    for speaker, folds in sorted(speakers_in_two_folds(found).items()):
        # The fold with the fewest recordings first: it is probably the wrong one.
        ordered = sorted(folds.items(), key=lambda item: (len(item[1]), natural_order(item[0])))
        places = [
            f"fold {fold} ({relative(members[0].path, source)}{f' and {len(members) - 1} more' if len(members) > 1 else ''})"
            for fold, members in ordered
        ]
        lines.append(
            f"{relative(ordered[0][1][0].path, source)}: speaker {speaker} is in two folds: {', '.join(places)}; a speaker belongs to one"
        )
    return lines


def _duplicates(found: Sequence[Recording], source: Path) -> list[str]:
    first: dict[str, Recording] = {}
    lines = []
    for utterance in found:
        known = first.setdefault(utterance.id, utterance)
        if known is not utterance:
            lines.append(
                f"{relative(utterance.path, source)}: duplicate turn {utterance.id}, also in {relative(known.path, source)}; keep one"
            )
    return lines


def _untrainable(found: Sequence[Recording], folds: Sequence[str], source: Path) -> list[str]:
    held = Counter(utterance.fold for utterance in found)
    present = [fold for fold in folds if held[fold]]
    if not found:
        return []  # the reader has reported why
    lines = []
    if len({utterance.fold for utterance in found} - {VALIDATION} if VALIDATION not in folds else set(present)) < 2:
        lines.append(f"{source}: fewer than two folds ({', '.join(sorted(held))}): one is held out and the others are trained on")
        return lines
    classes = sorted({utterance.label for utterance in found})
    if len(classes) < 2:
        lines.append(f"{source}: every utterance is labelled {classes[0]!r}; at least two classes are needed")
    kept_out = set() if VALIDATION in folds else {VALIDATION}
    for fold in present:
        trained = {utterance.label for utterance in found if utterance.fold not in {fold, *kept_out}}
        for label in classes:
            if label not in trained:
                example = min((utterance for utterance in found if utterance.label == label), key=lambda utterance: utterance.fold != fold)
                lines.append(
                    f"{relative(example.path, source)}: class {label!r} is missing in the training part of fold {fold}; "
                    "no other fold has an utterance of it"
                )
    return lines


def _differences(what: str, held: Counter[str], expected: Mapping[str, int] | None) -> list[str]:
    if expected is None:
        return []
    names = sorted({*held, *expected}, key=natural_order)
    return [f"{what} {name} {held[name]} not {expected.get(name, 0)}" for name in names if held[name] != expected.get(name, 0)]
