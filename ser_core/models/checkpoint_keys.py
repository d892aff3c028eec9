"""Messages about keys: of a checkpoint that does not fit a model, and unknown keys of a model configuration."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

SHOWN_KEYS = 4  # of a checkpoint
LISTED_KEYS = 12  # of a configuration; more are not listed


def key_problems(source: str | Path, wrong: Mapping[str, Iterable[str]], conclusion: str) -> list[str]:
    """Return one line per kind of problem, problem -> keys: "SOURCE: N keys PROBLEM: A, B and M more; CONCLUSION"."""
    problems = []
    for problem, keys in wrong.items():
        names = sorted(keys)
        if names:
            count = "1 key" if len(names) == 1 else f"{len(names)} keys"
            more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
            problems.append(f"{source}: {count} {problem}: {', '.join(names[:SHOWN_KEYS])}{more}; {conclusion}")
    return problems


def unknown_key(section: str, key: str, known: Iterable[str]) -> str:
    """Return the message for a key that the configuration does not have, with the most similar known one."""
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}" if len(names) <= LISTED_KEYS else ""
    return f"{section}.{key}: no such key{hint}"
