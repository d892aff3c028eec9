"""What a user can mend, and what the program itself broke."""

from __future__ import annotations

import errno

# Of files: rights, a full, read-only or failing disk, a folder where a file should be, or the reverse.
_MENDABLE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
)


class UsageError(Exception):
    """Wrong command, configuration or site: one line (what, where, what to do); the command line exits with 2."""


class StoredConfigurationError(UsageError):
    """The record of a launch is damaged or of another version of the program: its stages are not known here."""


class RequestRefusedError(UsageError):
    """Slurm rejected the request of one batch; waiting does not help. Other batches are not affected."""


class SlurmUnavailableError(Exception):
    """Slurm did not answer a query, so the state of the queue is unknown. Temporary: a caller retries, or passes the error on.

    At the command line it is one line and exit code 2, like UsageError.
    """


class SubmissionFailedError(Exception):
    """sbatch returned no job id; the text is what it wrote, or that it was killed after its time limit."""


class InternalError(RuntimeError):
    """Something of the program's own broke: one line (what, which log, what to do); the command line exits with 1."""


def problems_of(error: BaseException) -> tuple[str, ...]:
    """The lines for the user of an error that a registry raises: its attribute `problems`; () of any other error."""
    found = getattr(error, "problems", ())
    return tuple(map(str, found)) if isinstance(found, tuple | list) else ()


def is_mendable(error: OSError) -> bool:
    """Whether an error of the operating system is one of files that the user mends, rather than one of the program."""
    return error.errno in _MENDABLE
