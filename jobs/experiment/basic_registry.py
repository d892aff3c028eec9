"""A base class for registries: a default for every member that a grid without speech, teams and sweeps does not need.

A registry derived from it states `methods`, `stages`, `recipe_schema` and implements `call` and `run`; docs/your-own-grid.md shows one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from jobs.errors import UsageError
from jobs.experiment.registry import StageArguments
from jobs.store.records import json_text, write_text
from jobs.store.scores import UNWEIGHTED, Score, Terms

MANIFEST = "manifest.json"  # a folder with this file is a prepared corpus


@dataclass(frozen=True)
class Stage:
    """One stage and everything that determines its output except the corpus (jobs.experiment.registry.StageCall)."""

    stage: str
    settings: Mapping[str, Any]  # JSON values, part of the stage's key
    fold: str
    seed: int
    upstream: Mapping[str, Stage] = field(default_factory=dict)  # role -> stage
    runtime: Mapping[str, Any] = field(default_factory=dict)  # JSON values that do not change the output
    version: int = 1  # increase it when the stage computes something else


@dataclass(frozen=True)
class Corpus:
    """What the manifest of a corpus states."""

    corpus: str
    digest: str
    folds: tuple[str, ...]
    caption: tuple[str, ...] = ()  # sentences that captions state of it


class BasicRegistry:
    """Defaults of jobs.experiment.plugin.PluginRegistry."""

    methods: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    recipe_schema: type[Any]
    measurements: tuple[str, ...] = ()
    teams: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    pinned_keys: tuple[str, ...] = ()
    score: Score = UNWEIGHTED
    terms: Terms = Terms()

    @property
    def default_methods(self) -> tuple[str, ...]:
        return self.methods

    def call(self, method: str, recipe: Any, fold: str, seed: int) -> Stage:
        """The last stage of a run with its upstream stages. Stages with equal values are computed once for all runs."""
        raise NotImplementedError(f"{type(self).__name__}.call({method!r}, recipe, fold, seed)")

    def run(self, stage: str, **arguments: Unpack[StageArguments]) -> Mapping[str, Any]:
        """Compute one stage (jobs.experiment.registry.Registry.run)."""
        raise NotImplementedError(f"{type(self).__name__}.run({stage!r}, ...)")

    def make_corpus(self, name: str, folder: Path, progress: Callable[[int, int], None]) -> str:
        """Write the files of a corpus of `makes`, then `write_manifest`. Returns a line about it."""
        raise NotImplementedError(f"{type(self).__name__}.make_corpus({name!r}, folder, progress)")

    def calls(self, method: str, recipe: Any, validation: Mapping[str, Sequence[str]] | None = None) -> Callable[[str, int], Stage]:
        """`call` as a function from fold and seed. Raises UsageError for a sweep, which needs validation speakers."""
        if validation is not None:
            raise UsageError(f"sweep: {type(self).__name__} has no validation speakers, so that settings cannot be searched")
        return lambda fold, seed: self.call(method, recipe, fold, seed)

    def load_corpus(self, folder: Path) -> Corpus:
        """Read what `write_manifest` wrote. Raises UsageError for anything else."""
        file = folder / MANIFEST
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            return Corpus(str(value["corpus"]), str(value["digest"]), tuple(map(str, value["folds"])))
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file}: not the manifest of a prepared corpus ({type(error).__name__}); remove its folder") from error

    def how_to_prepare(self, name: str) -> str:
        return ""

    def preload(self) -> None:
        """Nothing is imported before workers are forked."""

    def check(self, recipe: Any) -> None:
        """Every recipe that fits the schema is allowed."""

    def check_corpus(self, corpus: Path, methods: Sequence[tuple[str, Any]], folds: Mapping[str, Sequence[str]]) -> None:
        """Every corpus is allowed."""

    def cost_notes(self, corpus: Path, stages: Sequence[Any]) -> tuple[str, ...]:
        return ()

    def needed_weights(self, method: str, recipe: Any) -> tuple[Any, ...]:
        return ()

    def export(self, stage: str, **arguments: Any) -> tuple[str, ...]:
        raise UsageError(f"export: {type(self).__name__} exports no {stage}")

    def locate(self, recipe: Any, folders: Sequence[Path]) -> None:
        """The recipe names no files."""

    def pin(self, recipe: Any, former: Iterable[Mapping[str, Any]], points: Iterable[Any] = ()) -> tuple[str, ...]:
        return ()

    def pin_corpus(self, method: str, recipe: Any, corpus: Path) -> None:
        """All methods read the whole corpus, whose digest is part of every stage's key."""

    def validation_speakers(self, corpus: Path, fold: str) -> tuple[str, ...]:
        raise UsageError(f"sweep: {type(self).__name__} has no validation speakers, so that settings cannot be searched")

    def training_frames(self, corpus: Path, recipe: Any, fold: str, validation: Sequence[str]) -> int:
        raise UsageError(f"sweep: {type(self).__name__} clusters nothing")

    def proxies(self, corpus: Path, fold: str, validation: Sequence[str], clusters: Mapping[int, Path]) -> dict[str, Any]:
        return {}

    def stage_proxies(self, stage: str, settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def write_manifest(folder: Path, corpus: str, folds: Sequence[str]) -> Corpus:
    """Write the manifest of a corpus whose other files are complete; its digest is the SHA-256 of their names and contents."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        whole.update(f"{path.relative_to(folder).as_posix()}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    found = Corpus(corpus, whole.hexdigest(), tuple(folds))
    write_text(folder / MANIFEST, json_text({"corpus": corpus, "digest": found.digest, "folds": list(folds)}))
    return found
