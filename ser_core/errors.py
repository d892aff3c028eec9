"""Exceptions of this package, and how an out-of-memory error is recognised."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Messages of torch and oneDNN; the latter reports any failed allocation as a primitive that cannot be created.
_MEMORY = re.compile(r"out of memory|allocate memory|STATUS_ALLOC_FAILED|could not (create|execute) a primitive", re.IGNORECASE)


class InputError(Exception):
    """Wrong data, checkpoint or setting, to be corrected by the user: one line per problem (what, which file or key, what to do)."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


def first_line(error: BaseException) -> str:
    """First line of an error's message; its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_memory_error(error: BaseException) -> bool:
    """Whether `error` is an out-of-memory error. On a CPU torch raises a RuntimeError for it, recognisable by its message only."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None)


class Interrupted(Exception):  # noqa: N818 - a requested stop, not an error
    """The stage stopped on request; it can be resumed from its checkpoint. `jobs` reads the attribute `interrupted`."""

    interrupted = True


class NotReproduced(Exception):  # noqa: N818 - an outcome of training
    """A run that was trained again does not predict what it did. `jobs` reads the attribute `not_reproduced`."""

    not_reproduced = True


class Diverged(Exception):  # noqa: N818 - an outcome of training, not a fault of the program
    """The loss or the outputs are NaN or infinite; the same seed would diverge again. `jobs` reads the attribute `diverged`."""

    diverged = True
