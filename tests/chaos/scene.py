"""The grid that is disturbed: its processes and jobs, what is to be repaired later, and the count of the faults that struck."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm_cluster.cluster import Cluster

PATIENCE_SECONDS = 12.0  # for which a fault waits for its target, a link that makes its pass


@dataclass
class Deferred:
    """An action that is tried from `due` to `until` until it returns True; times in seconds of the monotonic clock."""

    due: float
    until: float
    action: Callable[[], bool]
    kind: str = ""  # fault to count when it has succeeded; "": a repair


@dataclass
class Scene:
    """A running grid on a test cluster."""

    cluster: Cluster
    source: Path  # source tree of the run
    results: Path
    control: Path  # folder of tests.chaos.injection
    counts: Counter[str] = field(default_factory=Counter)
    begun: float = field(default_factory=time.monotonic)
    away: bool = False  # slurmctld is stopped
    absent: set[str] = field(default_factory=set)  # nodes that are off, or whose slurmd is stopped
    mounted: set[str] = field(default_factory=set)  # nodes on which the results folder is covered
    zombies: list[tuple[str, float, float]] = field(default_factory=list)  # node, from, to: time of the boot-time clock
    lapses: list[tuple[float, float]] = field(default_factory=list)  # from, to, likewise: a killed slurmctld has lost its last seconds
    deferred: list[Deferred] = field(default_factory=list)
    hand: list[subprocess.Popen[bytes]] = field(default_factory=list)

    # ---- faults

    def count(self, kind: str) -> None:
        """Count a fault that struck, and print it."""
        self.counts[kind] += 1
        sys.stdout.write(f"{time.monotonic() - self.begun:6.1f} s  {self.total:4}  {kind}\n")
        sys.stdout.flush()

    @property
    def total(self) -> int:
        return self.counts.total()

    def later(self, seconds: float, repair: Callable[[], object]) -> None:
        """Repair something after some seconds."""
        moment = time.monotonic() + seconds

        def repaired() -> bool:
            repair()
            return True

        self.deferred.append(Deferred(moment, moment, repaired))

    def pursue(self, kind: str, seconds: float, fault: Callable[[], bool], patience: float = PATIENCE_SECONDS) -> None:
        """Try to inject a fault from `seconds` on, for `patience` seconds, and count it if that succeeds."""
        moment = time.monotonic() + seconds
        self.deferred.append(Deferred(moment, moment + patience, fault, kind))

    def work(self, *, everything: bool = False) -> None:
        """Do what is due; `everything`: all repairs, and no further fault."""
        now = time.monotonic()
        for each in list(self.deferred):
            if not (everything or now >= each.due):
                continue
            if each.kind and everything:
                self.deferred.remove(each)
            elif each.action():
                self.deferred.remove(each)
                if each.kind:
                    self.count(each.kind)
            elif now > each.until:
                self.deferred.remove(each)

    # ---- processes

    def processes(self, *words: str) -> list[int]:
        """Processes of this run whose command line holds all of `words`, on whatever node they are, oldest first."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().decode(errors="replace")
                    if str(self.results) in line and all(word in line for word in words) and int(entry.name) != os.getpid():
                        found.append(int(entry.name))
        return sorted(found)

    def workers(self) -> list[int]:
        return self.processes("python", "launch.py", "worker", "tasks")

    def variable_of_workers(self, name: str) -> list[str]:
        """Values of an environment variable of the workers, such as the numbers of their jobs."""
        found: set[str] = set()
        for pid in self.workers():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                found.update(word.partition("=")[2] for word in words if word.startswith(f"{name}="))
        return sorted(found)

    def kill_one(self, drawn: random.Random, found: list[int]) -> bool:
        """SIGKILL one of those processes."""
        if not found:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(drawn.choice(found), signal.SIGKILL)
            return True
        return False

    def start_pass(self) -> subprocess.Popen[bytes]:
        """Start a pass of the controller by hand, beside everything else that runs."""
        command = [sys.executable, "launch.py", "reconcile", "chaos", "--results", str(self.results)]
        with (self.results.parent / "by-hand.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.source, stdout=log, stderr=log, env=dict(self.cluster.environment))
        self.hand = [*(each for each in self.hand if each.poll() is None), process]
        return process

    # ---- Slurm

    def quietly(self, *command: str, user: str = "") -> str:
        """Output of a client command; "" if Slurm does not answer."""
        if self.away:
            return ""
        with contextlib.suppress(subprocess.SubprocessError):
            return self.cluster.run(*command, check=False, timeout=10, user=user)
        return ""

    def succeeds(self, *command: str, user: str = "") -> bool:
        """Whether a client command was carried out."""
        if self.away:
            return False
        with contextlib.suppress(subprocess.SubprocessError):
            self.cluster.run(*command, timeout=10, user=user)
            return True
        return False

    def running_elements(self) -> list[str]:
        """Array elements that run now."""
        return [line for line in self.quietly("squeue", "-h", "-t", "running", "-o", "%i").split() if "_" in line]

    def waiting_link(self) -> str:
        """Job id of the link that makes the next pass; "" if there is none."""
        lines = [line.split() for line in self.quietly("squeue", "-h", "-t", "pending", "-o", "%i %j").splitlines()]
        links = sorted(int(words[0]) for words in lines if len(words) == 2 and ".control." in words[1] and words[0].isdigit())
        return str(links[0]) if links else ""

    def excluded_nodes(self, job: str) -> list[str]:
        """Nodes on which a job may not start."""
        listed = self.quietly("squeue", "-h", "-j", job, "-o", "%x")
        return self.quietly("scontrol", "show", "hostnames", listed).split() if listed else []

    def busy_nodes(self) -> list[str]:
        """Nodes with a worker that no fault has taken away; none if fewer than three nodes are left."""
        here = [node for node in self.cluster.settings.node_names if node not in self.absent]
        return [node for node in self.variable_of_workers("SLURMD_NODENAME") if node in here] if len(here) > 2 else []

    def resume_nodes(self) -> None:
        """Resume nodes that Slurm has drained, as an administrator does.

        A slurmctld that was killed forgets its last second; where a node then reports a job that it does not know, the node is drained.
        """
        for line in self.quietly("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines():
            node, _, state = line.partition(" ")
            if node not in self.absent and state.startswith(("drain", "down")):
                self.quietly("scontrol", "update", f"nodename={node}", "state=resume")


def boot_seconds() -> float:
    """Seconds since the machine was started, the same on all nodes of a test cluster."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
