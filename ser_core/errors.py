"""What a user can mend."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(Exception):
    """Wrong data, checkpoint or setting: one line per problem (what, which file or key, what to do)."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))
