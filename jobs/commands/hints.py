"""Commands for the user to paste: whole, quoted, with every folder that is not the default one. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.experiment.config import SECRETS
from jobs.experiment.layers import is_path
from jobs.store.layout import shared_path


@dataclass(frozen=True)
class Hints:
    """Commands for one experiment, each in backquotes."""

    experiment: str
    results: str = ""  # folder of the results; "": the default one
    typed: tuple[str, ...] = ()  # words of the last launch, after `launch.py`

    def of(self, command: str, *words: str) -> str:
        """A command for the experiment; `words` follow its name."""
        folder = ("--results", self.results) if self.results else ()
        return _quoted((command, self.experiment, *words, *folder))

    @property
    def resume(self) -> str:
        """The command that launches again with the stored settings."""
        return self.of("resume")

    @property
    def launch(self) -> str:
        """The command of the last launch, as it was typed."""
        return _quoted(self.typed) if self.typed else self.of("grid")


def launch_words(
    command: str, arguments: Sequence[str], *, cluster: str | None, wait: bool | None, folders: Iterable[tuple[str, Path, Path]]
) -> tuple[str, ...]:
    """What was typed to launch, after `launch.py`. `folders`: option, folder, default; given if they differ, also if a variable did it.

    Settings that may hold secrets are left out: the words are printed. `resume` has them all the same. The path of a file is absolute.
    """
    typed = [text for text in arguments if not text.startswith(SECRETS)]
    words = [command, *(str(shared_path(Path(text))) if "=" not in text and is_path(text) else text for text in typed)]
    if cluster is not None:
        words.extend(("--cluster", cluster))
    if wait is not None:
        words.append("--wait" if wait else "--detach")
    return (*words, *_folder_words(folders))


def next_after_prepare(corpus: str, folders: Iterable[tuple[str, Path, Path]], *, has_experiment: bool) -> str:
    """The command that follows `prepare`: the dry run of the corpus's own experiment, or `init` of a new one."""
    more = _folder_words(folders)
    if has_experiment:
        return f"next: {_quoted(('grid', corpus, '--dry-run', *more))} shows what its experiment would compute"
    return f"next: {_quoted(('init', corpus, '--corpus', corpus, *more))} writes an experiment on it"


def _folder_words(folders: Iterable[tuple[str, Path, Path]]) -> list[str]:
    given = [(option, folder) for option, folder, default in folders if folder.resolve() != default.resolve()]
    return [word for option, folder in given for word in (option, str(shared_path(folder)))]


def _quoted(words: Sequence[str]) -> str:
    return f"`{shlex.join(('python', 'launch.py', *words))}`"
