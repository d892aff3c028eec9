"""Concurrent stages of one task: on one GPU, in the memory and on the cores of one array task.

The process that was started for the task becomes the packer. It forks a child for every stage, so that each has its own CUDA context and
running out of memory ends one stage only; forwards stop signals; and computes nothing itself. Each child claims its attempt, keeps its
heartbeat and publishes its result like a worker with a single stage, and writes to the same log. No child outlives the packer.

The number of concurrent stages is `Description.at_once`, or, if that is 0, what fits by the peak memory of a finished stage of the same
kind (jobs.worker.memory); until one has finished, one. A stage that runs out of memory beside others fails with the class `crowded`: fewer
stages then run concurrently, and it is retried with no other stage beside it, in this task and in every later one.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from signal import SIGKILL

from jobs.experiment.graph import Node
from jobs.store.failures import FailureClass
from jobs.store.layout import StageFolder
from jobs.store.records import read_outcome
from jobs.worker.deaths import RECORDED_EXITS, attempt_of, class_of_death, oom_kills, record_death
from jobs.worker.memory import Room, how_many_fit, larger_peak, measured_peak, room_here, was_crowded
from jobs.worker.processes import FORKABLE, Exit, fork, kill_group, limit_threads, preload, reap
from jobs.worker.stage import Verdict, WorkerProcess, execute
from jobs.worker.task import load_registry

POLL_SECONDS = 0.05


def run_packed(process: WorkerProcess, nodes: Sequence[Node], room: Room | None = None) -> int:
    """Compute stages concurrently, each in a child process; returns the exit code of the task (see jobs.worker.main)."""
    os.environ.update(FORKABLE)
    preload([lambda: getattr(load_registry(process.place), "preload", lambda: None)()])
    return Packer(process, nodes, room or room_here(process.threads)).run()


@dataclass(frozen=True)
class _Child:
    node: Node
    slot: int  # index into the table of concurrent stages
    alone: bool  # no other stage may start beside it
    oom_kills: int | None  # the kernel's count when it started


class Packer:
    """Forks and reaps children; everything happens in `run`."""

    def __init__(self, process: WorkerProcess, nodes: Sequence[Node], room: Room) -> None:
        self._process = process
        self._room = room
        self._waiting_alone = deque(node for node in nodes if was_crowded(process.folder(node)))
        self._waiting = deque(node for node in nodes if node not in self._waiting_alone)
        self._most = process.description.at_once or len(nodes)
        self._measures = process.description.at_once == 0
        self._peak = measured_peak(self._siblings(nodes[0].stage)) if self._measures else None
        self._running: dict[int, _Child] = {}  # by pid
        # Shared with the children: per start, the most stages that ran beside it. A stage is started twice at the most.
        self._concurrent = memoryview(mmap.mmap(-1, 4 * 2 * len(nodes))).cast("I")
        self._started = 0
        self._code = 0
        self._stopping = False  # the stop signal was forwarded

    def run(self) -> int:
        """Return when every stage was tried, or after a stop signal when all children have exited."""
        try:
            while self._running or self._waiting or self._waiting_alone:
                if self._process.stop():
                    self._stop()
                else:
                    self._start()
                if self._running and not self._reap():
                    time.sleep(POLL_SECONDS)
        finally:
            self._kill()
        return self._code

    def _siblings(self, stage: str) -> Iterable[tuple[StageFolder, str]]:
        nodes = (node for node in self._process.description.nodes.values() if node.stage == stage)
        return ((self._process.folder(node), node.key) for node in nodes)

    def _limit(self) -> int:
        """How many stages may run now."""
        if not self._measures:
            return self._most
        return min(self._most, how_many_fit(self._peak, self._room) if self._peak else 1)

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._limit() and not any(child.alone for child in self._running.values()):
            if not self._fork(self._waiting.popleft(), alone=False):
                return
        if self._waiting_alone and not self._waiting and not self._running:
            self._fork(self._waiting_alone.popleft(), alone=True)

    def _fork(self, node: Node, *, alone: bool) -> bool:
        """Start a stage; False if no other process can be forked now."""
        share = 1 if alone else min(self._limit(), len(self._running) + len(self._waiting) + 1)
        threads = max(1, self._room.threads // share)
        child = _Child(node, self._started, alone, oom_kills())
        self._concurrent[child.slot] = len(self._running)
        try:
            pid = fork(lambda: self._compute(child, threads), death_signal=SIGKILL)
        except OSError as error:
            self._process.report(f"{node.name}: cannot start: {error}")
            if self._running:
                self._most = len(self._running)
                self._waiting.appendleft(node)
            else:
                self._set_code(1)
            return False
        self._started += 1
        self._running[pid] = child
        for each in self._running.values():
            self._concurrent[each.slot] = max(self._concurrent[each.slot], len(self._running) - 1)
        return True

    def _compute(self, child: _Child, threads: int) -> int:
        """In the child: compute its stage; returns its exit code. The handlers of stop signals are inherited."""
        os.setsid()  # the processes it starts can then be killed with it
        limit_threads(threads)
        name, parent_report = child.node.name, self._process.report

        def report(text: str) -> None:
            for line in text.splitlines():  # the log is shared: every line names its stage
                parent_report(line if line.startswith(name) else f"{name}: {line}")

        own = replace(self._process, threads=threads, report=report, concurrent=lambda: self._concurrent[child.slot])
        verdict = execute(own, child.node)
        report(verdict.value)
        return verdict.exit_code

    def _stop(self) -> None:
        """Forward the stop signal, once, and start no further stage."""
        if not self._stopping:
            for pid in self._running:  # not reaped, so the pid is still its own
                os.kill(pid, self._process.stop.signal)
            self._stopping = True
        for waiting in (self._waiting, self._waiting_alone):
            while waiting:
                self._process.report(f"{waiting.popleft().name}: {Verdict.interrupted.value}")
                self._set_code(Verdict.interrupted.exit_code)

    def _reap(self) -> bool:
        """Handle the children that have ended; False if none has."""
        ended = {pid: how for pid in self._running if (how := reap(pid))}
        for pid, how in ended.items():
            child = self._running.pop(pid)
            try:
                self._handle_exit(pid, child, how)
            except OSError as error:  # a full disk, or a shared folder that is unavailable: the other stages continue
                self._process.report(f"{child.node.name}: its outcome cannot be read or written: {error}")
                self._set_code(1)
        return bool(ended)

    def _handle_exit(self, pid: int, child: _Child, ended: Exit) -> None:
        folder = self._process.folder(child.node)
        if ended.code not in RECORDED_EXITS:
            self._record_death(folder, pid, child, ended)
        outcome = read_outcome(attempt) if (attempt := attempt_of(folder, pid)) else None
        if outcome is not None and outcome.kind == FailureClass.crowded.name and not child.alone:
            self._most = max(1, min(self._limit(), len(self._running) + 1) // 2)
            self._waiting_alone.append(child.node)
            self._process.report(
                f"{child.node.name}: out of memory beside other stages; retried alone, at most {self._most} others at once"
            )
            return
        if self._measures and ended.code == 0:
            self._peak = larger_peak(self._peak, measured_peak([(folder, child.node.key)]))
        interrupted = ended.code is None and self._stopping
        self._set_code(Verdict.interrupted.exit_code if interrupted else ended.code if ended.code in RECORDED_EXITS else 1)

    def _record_death(self, folder: StageFolder, pid: int, child: _Child, ended: Exit) -> None:
        kills = oom_kills()
        killed = child.oom_kills is None or kills is None or kills > child.oom_kills
        failure = class_of_death(ended.signal, stopping=self._stopping, concurrent=self._concurrent[child.slot], oom_killed=killed)
        record_death(folder, child.node, pid, failure, ended, self._process.log)
        how = f"was killed by signal {ended.signal}" if ended.signal else f"exited with code {ended.code}"
        self._process.report(f"{child.node.name}: its process {how}")

    def _set_code(self, code: int | None) -> None:
        self._code = self._code if self._code == 1 else code or self._code

    def _kill(self) -> None:
        """Children are left here only after an error of the packer itself."""
        for pid in self._running:
            os.kill(pid, SIGKILL)
            kill_group(pid)
            os.waitpid(pid, 0)
