"""Faults of the file system, for a task, a link, a node or all, and of a node's clock.

Errors of single calls and wrong clocks are injected by a preloaded library (tests.chaos.injection). A full disk, a read-only mount and a
folder that a node does not see are real: the results lie on a file system of their own, and each node has its own mounts. Mounts need root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Collection

from tests.chaos.injection import set_clock, set_error
from tests.chaos.scene import Scene
from tests.slurm_cluster.cluster import with_mounts_of

ERRORS = (errno.EIO, errno.ESTALE, errno.ENOSPC)
SICK_SECONDS = (1.0, 6.0)
LINK_SECONDS = 12.0  # until the next link has made its pass
PERMILLE = (30, 200, 1000)  # of the calls that fail
CLOCK_SECONDS = (300, 3600, 40 * 86400)  # by which a clock is wrong, forwards or backwards
FILL_BYTES = 1 << 20


def error_in_task(scene: Scene, drawn: random.Random) -> bool:
    """File system calls of one running task fail."""
    return _fail_job(scene, drawn, scene.variable_of_workers("SLURM_JOB_ID"), drawn.uniform(*SICK_SECONDS))


def error_in_link(scene: Scene, drawn: random.Random) -> bool:
    """File system calls of the next link fail."""
    link = scene.waiting_link()
    struck = (scene.control / f"job-{link}").exists()
    return _fail_job(scene, drawn, [link] if link and not struck else [], LINK_SECONDS)


def error_on_node(scene: Scene, drawn: random.Random) -> bool:
    """File system calls of everything on one node fail."""
    nodes = scene.busy_nodes()
    if nodes:
        seconds = drawn.uniform(*SICK_SECONDS)
        set_error(scene.control, f"node-{drawn.choice(nodes)}", drawn.choice(ERRORS), drawn.choice(PERMILLE), seconds)
    return bool(nodes)


def jump_clock(scene: Scene, drawn: random.Random) -> bool:
    """The clock of a node jumps, for processes that run as for those that start, and jumps back later."""
    nodes = scene.busy_nodes()
    if nodes:
        seconds = drawn.choice(CLOCK_SECONDS) * drawn.choice((-1, 1))
        set_clock(scene.control, drawn.choice(nodes), seconds, drawn.uniform(5.0, 20.0))
    return bool(nodes)


def fill_disk(scene: Scene, drawn: random.Random) -> bool:
    """No space is left for anybody, until another user removes a file."""
    filler = scene.results / ".filler"
    if filler.exists() or not os.path.ismount(scene.results):
        return False
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            if file.write(b"\0" * FILL_BYTES) < FILL_BYTES:
                break
    scene.later(drawn.uniform(*SICK_SECONDS) / 2, filler.unlink)
    return True


def remount_read_only(scene: Scene, drawn: random.Random) -> bool:
    """The results folder turns read-only on one node."""
    place = str(scene.results)
    return _cover(scene, drawn, ["mount", "--bind", place, place], ["mount", "-o", "remount,bind,ro", place]) is not None


def hide_results(scene: Scene, drawn: random.Random) -> bool:
    """The results folder vanishes on one node, and the next link is sent there: it finds neither its code nor its experiment.

    Not to a node that the link excludes: Slurm would never start it.
    """
    link = scene.waiting_link()
    if not link:
        return False
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=4k", "none", str(scene.results)]
    node = _cover(scene, drawn, mount, avoided=scene.excluded_nodes(link))
    if node is None:
        return False
    scene.quietly("scontrol", "update", f"jobid={link}", f"reqnodelist={node}")
    return True


def _fail_job(scene: Scene, drawn: random.Random, jobs: list[str], seconds: float) -> bool:
    if jobs:
        set_error(scene.control, f"job-{drawn.choice(jobs)}", drawn.choice(ERRORS), drawn.choice(PERMILLE), seconds)
    return bool(jobs)


def _cover(scene: Scene, drawn: random.Random, *mounts: list[str], avoided: Collection[str] = ()) -> str | None:
    """Mount something over the results folder on one node, for a while; the node, None if there is none."""
    nodes = [node for node in scene.busy_nodes() if node not in (*scene.mounted, *avoided)]
    if not nodes or not os.path.ismount(scene.results):
        return None
    node = drawn.choice(nodes)
    init = scene.cluster.processes.get(f"init-{node}")
    if init is None:
        return None

    def inside(command: list[str]) -> bool:
        return subprocess.run(with_mounts_of(init, *command), check=False, capture_output=True, timeout=10).returncode == 0

    if not all(inside(command) for command in mounts):
        return None
    scene.mounted.add(node)

    def uncover() -> None:
        if not inside(["umount", "--lazy", str(scene.results)]) and init.alive:  # a node that was powered off has lost its mounts
            raise RuntimeError(f"{scene.results} cannot be uncovered on {node}")
        scene.mounted.discard(node)

    scene.later(drawn.uniform(*SICK_SECONDS) + 4.0, uncover)
    return node
