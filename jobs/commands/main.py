"""Runs a command line: errors that the user can fix become lines on stderr and exit code 2, those of the program exit code 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.commands.console import COMMAND, name_command, note
from jobs.errors import InternalError, SlurmUnavailableError, UsageError, is_mendable, problems_of

if TYPE_CHECKING:
    import typer

MOST_SHOWN = 20  # lines of one error of a registry


def run(app: typer.Typer, command: str = COMMAND) -> int:
    """Run a command of `sys.argv`; returns the exit code, or raises SystemExit with it. `command`: its name in messages."""
    name_command(command)
    try:
        app(standalone_mode=True)
    except (UsageError, SlurmUnavailableError) as error:
        note(str(error))
        return 2
    except InternalError as error:
        note(str(error))
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader closed the pipe
        return 0
    except OSError as error:
        if not is_mendable(error):
            raise
        note(_mending(error))
        return 2
    except Exception as error:
        lines = problems_of(error)
        if not lines:
            raise
        note("\n".join(shortened(lines)))
        return 2
    return 0


def shortened(problems: Sequence[str]) -> list[str]:
    """The first MOST_SHOWN of these lines, and a line with the number of the others if there are more. Pure."""
    more = len(problems) - MOST_SHOWN
    return [*problems[:MOST_SHOWN], f"and {more} more problems of {len(problems)}"] if more > 0 else list(problems)


def _mending(error: OSError) -> str:
    """What an error of files is, and what to do."""
    from jobs.store.access import denied_line
    from jobs.store.disk_space import FULL

    plain = f"{error.filename or 'a file'}: {error.strerror}"
    line = denied_line(error) if isinstance(error, PermissionError) else plain
    advice = "make room there (`python launch.py clean` frees what failed)" if error.errno in FULL else "fix that"
    return f"{line}; {advice} and run the same command again"
