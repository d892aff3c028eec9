"""How training ends early."""

from __future__ import annotations


class Interrupted(Exception):  # noqa: N818 - an ending, not an error
    """Asked to stop: a checkpoint was written and the stage can be resumed from it."""

    interrupted = True


class Diverged(Exception):  # noqa: N818 - named by what happened
    """The loss or the outputs are no longer finite: the same seed would end the same way."""

    diverged = True
