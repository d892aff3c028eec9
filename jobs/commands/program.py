"""The program that a command line is of: where its files are, and the registry of experiments that name none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.console import COMMAND

if TYPE_CHECKING:
    from jobs.experiment.plugin import Plugin


@dataclass(frozen=True)
class Program:
    """Folders and defaults that all commands have in common."""

    root: Path  # folder of the code, of which jobs get a copy
    registry: str  # `package.module:NAME`, of experiments that name none
    experiment: str  # that a command is about if none is named
    home: Path | None = None  # folder with the user's configs/, data/ and results/; None: `root`
    command: str = COMMAND  # that runs it, for messages

    @property
    def configs(self) -> Path:
        """Folder with experiment/, recipe/ and site/."""
        return self.root / "configs"

    @property
    def published(self) -> Path:
        """File of the published results."""
        return self.configs / "published.yaml"

    @property
    def data(self) -> Path:
        """Folder of the prepared corpora where no option names one."""
        return (self.home or self.root) / "data"

    @property
    def results(self) -> Path:
        """Folder of the results where no option names one."""
        return (self.home or self.root) / "results"

    @property
    def own_configs(self) -> Path:
        """Folder in which new experiments are written."""
        return (self.home or self.root) / "configs"

    def file_of(self, experiment: str) -> str:
        """The path of the user's own file in configs/experiment/ where they stand, if the program is elsewhere; else the name itself."""
        from jobs.experiment.layers import is_path

        own = self.own_configs / "experiment" / f"{experiment}.yaml"
        return str(own) if self.home is not None and not is_path(experiment) and own.is_file() else experiment

    def plugin(self, name: str) -> Plugin:
        """The registry of an experiment, by its key `registry` ("": the program's own). UsageError if there is none of that name."""
        from jobs.experiment.plugin import load_plugin

        return load_plugin(name or self.registry)

    def folders(self, data: Path, results: Path) -> tuple[tuple[str, Path, Path], ...]:
        """The options of both folders, with the folder given and the default one."""
        return ("--data", data, self.data), ("--results", results, self.results)
