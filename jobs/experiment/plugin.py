"""The registry that an experiment names, `package.module:NAME`: imported, checked, and the members that launching needs.

The named module is imported like any other: from the folder of the program, an installed package or PYTHONPATH. Nothing of a name is
evaluated. Jobs import it from the copy of the code that the launch took.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from jobs.errors import UsageError
from jobs.experiment.registry import SweepRegistry
from jobs.store.scores import score_of
from jobs.text import first_line

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
GUIDE = "docs/your-own-grid.md shows a registry"


class PreparedCorpus(Protocol):
    """A prepared corpus, as a registry reads it from its folder."""

    @property
    def corpus(self) -> str:
        """Its name."""

    @property
    def digest(self) -> str:
        """SHA-256 of its content, part of every stage's key."""

    @property
    def folds(self) -> Sequence[str]:
        """Names of the folds, in the order of the tables."""

    @property
    def caption(self) -> Sequence[str]:
        """Sentences that captions of tables state of it, such as folds that share speakers; mostly none."""


class Weights(Protocol):
    """A checkpoint that stages read."""

    @property
    def key(self) -> str:
        """Key of the configuration that names it."""

    @property
    def path(self) -> str:
        """Absolute path; "": it is not on this machine."""

    @property
    def missing(self) -> str:
        """Why it cannot be used, and what to do; "": it can."""

    @property
    def downloadable(self) -> bool:
        """Whether a stage downloads it if its node has network."""


class PluginRegistry(SweepRegistry, Protocol):
    """A registry that experiments can name. `jobs.experiment.basic_registry.BasicRegistry` has a default for most members."""

    @property
    def stages(self) -> Sequence[str]:
        """Names of all stages."""

    @property
    def default_methods(self) -> Sequence[str]:
        """The methods of an experiment that names none."""

    @property
    def recipe_schema(self) -> type[Any]:
        """A dataclass whose fields all have defaults: the schema of the section `recipe`."""

    @property
    def packages(self) -> Sequence[str]:
        """Distributions whose versions results and tables state."""

    @property
    def makes(self) -> Sequence[str]:
        """Names of corpora that `make_corpus` makes."""

    @property
    def pinned_keys(self) -> Sequence[str]:
        """Keys of the recipe whose values `pin` looks up, for sweeps that search them."""

    @property
    def score(self) -> Any:
        """The number by which runs are judged and compared: an object with attributes of `jobs.store.scores.Score`."""

    @property
    def terms(self) -> Any:
        """What captions call the data: an object with attributes of `jobs.store.scores.Terms`."""

    def load_corpus(self, folder: Path) -> PreparedCorpus:
        """Read a prepared corpus, a folder with a file `manifest.json`. Workers call it before each stage to compare the digest."""

    def make_corpus(self, name: str, folder: Path, progress: Callable[[int, int], None]) -> str:
        """Make a corpus of `makes` that needs no source. `progress`: (done, total). Returns a line about it."""

    def how_to_prepare(self, name: str) -> str:
        """The command that prepares a corpus of this name, in backquotes; "" if there is none."""

    def preload(self) -> None:
        """Import what stages need, without starting a thread or using a GPU: called once in a process that forks workers."""

    def cost_notes(self, corpus: Path, stages: Sequence[Any]) -> Sequence[str]:
        """Lines for a dry run about stages to compute; each has `stage`, `settings`, `runtime` and `fold`."""

    def needed_weights(self, method: str, recipe: Any) -> Sequence[Weights]:
        """The checkpoints that a method needs."""

    def export(
        self,
        stage: str,
        *,
        settings: Mapping[str, Any],
        runtime: Mapping[str, Any],
        upstream: Mapping[str, Path],
        output: Path,
        folder: Path,
        merged: bool,
        facts: Mapping[str, Any],
        train_again: Callable[[Mapping[str, Any]], Path],
        onnx: bool,
    ) -> Sequence[str]:
        """Write what a finished stage has trained into an empty folder; return lines on how it is loaded.

        `upstream`: role -> folder of artifacts; `output`: that of the stage itself; `merged`: adaptors added to the weights they adapt.
        `onnx`: also as an ONNX file.
        `facts`: what the results state of the run and its method (`jobs.commands.model_facts`). `train_again`: computes the stage once
        more, with these entries of `runtime` changed, and returns the folder of its artifacts, which exists until the call returns.
        Raises an error with lines for the user for a stage that has nothing to export in this format, and an exception with the attribute
        `not_reproduced = True` if the artifacts that were computed again differ too much from those of the result.
        """

    def predict(
        self, model: Path | Mapping[str, Any], files: Sequence[str]
    ) -> tuple[Sequence[str], Iterator[tuple[Mapping[str, Any], str]]]:
        """The names of columns, and for each file, in order, a row and "", or a row with its `path` and why it cannot be read.

        `model`: a folder that `export` wrote, or of a finished stage `stage`, `settings`, `runtime`, `upstream` and `output` as for
        `export`. Raises an error with lines for the user, before any file is read, for a model that cannot be loaded.
        """

    def locate(self, recipe: Any, folders: Sequence[Path]) -> None:
        """Make names of files in the recipe absolute, if they are below one of the folders: jobs run in other folders."""

    def pin(self, recipe: Any, former: Iterable[Mapping[str, Any]], points: Iterable[Any] = ()) -> Sequence[str]:
        """Resolve names in the recipe that may mean something else tomorrow, such as models of a hub. Returns lines for the user.

        `former`: recipes of earlier launches as JSON values, whose resolutions stay valid. `points`: the recipes of a sweep, resolved
        instead of the recipe itself, which gets all of their resolutions.
        """

    def pin_corpus(self, method: str, recipe: Any, corpus: Path) -> None:
        """Enter into the recipe of a method what only some methods read of the corpus, so that it is part of their stages' keys."""


_SEQUENCES = ("methods", "stages", "measurements", "teams", "packages", "makes")  # of names
_MEMBERS = sorted(name for base in PluginRegistry.__mro__ for name in vars(base) if not name.startswith("_"))


@dataclass(frozen=True)
class Plugin:
    """A registry with the name under which workers import it."""

    name: str
    registry: PluginRegistry

    @property
    def digest_of(self) -> str:
        """`module:attribute` of the function that reads a corpus."""
        return f"{self.name}.load_corpus"

    @property
    def preload(self) -> str:
        """`module:attribute` of the function that imports what stages need."""
        return f"{self.name}.preload"


def load_plugin(name: str, key: str = "registry") -> Plugin:
    """Import a registry. UsageError, in one line that names `key`, if there is none of that name or it lacks a member."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{key}={name}: expected package.module:NAME, such as examples.digits.digits:REGISTRY")
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        inside = error.name and not f"{module_name}.".startswith(f"{error.name}.")
        why = f"it imports {error.name}, which is not installed" if inside else f"no module {error.name}"
        where = "" if inside else "; it is looked for in the folder of the program, in installed packages and on PYTHONPATH"
        raise UsageError(f"{key}={name}: {why}{where}") from error
    except Exception as error:  # whatever the code of the module raises
        raise UsageError(f"{key}={name}: {module_name} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise UsageError(f"{key}={name}: module {module_name} has no {attribute}; {GUIDE}")
    if isinstance(found, type):
        raise UsageError(f"{key}={name}: {attribute} is a class, and a registry is an object of it: {found.__name__}()")
    missing = missing_members(found)
    if missing:
        raise UsageError(f"{key}={name}: not a registry, it lacks {', '.join(missing)}; {GUIDE}")
    for member in _SEQUENCES:
        if isinstance(value := getattr(found, member), str):
            raise UsageError(f"{key}={name}: {member} is the text {value!r}, expected a tuple such as ({value!r},)")
    score_of(found)
    return Plugin(name, cast(PluginRegistry, found))


def missing_members(registry: object) -> Collection[str]:
    """Names of the members of `PluginRegistry` that an object lacks."""
    return [name for name in _MEMBERS if not hasattr(registry, name)]
