"""A process that imports the heavy packages once and forks a worker for every task, so that only the first start is slow.

    python -m jobs.local.forkserver FD [PRELOAD ...]      PRELOAD: `module` or `module:function`, which must only import

FD is an inherited end of a multiprocessing.Pipe, on which requests come and events leave as JSON:

    {"start": NAME, "task": DESCRIPTION, "index": I, "threads": N, "environment": {...}, "concurrent": M, "log": FILE}
        -> {"ended": NAME, "pid": P, "code": C or null, "signal": S or null}
    {"terminate": [NAME, ...]}  SIGTERM: the worker writes a checkpoint      {"kill": [NAME, ...]}  SIGKILL, to its children too
    {"warn": [NAME, ...]}       the signal that Slurm sends before the time limit: the same, and the worker records this reason

`concurrent`: how many other tasks may share its GPU.

When the launcher closes its end or dies, the workers are terminated, killed after a grace period, and the server exits. If the server
itself is killed, the kernel sends SIGTERM to its workers. The server has one thread, and no preloaded module may start another: after a
fork only the forking thread exists in the child.
"""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from jobs.signals import STOP_SIGNALS, WARNING_SIGNAL, StopRequest, install_handler
from jobs.store.records import prepare_decoders
from jobs.worker.main import print_line, run_task
from jobs.worker.processes import fork, kill_group, limit_threads, preload, reap
from jobs.worker.stage import WorkerProcess
from jobs.worker.task import description_from_json, load_object
from jobs.worker.team_start import work_together

GRACE_SECONDS = 20.0  # for checkpoints, after the launcher has exited
UNSTARTED = 71  # exit code of a task that could not be forked (sysexits.h: system error)


class Server:
    """Forks, signals and reaps workers; everything happens in `serve`, one event after another."""

    def __init__(self, launcher: Connection) -> None:
        self._launcher = launcher
        self._workers: dict[int, str] = {}  # pid -> name
        self._wakeup, waker = os.pipe()
        os.set_blocking(waker, False)
        os.set_blocking(self._wakeup, False)
        install_handler((signal.SIGCHLD,), lambda number, frame: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._waker = waker

    def serve(self) -> None:
        """Handle requests until the launcher closes its end."""
        open_ = True
        while open_:
            ready = wait([self._launcher, self._wakeup])
            if self._wakeup in ready:
                os.read(self._wakeup, 4096)
            self._reap()
            if self._launcher in ready:
                open_ = self._read()
        self._leave()

    def _read(self) -> bool:
        try:
            request = self._launcher.recv_bytes()
        except (EOFError, OSError):
            return False
        self._handle(json.loads(request))
        return True

    def _handle(self, request: Mapping[str, Any]) -> None:
        if "start" in request:
            self._start(request)
        for number, what in ((signal.SIGTERM, "terminate"), (WARNING_SIGNAL, "warn"), (signal.SIGKILL, "kill")):
            self._signal(number, [pid for pid, name in self._workers.items() if name in request.get(what, ())])

    def _start(self, request: Mapping[str, Any]) -> None:
        name = str(request["start"])
        # The server ignores stop signals, and so does a child until it has installed its handlers: block them, so that none is lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pid = fork(lambda: self._run_worker(request), death_signal=signal.SIGTERM)
        except OSError as error:
            print_line(f"{name}: cannot start: {error}")
            self._emit({"ended": name, "pid": 0, "code": UNSTARTED, "signal": None})
            return
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._workers[pid] = name

    def _run_worker(self, request: Mapping[str, Any]) -> int:
        """In the child: compute a task; returns its exit code."""
        signal.set_wakeup_fd(-1)
        install_handler((signal.SIGCHLD, signal.SIGHUP), signal.SIG_DFL)
        stop = StopRequest()
        stop.install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for descriptor in (self._wakeup, self._waker):
            os.close(descriptor)
        self._launcher.close()
        _redirect(request["log"])
        os.setsid()
        os.environ.update(request["environment"])
        threads, concurrent = int(request["threads"]), int(request["concurrent"])
        limit_threads(threads)
        task = description_from_json(request["task"])
        process = WorkerProcess(task, threads, print_line, stop, request["log"], lag_seconds=0.0, concurrent=lambda: concurrent)
        return work_together(process, lambda: run_task(process, int(request["index"])), {})

    def _signal(self, number: signal.Signals, pids: Sequence[int]) -> None:
        for pid in pids:  # not reaped, so the pid is still its own
            os.kill(pid, number)
            if number is signal.SIGKILL:
                kill_group(pid)

    def _reap(self) -> None:
        for pid, ended in {pid: ended for pid in self._workers if (ended := reap(pid))}.items():
            self._emit({"ended": self._workers.pop(pid), "pid": pid, "code": ended.code, "signal": ended.signal})

    def _leave(self) -> None:
        for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            self._signal(number, list(self._workers))
            deadline = time.monotonic() + patience
            while self._workers and time.monotonic() < deadline:
                self._reap()
                time.sleep(0.02)

    def _emit(self, event: Mapping[str, Any]) -> None:
        try:
            self._launcher.send_bytes(json.dumps(event).encode())
        except ConnectionError:
            print_line("the launcher has exited")  # there are no more requests either, which ends the loop


def main(arguments: Sequence[str]) -> int:
    """Serve the launcher at the other end of an inherited pipe."""
    install_handler((*STOP_SIGNALS, signal.SIGHUP), signal.SIG_IGN)  # the launcher decides when to stop; workers install their own
    preload([prepare_decoders, *(functools.partial(_load, name) for name in arguments[1:])])
    Server(Connection(int(arguments[0]))).serve()
    return 0


def _load(name: str) -> None:
    found = load_object(name)
    if callable(found):
        found()


def _redirect(log: str) -> None:
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for target in (1, 2):
        os.dup2(output, target)
    os.close(output)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # logs are read while they grow


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
