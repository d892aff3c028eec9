"""The Ray cluster of one sweep: its environment variables, starting it on this machine, joining that of an allocation, and shutting down.

Sweeps on the same machine are isolated. Each has its own Ray in a private folder with a short name, on ports chosen by the kernel, and
with a token: without one, anyone who can connect to a port of Ray can run code as its owner. Other Ray clusters, running or named by the
environment, are not used.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import math
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from jobs.errors import InternalError
from jobs.signals import INTERRUPT_SIGNALS, install_handler, restored_handlers
from jobs.text import first_line
from jobs.worker.machine import Capacity

ADDRESS_VARIABLE = "RAY_ADDRESS"
OBJECT_STORE_BYTES = 80 << 20  # close to the minimum of Ray: tasks exchange a few kilobytes
PREFIX = "ser-ray-"
# Sockets are below the folder, `ray/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store`, and AF_UNIX takes 107 bytes (103 on macOS).
MAX_FOLDER = 103 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
MAX_BASE = MAX_FOLDER - len(f"/{PREFIX}") - 8  # mkdtemp adds eight letters
UNFINISHED_SECONDS = 3600.0  # a folder without a lock may be just being created, unless it is older
# A loopback address instead of Ray's default: a Ray on one machine does not depend on the network.
LOOPBACK = "127.0.0.2"
_RAY_VARIABLE = re.compile(r"RAY_[A-Z]|TUNE_")  # variables in lower case configure Ray's internals, and a site may have set them


def ray_environment(temp: Path, token_file: Path | None) -> dict[str, str]:
    """Environment variables of every process of a sweep, set before Ray is imported or started.

    `temp` is a private folder for locks and sockets with a short name (`MAX_FOLDER`); `token_file` has the secret of this Ray (mode 0600),
    None: no authentication. Other variables of Ray should be removed first (`without_ray_variables`): they may point to another Ray.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)} if token_file else {"RAY_AUTH_MODE": "disabled"}
    return {
        **token,
        "RAY_TMPDIR": str(temp),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_LOG_TO_DRIVER": "0",  # stages have their own logs
        "RAY_enable_metrics_collection": "0",  # not used, and needs a port
        "RAY_memory_monitor_refresh_ms": "0",  # it kills by the memory of the whole machine; the failure policy handles out-of-memory
        "RAY_prestart_worker_first_driver": "0",  # otherwise one process per core at once
        # The fork server of the stages outlives its Ray worker until checkpoints are written.
        "RAY_kill_child_processes_on_worker_exit": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files per trial
        "TUNE_DISABLE_AUTO_INIT": "1",  # a sweep outside of its own Ray is an error; do not start another Ray
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }


def without_ray_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without variables of Ray and Tune, set by a shell, a site or another Ray."""
    return {name: value for name, value in environment.items() if not _RAY_VARIABLE.match(name)}


def write_token(path: Path) -> Path:
    """Write a new secret of a Ray cluster to a file with mode 0600."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A private temporary folder with a short name, removed at the end. Also removes folders of processes that were killed.

    Ray makes its own folder accessible to everybody (mode 0777): use a subfolder.
    """
    base = _short_base()
    _remove_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        except RayStartError:  # keep its logs; the next call removes them
            raise
        except BaseException:
            _remove(folder)
            raise
        _remove(folder)


class RayStartError(InternalError):
    """Ray did not start."""


@contextlib.contextmanager
def ray_here(capacity: Capacity, code: Path) -> Iterator[None]:
    """Run a Ray on this machine with the resources of `capacity`, for workers that import from `code`.

    However the block ends, its processes and its folder are removed.
    """
    with private_folder() as folder, _environment(ray_environment(folder, write_token(folder / "token")), without=_RAY_VARIABLE):
        paths = [str(code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        # Ray counts GPUs; these are their ids. Ray's workers inherit both from the processes started now.
        workers = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "CUDA_VISIBLE_DEVICES": ",".join(capacity.gpus)}
        try:
            with _environment(workers), _sessions_apart():
                _start(folder, capacity)
            yield
        finally:
            _leave()


@contextlib.contextmanager
def ray_joined(address: str = "") -> Iterator[None]:
    """Connect to a running Ray, by default at `RAY_ADDRESS`. The environment must be `ray_environment` with its token."""
    address = address or os.environ.get(ADDRESS_VARIABLE, "")
    if not address:
        raise InternalError(f"no Ray to join: {ADDRESS_VARIABLE} is not set")
    try:
        try:
            _init(address=address)
        except Exception as error:
            raise RayStartError(f"cannot join the Ray at {address}: {first_line(error)}") from error
        yield
    finally:
        _leave()


def _start(folder: Path, capacity: Capacity) -> None:
    home = folder / "ray"
    where = {"_node_ip_address": LOOPBACK} if sys.platform == "linux" else {}
    try:
        _init(
            address="local",
            num_cpus=capacity.cpus,
            num_gpus=len(capacity.gpus),
            _memory=int(capacity.memory_gb * 2**30) if math.isfinite(capacity.memory_gb) else None,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=str(home),
            **where,
        )
    except Exception as error:
        raise RayStartError(f"Ray did not start: {first_line(error)}; its logs: {home / 'session_latest' / 'logs'}") from error


def _init(**options: object) -> None:
    from ray import init
    from ray._private import worker
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    # Ray reads these once per process, and this process may have used another Ray before.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    worker._worker_logs_enabled = False  # otherwise a dead worker is reported on stdout in spite of `log_to_driver`
    with _own_handlers():
        init(log_to_driver=False, logging_level=logging.CRITICAL, **options)


def _leave() -> None:
    """Shut Ray down if it was imported. Ignores signals meanwhile."""
    ray = sys.modules.get("ray")
    if ray is None:
        return
    with _own_handlers(ignored=True):
        ray.shutdown(wait_for_processes=True)


@contextlib.contextmanager
def _own_handlers(*, ignored: bool = False) -> Iterator[None]:
    """Restore the signal handlers, as Ray sets one for SIGTERM. `ignored`: ignore the signals meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with restored_handlers(INTERRUPT_SIGNALS):
        if ignored:
            install_handler(INTERRUPT_SIGNALS, signal.SIG_IGN)
        yield


@contextlib.contextmanager
def _sessions_apart() -> Iterator[None]:
    """Start Ray's processes in new sessions.

    Signals to the process group (a closed terminal, `timeout`, systemd) are handled by this process: they would kill Ray's processes
    before the stages have written checkpoints, and Ray would then kill this process.
    """
    from ray._private import services

    plain = services.ConsolePopen
    services.ConsolePopen = functools.partial(plain, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = plain


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str], *, without: re.Pattern[str] | None = None) -> Iterator[None]:
    """Set environment variables for the block, and remove other variables whose name matches `without`."""
    removed = [name for name in os.environ if without and without.match(name)]
    former = {name: os.environ.get(name) for name in (*removed, *wanted)}
    for name in removed:
        del os.environ[name]
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _short_base() -> Path:
    """A temporary folder whose name is short enough for sockets below it."""
    for name in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - the folder made there is private
        if len(os.fsencode(name)) <= MAX_BASE and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    raise InternalError(f"no folder for Ray's sockets: set TMPDIR to one that can be written and whose name has at most {MAX_BASE} letters")


def _remove_abandoned(base: Path) -> None:
    """Remove folders of processes that were killed: their locks are free."""
    for folder in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            if (folder / "lock").exists():
                with (folder / "lock").open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(folder)
            elif time.time() - folder.stat().st_mtime > UNFINISHED_SECONDS:
                _remove(folder)


def _remove(folder: Path) -> None:
    for _ in range(3):  # an ending process of Ray may still write
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.2)
