"""Small pieces of text for messages: counts with their noun, spelling hints, one-line errors, durations and times. Pure."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Sequence


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 run`, `3 runs`; `plural`: of a noun that does not take an s."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c, d, e and 3 more`: the first `most` names and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """`did you mean 'X'?` with the known name nearest to a wrong one; `otherwise` if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else otherwise


def one_line(text: object) -> str:
    """A text, or the message of an exception, with all white space folded into single spaces."""
    return " ".join(str(text).split())


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; `no message` if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or "no message"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `5 h 2 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(seconds: float) -> str:
    """Local date and time of seconds since the epoch: `2026-11-29 17:40:05`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
