"""Finds the recordings that EmoBox lists: by path, by path with another extension, by a file name that is there once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath

from ser_core.corpora.recordings import AUDIO_SUFFIXES, LISTED_SUFFIXES, audio_files, by_stem, stem

# What libsndfile does not read, and how it is converted; ffmpeg keeps channels and sample rate.
CONVERT = """find {folder} -name '*{suffix}' -exec sh -c 'ffmpeg -n -i "$1" -vn "${{1%.*}}.flac"' _ {{}} \\;"""


class Recordings:
    """The recordings in a folder, by the paths of EmoBox's lists."""

    def __init__(self, folder: Path, listed: Collection[str]) -> None:
        """`folder`: that of the corpus, in the place of `downloads/CORPUS`. `listed`: all paths of its list."""
        self.folder = folder
        paths = set(listed)
        stems = {_stem(path) for path in paths}
        self._by_name = len(stems) == len(paths)  # file names that repeat, as in CASIA, do not tell which recording it is

    def find(self, listed: str) -> tuple[Path | None, str]:
        """The file of a listed path and "", or None and why: no such file, or one that must be converted."""
        rest = inside(listed)
        exact = self.folder / rest
        readable = exact.suffix.lower() in LISTED_SUFFIXES
        if readable and exact.is_file():
            return exact, ""
        for suffix in AUDIO_SUFFIXES:
            other = exact.with_name(exact.name.removesuffix(exact.suffix) + suffix)
            if other.is_file():
                return other, ""
        found = self._files.get(_stem(listed), []) if self._by_name else []
        if len(found) == 1:
            return found[0], ""
        if len(found) > 1:
            return None, f"two files of this name, {found[0]} and {found[1]}; keep one"
        if exact.is_file():
            return None, exact.suffix
        return None, f"no audio: {rest} is not below {self.folder}"

    @cached_property
    def _files(self) -> Mapping[str, list[Path]]:
        return by_stem(audio_files(self.folder))


def inside(listed: str) -> str:
    """A listed path without `downloads/CORPUS/`."""
    parts = PurePosixPath(listed).parts
    return "/".join(parts[2:] if parts[:1] == ("downloads",) else parts)


def conversion_line(corpus: str, suffix: str, count: int, folder: Path) -> str:
    """The problem that recordings have a format that libsndfile does not read, with the command that converts them."""
    command = CONVERT.format(folder=folder, suffix=suffix)
    return f"{corpus}: recordings of the type {suffix}, which cannot be read: {count}; convert them beside the originals: {command}"


def _stem(listed: str) -> str:
    name = listed.rpartition("/")[2]
    return stem(name) if name.lower().endswith(LISTED_SUFFIXES) else name.rpartition(".")[0] or name
