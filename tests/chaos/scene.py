"""Faults injected into a running grid: each acts once on real processes and returns whether it found a target."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm_cluster.cluster import Cluster

AWAY_SECONDS = (1.0, 6.0)  # how long a node or slurmctld stays away


@dataclass
class Scene:
    """The grid that is disturbed."""

    cluster: Cluster
    source: Path  # source tree of the run
    results: Path
    random: random.Random
    down: dict[str, float] = field(default_factory=dict)  # node -> when it comes back, monotonic seconds
    hand: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def processes(self, *words: str) -> list[int]:
        """Processes of this run whose command line holds all of `words`, on whatever node they are."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().decode(errors="replace")
                    if str(self.results) in line and all(word in line for word in words) and int(entry.name) != os.getpid():
                        found.append(int(entry.name))
        return found

    def kill_one(self, *words: str) -> bool:
        """SIGKILL one of those processes."""
        found = self.processes(*words)
        if not found:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(found), signal.SIGKILL)
        return True

    def start_pass(self) -> subprocess.Popen[bytes]:
        """Start a pass of the controller by hand, beside everything else that runs."""
        command = [sys.executable, "launch.py", "reconcile", "chaos", "--results", str(self.results)]
        with (self.results.parent / "by-hand.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.source, stdout=log, stderr=log, env=dict(self.cluster.environment))
        self.hand = [*(each for each in self.hand if each.poll() is None), process]
        return process


def kill_worker(scene: Scene) -> bool:
    return scene.kill_one("launch.py", "worker", "tasks")


def kill_step(scene: Scene) -> bool:
    """SIGKILL a whole step through Slurm."""
    jobs = running_elements(scene)
    if not jobs:
        return False
    quietly(scene, "scancel", "--signal=KILL", "--full", scene.random.choice(jobs))
    return True


def kill_link(scene: Scene) -> bool:
    """SIGKILL the controller that Slurm runs."""
    return scene.kill_one("launch.py", "control")


def kill_pass(scene: Scene) -> bool:
    """Start a pass by hand and SIGKILL it somewhere in the middle."""
    process = scene.start_pass()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(scene.random.uniform(0.05, 1.5))
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    return True


def second_pass(scene: Scene) -> bool:
    """Two controllers at once: a pass by hand beside the chain's."""
    scene.start_pass()
    return True


def kill_node(scene: Scene) -> bool:
    """Power a node off; Slurm is informed, as by a health check, or detects it itself."""
    up = [node for node in scene.cluster.settings.node_names if node not in scene.down]
    if len(up) < 2:
        return False
    node = scene.random.choice(up)
    scene.cluster.kill_node(node)
    scene.down[node] = time.monotonic() + scene.random.uniform(*AWAY_SECONDS)
    quietly(scene, "scontrol", "update", f"nodename={node}", "state=down", "reason=power")
    return True


def kill_slurmctld(scene: Scene) -> bool:
    """SIGKILL slurmctld: it loses the last second or two; start it again after a while."""
    scene.cluster.stop_controller(signal.SIGKILL)
    time.sleep(scene.random.uniform(*AWAY_SECONDS) / 2)
    scene.cluster.start_controller()
    return True


def requeue_element(scene: Scene) -> bool:
    jobs = running_elements(scene)
    if not jobs:
        return False
    quietly(scene, "scontrol", "requeue", scene.random.choice(jobs))
    return True


def deafen_slurmctld(scene: Scene) -> bool:
    """Suspend slurmctld for a moment."""
    scene.cluster.pause_controller()
    time.sleep(scene.random.uniform(1.0, 4.0))
    scene.cluster.resume_controller()
    return True


def tear_result(scene: Scene) -> bool:
    """Truncate a result: it then counts neither as success nor as failure."""
    found = [path for path in scene.results.glob("store/finetune/*/result.json") if path.stat().st_size]
    if not found:
        return False
    path = scene.random.choice(found)
    path.write_bytes(path.read_bytes()[: scene.random.randrange(0, 200)])
    return True


FAULTS: dict[str, tuple[Callable[[Scene], bool], int]] = {  # name -> what to do, how often relative to the others
    "worker killed": (kill_worker, 8),
    "step killed": (kill_step, 4),
    "controller killed": (kill_link, 4),
    "pass by hand killed": (kill_pass, 5),
    "second controller": (second_pass, 3),
    "node powered off": (kill_node, 3),
    "slurmctld killed": (kill_slurmctld, 2),
    "element requeued": (requeue_element, 4),
    "slurmctld deaf": (deafen_slurmctld, 1),
    "result torn": (tear_result, 1),
}


def running_elements(scene: Scene) -> list[str]:
    """Array elements that run now."""
    lines = quietly(scene, "squeue", "-h", "-t", "running", "-o", "%i").split()
    return [line for line in lines if "_" in line]


def restore(scene: Scene, *, everything: bool = False) -> None:
    """Restart what has been down long enough, and resume nodes that Slurm has drained, as an administrator does.

    A slurmctld that was killed forgets its last second; where a node then reports a job that it does not know, the node is drained.
    """
    for node, until in list(scene.down.items()):
        if everything or time.monotonic() > until:
            scene.cluster.start_node(node)
            del scene.down[node]
    for line in quietly(scene, "sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines():
        node, _, state = line.partition(" ")
        if node not in scene.down and state.startswith(("drain", "down")):
            quietly(scene, "scontrol", "update", f"nodename={node}", "state=resume")


def quietly(scene: Scene, *command: str) -> str:
    """Output of a client command; "" if Slurm does not answer."""
    with contextlib.suppress(subprocess.SubprocessError):
        return scene.cluster.run(*command, check=False, timeout=15)
    return ""
