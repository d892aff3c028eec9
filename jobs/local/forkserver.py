"""A process that imports the heavy packages once and forks a worker for every task, so that only the first start is slow.

    python -m jobs.local.forkserver [PRELOAD ...]      PRELOAD: `module` or `module:function`, which must only import

Requests come as JSON lines on stdin, events leave as JSON lines on stdout:

    {"start": NAME, "task": DESCRIPTION, "index": I, "threads": N, "environment": {...}, "beside": M, "lag": L, "log": FILE}
        -> {"started": NAME, "pid": P} ... {"ended": NAME, "pid": P, "code": C or null, "signal": S or null}
    {"terminate": [NAME, ...]}  SIGTERM, the worker writes a checkpoint      {"kill": [NAME, ...]}  SIGKILL, its children too

When stdin ends, because the launcher closed it or died, the workers are terminated, after a grace killed, and the server leaves.
Should the server itself be killed, the kernel sends its workers SIGTERM. The server has one thread, and nothing it preloads may start
another: only the forking thread lives on in a child.
"""

from __future__ import annotations

import gc
import io
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from jobs.signals import STOP_SIGNALS, StopRequest
from jobs.store.records import prepare_decoders
from jobs.worker.main import run_task, say
from jobs.worker.processes import die_with, end_child, kill_group, limit_threads
from jobs.worker.stage import WorkerProcess
from jobs.worker.task import description_from_json, load_object
from jobs.worker.team_start import work_together

GRACE_SECONDS = 20.0  # for checkpoints, when the launcher is gone
UNSTARTED = 71  # exit code of a task that could not be forked (sysexits.h: system error)


class Server:
    """Forks, signals and reaps workers; everything happens in `serve`, one event after another."""

    def __init__(self, requests: BinaryIO, events: BinaryIO) -> None:
        self._requests = requests
        self._events = events
        self._workers: dict[int, str] = {}  # pid -> name
        self._partial = b""
        self._wakeup, waker = os.pipe()
        os.set_blocking(waker, False)
        os.set_blocking(self._wakeup, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._waker = waker

    def serve(self) -> None:
        """Until stdin ends."""
        self._emit({"ready": os.getpid()})
        with selectors.DefaultSelector() as selector:
            selector.register(self._requests, selectors.EVENT_READ)
            selector.register(self._wakeup, selectors.EVENT_READ)
            open_ = True
            while open_:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wakeup in ready:
                    os.read(self._wakeup, 4096)
                self._reap()
                if self._requests in ready:
                    open_ = self._read()
        self._leave()

    def _read(self) -> bool:
        received = os.read(self._requests.fileno(), 1 << 20)
        *lines, self._partial = (self._partial + received).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
        return bool(received)

    def _obey(self, request: Mapping[str, Any]) -> None:
        if "start" in request:
            self._start(request)
        for number, names in ((signal.SIGTERM, request.get("terminate", ())), (signal.SIGKILL, request.get("kill", ()))):
            self._signal(number, [pid for pid, name in self._workers.items() if name in names])

    def _start(self, request: Mapping[str, Any]) -> None:
        name = str(request["start"])
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        # A stop signal that comes before the worker listens must wait for it: the server ignores it, and so would the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_worker(request, parent)
        except OSError as error:
            say(f"{name}: cannot start: {error}")
            self._emit({"ended": name, "pid": 0, "code": UNSTARTED, "signal": None})
            return
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._workers[pid] = name
        self._emit({"started": name, "pid": pid})

    def _become_worker(self, request: Mapping[str, Any], parent: int) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            stop = StopRequest()
            stop.listen()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            for descriptor in (self._wakeup, self._waker, self._events.fileno()):
                os.close(descriptor)
            _redirect(request["log"])
            os.setsid()
            die_with(parent, signal.SIGTERM)
            os.environ.update(request["environment"])
            code = _work(request, stop)
        except BaseException:
            traceback.print_exc()
        finally:
            end_child(code)

    def _signal(self, number: signal.Signals, pids: Sequence[int]) -> None:
        for pid in pids:  # a pid stays ours until it is reaped, so it cannot be somebody else's
            os.kill(pid, number)
            if number is signal.SIGKILL:
                kill_group(pid)

    def _reap(self) -> None:
        while self._workers:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            kill_group(ended.si_pid)  # while its pid is still taken
            pid, status = os.waitpid(ended.si_pid, 0)
            name = self._workers.pop(pid, None)
            if name is None:
                continue
            killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            code = None if killed else os.WEXITSTATUS(status)
            self._emit({"ended": name, "pid": pid, "code": code, "signal": killed})

    def _leave(self) -> None:
        for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            self._signal(number, list(self._workers))
            deadline = time.monotonic() + patience
            while self._workers and time.monotonic() < deadline:
                self._reap()
                time.sleep(0.02)

    def _emit(self, event: Mapping[str, Any]) -> None:
        try:
            self._events.write(json.dumps(event).encode() + b"\n")
            self._events.flush()
        except BrokenPipeError:
            say("the launcher is gone")  # stdin ends as well: the loop leaves by itself


def main(preload: Sequence[str]) -> int:
    """Serve on stdin and stdout; whatever else is printed goes to stderr."""
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the launcher decides when to stop; workers set their own
    prepare_decoders()
    for name in preload:
        _preload(name)
    gc.collect()
    gc.freeze()  # what is loaded stays shared between the workers: the collector does not write into its pages
    with os.fdopen(0, "rb", buffering=0, closefd=False) as requests:
        Server(requests, events).serve()
    return 0


def _preload(name: str) -> None:
    try:
        found = load_object(name)
        if callable(found):
            found()
    except Exception:  # the stages that need it will say so, each in its own record
        traceback.print_exc()


def _work(request: Mapping[str, Any], stop: StopRequest) -> int:
    threads, beside = int(request["threads"]), int(request["beside"])  # M: as many others may share its GPU
    limit_threads(threads)
    task, lag = description_from_json(request["task"]), float(request["lag"])  # L: seconds that a folder may hide things
    process = WorkerProcess(task, threads, say, stop, request["log"], lag_seconds=lag, beside=lambda: beside)
    return work_together(process, lambda: run_task(process, int(request["index"])), {})


def _redirect(log: str) -> None:
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(nothing)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # a log is read while it grows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
