"""Parts of a corpus by the names of its utterances, such as acted and natural turns. Imports no third-party library."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ser_core.corpora.manifest import Utterance


def part(utterances: Sequence[Utterance], pattern: str) -> tuple[Utterance, ...]:
    """Return the utterances whose id contains a match of a regular expression; all of them for ""."""
    search = re.compile(pattern).search
    return tuple(utterance for utterance in utterances if search(utterance.id))


def pattern_problem(key: str, pattern: str) -> str:
    """Return the line for a text that is no regular expression; "" for one that is."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{key}={pattern}: not a regular expression: {error}"
    return ""
