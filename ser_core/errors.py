"""What a user can mend, and what must not be taken for it."""

from __future__ import annotations

import re
from collections.abc import Sequence

# torch's allocators, and oneDNN, which does not say what it could not create a primitive for.
_MEMORY = re.compile(r"out of memory|allocate memory|could not (create|execute) a primitive", re.IGNORECASE)


class InputError(Exception):
    """Wrong data, checkpoint or setting: one line per problem (what, which file or key, what to do)."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ran out, which torch tells on a CPU by the message of a RuntimeError only: nothing that a user wrote is wrong."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None)


class Interrupted(Exception):  # noqa: N818 - an ending, not an error
    """Asked to stop: a checkpoint was written and the stage can be resumed from it."""

    interrupted = True


class Diverged(Exception):  # noqa: N818 - named by what happened
    """The loss or the outputs are no longer finite: the same seed would end the same way."""

    diverged = True
