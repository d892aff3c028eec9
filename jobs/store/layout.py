"""Paths of all folders and files under `results/`: the only module that knows their names.

results/
  id.json                           identity of the folder, of which names of Slurm jobs are made (jobs.store.identity)
  store/STAGE/KEY/                  one stage, shared by all experiments
    result.json                     decides that the stage is done: written last, names the attempt whose artifacts count
    checkpoint/                     resumable state, passed from attempt to attempt
    attempts/0001/                  one execution
      claim.json                    which process executes it: host, pid, Slurm job, start
      output/                       artifacts
      outcome.json                  how it ended, if not in a result
  store/cache/                      data shared between stages; may be removed whenever nothing runs
  EXPERIMENT/
    experiment.json                 resolved configuration of the last launch
    cancelled.json                  what the user cancelled since
    index.json                      cache of the facts of finished stages
    submissions/NAME.json           one Slurm array: intent, then job number
    teams/JOB.RESTART.STEP.json     address of a job's process group until all processes have joined (mode 0600)
    snapshots/DIGEST/               code the jobs run
    logs/  tables/  confusion/
    EXPERIMENT-bundle.zip           results and tables for others, as `bundle` wrote them last
    sweep/                          report of the last sweep; jobs.sweeps.records writes the rest
      latest                        name of the last sweep launched
      DIGEST/                       one sweep, named by the digest of its configuration; folders as in EXPERIMENT
        proposals.json              points proposed by Optuna
        proxies/                    cache of proxies of the clusters
        driver/                     which processes have driven it
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

STORE = "store"
IDENTITY = "id.json"
EXPERIMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage in the store."""

    path: Path

    @property
    def root(self) -> Path:
        """The folder `results`."""
        return self.path.parents[2]

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    def attempt(self, number: int) -> AttemptFolder:
        return AttemptFolder(self.attempts / f"{number:04d}", number)


@dataclass(frozen=True)
class AttemptFolder:
    """The folder of one attempt (numbered from 1)."""

    path: Path
    number: int

    @property
    def claim(self) -> Path:
        return self.path / "claim.json"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def output(self) -> Path:
        return self.path / "output"


@dataclass(frozen=True)
class Layout:
    """All folders of one experiment below `root` (the folder `results`)."""

    root: Path
    experiment: str

    def stage(self, stage: str, key: str) -> StageFolder:
        return StageFolder(self.root / STORE / stage / key)

    @property
    def cache(self) -> Path:
        """Data that stages of all experiments share and can compute again."""
        return self.root / STORE / "cache"

    @property
    def folder(self) -> Path:
        return self.root / self.experiment

    @property
    def records(self) -> tuple[Path, Path]:
        """Every record of the experiment and of its stages lies below one of these."""
        return self.folder, self.root / STORE

    @property
    def experiment_file(self) -> Path:
        return self.folder / "experiment.json"

    @property
    def cancellations(self) -> Path:
        return self.folder / "cancelled.json"

    @property
    def index(self) -> Path:
        return self.folder / "index.json"

    @property
    def submissions(self) -> Path:
        return self.folder / "submissions"

    @property
    def teams(self) -> Path:
        return self.folder / "teams"

    @property
    def snapshots(self) -> Path:
        return self.folder / "snapshots"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def tables(self) -> Path:
        return self.folder / "tables"

    @property
    def bundle(self) -> Path:
        return self.folder / f"{self.experiment}-bundle.zip"

    def log_of(self, stage: str, key: str) -> Path:
        """The log of a stage that is computed on this machine; attempts append to it."""
        return self.logs / f"{stage}-{key}.log"

    @property
    def sweep(self) -> Path:
        """The report of the last sweep, and a folder for each sweep."""
        return self.folder / "sweep"


def valid_experiment_name(name: str) -> bool:
    """Letters, digits, `_`, `.`, `-`; not the name of the store or of the file beside it."""
    return EXPERIMENT_NAME.fullmatch(name) is not None and name not in (STORE, IDENTITY)


def shared_path(path: Path) -> Path:
    """The absolute path of a file or folder as its user names it, for use on other machines: symbolic links are not followed.

    What an automounter's link leads to may exist on this machine only. The working folder has the shell's name (`PWD`), as `pwd` prints it.
    """
    whole, shell = path.absolute(), Path(os.environ.get("PWD", ""))
    with contextlib.suppress(OSError):  # PWD is out of date, or the working folder was removed
        working = Path.cwd()
        if shell.is_absolute() and whole.is_relative_to(working) and shell.samefile(working):
            whole = shell / whole.relative_to(working)
    plain = Path(os.path.normpath(whole))
    return plain if plain.resolve() == whole.resolve() else whole  # `..` behind a symbolic link stays
