"""What a user can mend."""

from __future__ import annotations


class UsageError(Exception):
    """Wrong command, configuration or site: one line (what, where, what to do); the command line exits with 2."""
