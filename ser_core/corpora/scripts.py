"""Scripts of acted dialogs, and the protocol under which no script is trained on and tested on. Imports no third-party library.

In IEMOCAP every session acts the same scripted dialogs and mostly the same scenarios, so that with a session held out its words still occur
in the training part. The name of a turn has its script: `Ses01F_script01_1b_F002` is of script01_1, `Ses04M_impro05a_M003` of impro05.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ser_core.corpora.manifest import Manifest, Utterance, natural_order
from ser_core.errors import InputError

KINDS = ("scripted", "improvised")
_TURN = re.compile(r"Ses\d+[FM]_((script|impro)\d+(?:_\d+)?)[a-z]?_[FM]\w*")


def script_of(utterance: Utterance) -> str | None:
    """Return the script or scenario of a turn, by its name; None if the name has none."""
    match = _TURN.fullmatch(utterance.id)
    return match[1] if match else None


def kind_of(utterance: Utterance) -> str | None:
    """Return which of KINDS a turn is, by its name; None if the name does not tell."""
    match = _TURN.fullmatch(utterance.id)
    return None if match is None else KINDS[("script", "impro").index(match[2])]


def tested_scripts(utterances: Iterable[Utterance], folds: Sequence[str], fold: str) -> frozenset[str]:
    """Return the scripts that a fold is tested on: every n-th of n folds (of two parts for one fold), scripted before improvised.

    Raises InputError for an utterance whose name has no script.
    """
    found: set[str] = set()
    for utterance in utterances:
        script = script_of(utterance)
        if script is None:
            raise InputError(
                f"recipe.protocol=scripts_disjoint: the name of utterance {utterance.id} has no script, such as Ses01F_script01_1_F000; "
                "use the protocol sessions"
            )
        found.add(script)
    ordered = sorted(found, key=lambda name: (name.startswith("impro"), natural_order(name)))
    return frozenset(ordered[folds.index(fold) :: max(2, len(folds))])


def scripts_apart(manifest: Manifest, fold: str) -> Manifest:
    """Return the manifest of `scripts_disjoint` for a held-out fold: of the fold only the tested scripts, of the others all but these.

    Classes, folds and digest are those of the corpus. Raises InputError as `tested_scripts`, if nothing is left to train on or to test on,
    and if a class of the corpus is not left to train on.
    """
    tested = tested_scripts(manifest.utterances, manifest.folds, fold)
    kept = tuple(each for each in manifest.utterances if (each.fold == fold) == (script_of(each) in tested))
    found = replace(manifest, utterances=kept)
    training, test = found.training(fold), found.test(fold)
    missing = sorted(set(manifest.classes) - {each.label for each in training})
    if not test or missing:
        what = f"no training utterance is {missing[0]!r}" if missing else "no utterance is left to test on"
        scripts = ", ".join(sorted(tested, key=natural_order)) or "no script"
        raise InputError(
            f"recipe.protocol=scripts_disjoint: {what} when fold {fold!r} of {manifest.corpus} is tested on {scripts}; "
            "use the protocol sessions"
        )
    return found
