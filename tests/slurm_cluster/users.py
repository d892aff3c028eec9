"""Ordinary users of a test cluster: made once on this machine where the suite is root, and used by real jobs.

Slurm shows root and its own user everything; what a site hides or limits, only an ordinary user meets.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import pwd
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

NAMES = ("ser-grid-one", "ser-grid-two")
ACCOUNT = "lab"  # their account in Slurm
PR_SET_KEEPCAPS = 8  # from linux/prctl.h and linux/capability.h
CAP_DAC_READ_SEARCH = 2
CAPABILITY_VERSION_3 = 0x20080522
_PROBE = "import encodings.ascii, torch, jobs.experiment.config"
T = TypeVar("T")


def make_users() -> tuple[str, ...]:
    """Names of the ordinary users, which are created if they are missing; none where the suite itself is an ordinary user."""
    if os.getuid() != 0:
        return ()
    for name in NAMES:
        if name not in {entry.pw_name for entry in pwd.getpwall()}:
            subprocess.run(["useradd", "--system", "--no-create-home", "--home-dir=/", "--shell=/bin/sh", name], check=False)
    return tuple(name for name in NAMES if name in {entry.pw_name for entry in pwd.getpwall()})


def command_as(user: str, *command: str) -> list[str]:
    """A command that runs as a user, without root's rights."""
    entry = pwd.getpwnam(user)
    return ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", "--inh-caps=-all", *command]


def folder_of(user: str, parent: Path, name: str = "home") -> Path:
    """A folder that belongs to a user, and that only they may write."""
    folder = parent / name
    folder.mkdir(parents=True)
    entry = pwd.getpwnam(user)
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    return folder


def as_user(user: str, function: Callable[..., T], *arguments: Any) -> T:
    """The value of a function that is called in a process of a user. Its exception is raised here as an AssertionError."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _become(user)
            answer: tuple[bool, Any] = (True, function(*arguments))
        except BaseException as error:  # passed on to the parent process
            answer = (False, f"{type(error).__name__}: {error}")
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    fine, value = pickle.loads(text)  # noqa: S301 - written by the child process above
    if not fine:
        raise AssertionError(f"as {user}: {value}")
    return value  # type: ignore[no-any-return]


def _become(user: str) -> None:
    """Give up root's rights. Reading stays allowed to this process alone: its interpreter may be in root's own folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    kept = 1 << CAP_DAC_READ_SEARCH
    if libc.capset(struct.pack("=Ii", CAPABILITY_VERSION_3, 0), struct.pack("=6I", kept, kept, 0, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    os.environ.update(HOME="/", USER=user, LOGNAME=user)


def require_user() -> str:
    """An ordinary user; where none can be made, the test is skipped with the reason."""
    users = make_users()
    if not users:
        pytest.skip("the suite is not root: it is itself an ordinary user, and can make no other")
    return users[0]


def interpreter_of(user: str) -> tuple[str, dict[str, str]]:
    """An interpreter that a user may run, and the variables by which it finds the packages of this one; skips the test if there is none."""
    found = find_interpreter(user)
    if found is None:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        pytest.skip(f"{user} may run no {version} that finds the packages of {sys.executable}, or may not read this checkout")
    return found


def find_interpreter(user: str) -> tuple[str, dict[str, str]] | None:
    """The same, or None. It imports torch in each interpreter that it tries."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = {"PYTHONPATH": sysconfig.get_path("purelib")}
    candidates = [(sys.executable, {}), *((str(Path(folder) / version), packages) for folder in ("/usr/local/bin", "/usr/bin"))]
    for program, variables in candidates:
        command = command_as(user, "env", *(f"{key}={value}" for key, value in variables.items()), program, "-c", _PROBE)
        if subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False).returncode == 0:
            return program, variables
    return None
