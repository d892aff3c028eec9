"""Faults of Slurm and its nodes: power cuts, nodes that are cut off and compute on, a slurmctld that is away, jobs that others end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

from tests.chaos.scene import Scene, boot_seconds
from tests.slurm_cluster.users import make_users

AWAY_SECONDS = (1.0, 6.0)  # how long a node or slurmctld stays away
ZOMBIE_SECONDS = (4.0, 12.0)  # how long a node that was cut off computes on
AFTERMATH_SECONDS = 15.0  # until the processes of such a node, or of a job that is not known, have been ended


def power_off(scene: Scene, drawn: random.Random) -> bool:
    """Power a node off; Slurm is informed, as by a health check, or detects it itself."""
    nodes = scene.busy_nodes()
    if not nodes:
        return False
    node = drawn.choice(nodes)
    scene.cluster.kill_node(node)
    scene.absent.add(node)

    def start() -> None:
        scene.cluster.start_node(node)
        scene.absent.discard(node)

    scene.later(drawn.uniform(*AWAY_SECONDS), start)
    if drawn.random() < 0.7:
        _report_down(scene, node)
    return True


def cut_off(scene: Scene, drawn: random.Random) -> bool:
    """Kill slurmd alone: Slurm takes the node for lost and requeues its jobs, whose processes live and write on until slurmd is back."""
    nodes = scene.busy_nodes()
    if not nodes or scene.away:
        return False
    node = drawn.choice(nodes)
    init = scene.cluster.processes.get(f"init-{node}")
    daemons = _slurmd_of(init.pid) if init else []
    if init is None or not daemons:
        return False
    for daemon in daemons:
        os.kill(daemon, signal.SIGKILL)
    scene.absent.add(node)
    seconds = drawn.uniform(*ZOMBIE_SECONDS)
    begun = boot_seconds()
    scene.zombies.append((node, begun, begun + seconds + AFTERMATH_SECONDS))

    def start() -> None:
        init.send(signal.SIGUSR1)
        scene.absent.discard(node)

    scene.later(seconds, start)
    _report_down(scene, node)
    return True


def kill_slurmctld(scene: Scene, drawn: random.Random) -> bool:
    """SIGKILL slurmctld: it loses the last second or two; start it again after a while.

    A job whose start it has lost it starts again, on another node too, although the first execution lives until its node registers.
    """
    seconds, begun = drawn.uniform(*AWAY_SECONDS) / 2, boot_seconds()
    if not _stop_slurmctld(scene, signal.SIGKILL, seconds):
        return False
    scene.lapses.append((begun, begun + seconds + AFTERMATH_SECONDS))
    return True


def stop_for_an_hour(scene: Scene, seconds: float) -> bool:
    """Stop slurmctld for an hour in scaled time."""
    return _stop_slurmctld(scene, signal.SIGTERM, seconds)


def deafen_slurmctld(scene: Scene, drawn: random.Random) -> bool:
    """Suspend slurmctld for a moment."""
    if scene.away:
        return False
    scene.cluster.pause_controller()
    scene.away = True

    def resume() -> None:
        scene.cluster.resume_controller()
        scene.away = False

    scene.later(drawn.uniform(1.0, 4.0), resume)
    return True


def requeue_element(scene: Scene, drawn: random.Random) -> bool:
    jobs = scene.running_elements()
    return bool(jobs) and scene.succeeds("scontrol", "requeue", drawn.choice(jobs))


def cancel_as_operator(scene: Scene, drawn: random.Random) -> bool:
    """scancel of a running element by another account, an operator."""
    jobs, users = scene.running_elements(), make_users()
    return bool(jobs and users) and scene.succeeds("scancel", drawn.choice(jobs), user=users[-1])


def make_operator(scene: Scene) -> None:
    """Give the second user of this machine, if there is one, the rights of an operator."""
    for user in make_users()[-1:]:
        scene.quietly("sacctmgr", "--immediate", "add", "account", "lab")
        scene.quietly("sacctmgr", "--immediate", "add", "user", user, "account=lab", "AdminLevel=Operator")


def _stop_slurmctld(scene: Scene, number: signal.Signals, seconds: float) -> bool:
    if scene.away:
        return False
    scene.cluster.stop_controller(number)
    scene.away = True

    def start() -> None:
        scene.cluster.start_controller()
        scene.away = False

    scene.later(seconds, start)
    return True


def _report_down(scene: Scene, node: str) -> None:
    scene.quietly("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")


def _slurmd_of(init: int) -> list[int]:
    """Pids of the daemon among the children of a node's first process."""
    found = []
    for child in Path(f"/proc/{init}/task/{init}/children").read_text().split():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() == "slurmd":
                found.append(int(child))
    return found
