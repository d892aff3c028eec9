"""Who types the commands of an end-to-end test: an ordinary user where the suite is root, otherwise the user of the suite.

Root sees all partitions, has no limits and may read every file; somebody who works in a laboratory may not.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from tests.command_line import CommandLine
from tests.slurm_cluster.users import command_as, find_interpreter, make_users


@dataclass(frozen=True)
class Account:
    """A user with a home folder and an environment of Python packages."""

    user: str
    home: Path
    python: str  # the interpreter of the environment

    @property
    def uid(self) -> int:
        return pwd.getpwnam(self.user).pw_uid

    @property
    def variables(self) -> dict[str, str]:
        """What a login sets."""
        return {"HOME": str(self.home), "USER": self.user, "LOGNAME": self.user}

    def command(self, *command: str) -> list[str]:
        """A command that runs as this user."""
        return list(command) if self.uid == os.getuid() else command_as(self.user, *command)

    def line(self, data: Path, results: str = "results", variables: dict[str, str] | None = None) -> CommandLine:
        """The command line of this user, with results in a folder of their home and the corpora that are in `data`."""
        for corpus in (each for each in data.iterdir() if (each / "manifest.json").exists()):
            self.take(corpus, self.home / "data" / corpus.name)
        return CommandLine(
            self.home / "data", self.home / results, {**self.variables, **(variables or {})}, tuple(self.command(self.python))
        )

    def take(self, source: Path, target: Path) -> None:
        """Make the files of a folder readable for this user under another name, as hard links: their folder may be closed to them."""
        if not target.exists():
            shutil.copytree(source, target, copy_function=_link)

    def own(self, folder: Path) -> None:
        """Give a folder and all that is in it to this user."""
        if self.uid != os.getuid():
            group = pwd.getpwnam(self.user).pw_gid
            subprocess.run(["chown", "--recursive", "--no-dereference", f"{self.uid}:{group}", str(folder)], check=True)


def write_interpreter(folder: Path) -> None:
    """Write down the interpreter of the first ordinary user, if the suite can make one and there is an interpreter for them."""
    user = next(iter(make_users()), "")
    found = find_interpreter(user) if user else None
    (folder / "interpreter.json").write_text(json.dumps([user, found[0] if found else ""]))


def open_account(home: Path, interpreter: Path) -> Account:
    """An account with a new home. `interpreter`: the folder of `write_interpreter`."""
    user, program = json.loads((interpreter / "interpreter.json").read_text())
    home.mkdir()
    if user and not program:
        warnings.warn(f"end-to-end tests run as root: {user} may run no interpreter that finds the packages of this one", stacklevel=2)
    if not program:
        return Account(pwd.getpwuid(os.getuid()).pw_name, home, sys.executable)
    account = Account(user, home, make_environment(home / "environment", program))
    account.own(home)
    return account


def make_environment(folder: Path, program: str) -> str:
    """A virtual environment of an interpreter that finds the packages of this one; returns its own interpreter."""
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (folder / "pyvenv.cfg").write_text(f"home = {Path(program).parent}\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(program)
    return str(folder / "bin" / "python")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
