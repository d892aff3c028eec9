"""Ray for one sweep: what every process of ours sets for it, starting it on this machine, joining that of an allocation, leaving it.

Two sweeps on a machine, of one user or of two, never meet. Each has a Ray of its own, in a private folder with a short name, on ports that
the kernel chose, and behind a token: whoever reaches a port of Ray may run code as its owner otherwise. A Ray that happens to run already,
or that the environment points at, is left alone.
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
from jobs.worker.machine import Capacity

ADDRESS_VARIABLE = "RAY_ADDRESS"
OBJECT_STORE_BYTES = 80 << 20  # near the least that Ray takes: between tasks of ours go a few kilobytes
PREFIX = "ser-ray-"
# Sockets are below the folder, `ray/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store`, and AF_UNIX takes 107 bytes (103 on macOS).
MAX_FOLDER = 103 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
MAX_BASE = MAX_FOLDER - len(f"/{PREFIX}") - 8  # mkdtemp adds eight letters
UNFINISHED_SECONDS = 3600.0  # a folder without a lock is somebody's who is just making it, unless it is that old
# Loopback, and not the address that Ray takes for any machine's: a network that comes and goes does not touch a Ray of one machine.
LOOPBACK = "127.0.0.2"
_FOREIGN = re.compile(r"RAY_[A-Z]|TUNE_")  # names in lower case tune Ray's inside, and a site may have set them


def ray_environment(temp: Path, token_file: Path | None) -> dict[str, str]:
    """What every process of a sweep has in its environment before Ray is imported or started.

    `temp` is a private folder for locks and sockets, of a short name (`MAX_FOLDER`); `token_file` holds what members of this Ray prove
    themselves with (mode 0600), None: anybody who reaches its ports is one. What else is there should be cleaned first
    (`without_foreign`): variables of Ray may lead to another Ray.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)} if token_file else {"RAY_AUTH_MODE": "disabled"}
    return {
        **token,
        "RAY_TMPDIR": str(temp),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_LOG_TO_DRIVER": "0",  # stages have logs of their own
        "RAY_enable_metrics_collection": "0",  # nobody reads them, and they take a port
        "RAY_memory_monitor_refresh_ms": "0",  # it would kill by the memory of the whole machine; what runs out of memory is met by policy
        "RAY_prestart_worker_first_driver": "0",  # else one process a core, at once
        # The process that forks the stages' workers outlives a worker of Ray by the time that a checkpoint takes.
        "RAY_kill_child_processes_on_worker_exit": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard for every trial
        "TUNE_DISABLE_AUTO_INIT": "1",  # a sweep that is not inside a Ray of its own is an error, and none to be mended with any Ray
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }


def without_foreign(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a shell, a site or another Ray has set for Ray and Tune."""
    return {name: value for name, value in environment.items() if not _FOREIGN.match(name)}


def write_token(path: Path) -> Path:
    """A new secret that members of a Ray prove themselves with, in a file that its owner alone reads."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder with a short name on this machine, closed to others, and removed at the end; those of the dead are removed on the way.

    Ray opens its own folder to everybody (mode 0777): give it one below this.
    """
    base = _short_base()
    _remove_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        except RayStartError:  # its logs are there; who starts the next one removes them
            raise
        except BaseException:
            _remove(folder)
            raise
        _remove(folder)


class RayStartError(InternalError):
    """Ray did not start."""


@contextlib.contextmanager
def ray_here(capacity: Capacity, code: Path) -> Iterator[None]:
    """A Ray of our own on this machine while the block lasts, with what `capacity` says, for workers that import from `code`.

    However the block ends, no process and no folder of it is left.
    """
    with private_folder() as folder, _environment(ray_environment(folder, write_token(folder / "token")), without=_FOREIGN):
        paths = [str(code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        # Ray counts GPUs; these are their names. Its workers have both from the processes that are started now.
        workers = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "CUDA_VISIBLE_DEVICES": ",".join(capacity.gpus)}
        try:
            with _environment(workers), _sessions_apart():
                _start(folder, capacity)
            yield
        finally:
            _leave()


@contextlib.contextmanager
def ray_joined(address: str = "") -> Iterator[None]:
    """Membership in a Ray that is there, by default the one that the environment names, while the block lasts.

    The environment is `ray_environment` of that Ray's token.
    """
    address = address or os.environ.get(ADDRESS_VARIABLE, "")
    if not address:
        raise InternalError(f"no Ray to join: {ADDRESS_VARIABLE} is not set")
    try:
        try:
            _init(address=address)
        except Exception as error:
            raise RayStartError(f"cannot join the Ray at {address}: {_one_line(error)}") from error
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
        raise RayStartError(f"Ray did not start: {_one_line(error)}; its logs: {home / 'session_latest' / 'logs'}") from error


def _init(**options: object) -> None:
    from ray import init
    from ray._private import worker
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    # Read once a process, and this one may have had another Ray before.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    worker._worker_logs_enabled = False  # a worker that died would be told of on our stdout, whatever `log_to_driver` says
    with _own_handlers():
        init(log_to_driver=False, logging_level=logging.CRITICAL, **options)


def _leave() -> None:
    """Leave Ray, and end what was started of it; does nothing where there is nothing to leave. A second Ctrl-C does not cut it short."""
    ray = sys.modules.get("ray")
    if ray is None:
        return
    with _own_handlers(ignored=True):
        ray.shutdown(wait_for_processes=True)


@contextlib.contextmanager
def _own_handlers(*, ignored: bool = False) -> Iterator[None]:
    """Ray sets a handler for SIGTERM: put back what was there. `ignored`: these signals do nothing meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with restored_handlers(INTERRUPT_SIGNALS):
        if ignored:
            install_handler(INTERRUPT_SIGNALS, signal.SIG_IGN)
        yield


@contextlib.contextmanager
def _sessions_apart() -> Iterator[None]:
    """What Ray starts while the block lasts leads a session of its own.

    What a terminal that closes, `timeout` or systemd sends to a whole group is for this process to act on: it would end Ray's processes
    before the stages have left, and Ray ends this process then.
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
    """This process's environment has `wanted` while the block lasts, and nothing of a name that `without` matches beside it."""
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
    """The folder for temporary files, unless its name is too long for sockets below it."""
    for name in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - the folder made there is private
        if len(os.fsencode(name)) <= MAX_BASE and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    raise InternalError(f"no folder for Ray's sockets: set TMPDIR to one that can be written and whose name has at most {MAX_BASE} letters")


def _remove_abandoned(base: Path) -> None:
    """Folders of processes that were killed: their locks are free."""
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
    for _ in range(3):  # a process of Ray that is just ending may still write
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.2)


def _one_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
