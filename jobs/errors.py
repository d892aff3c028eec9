"""What a user can mend, and what the program itself broke."""

from __future__ import annotations

import errno

# Of files: rights, a full, read-only or failing disk, a folder where a file should be, or the reverse.
_MENDABLE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
)


class UsageError(Exception):
    """Wrong command, configuration or site: one line (what, where, what to do); the command line exits with 2."""


class SubmissionFailedError(Exception):
    """sbatch gave no job number; the text is what it wrote, or that it was killed for not answering."""


class InternalError(RuntimeError):
    """Something of the program's own broke: one line (what, which log, what to do); the command line exits with 1."""


def is_mendable(error: OSError) -> bool:
    """Whether an error of the operating system is one of files that the user mends, rather than one of the program."""
    return error.errno in _MENDABLE


class SlurmUnavailableError(UsageError):
    """Slurm did not answer a look-up: nothing is known of the queue, and nothing may be concluded. Later it may be."""
