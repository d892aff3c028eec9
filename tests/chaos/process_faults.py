"""Faults of processes and records: workers, links and passes that are killed, controllers that run at once, a result that is torn."""

from __future__ import annotations

import random

from tests.chaos.scene import Scene


def kill_worker(scene: Scene, drawn: random.Random) -> bool:
    return scene.kill_one(drawn, scene.workers())


def kill_step(scene: Scene, drawn: random.Random) -> bool:
    """SIGKILL a whole step through Slurm."""
    jobs = scene.running_elements()
    return bool(jobs) and scene.succeeds("scancel", "--signal=KILL", "--full", drawn.choice(jobs))


def kill_link(scene: Scene, drawn: random.Random) -> bool:
    """SIGKILL the next link in its pass."""
    scene.pursue("controller killed", drawn.uniform(0.0, 1.0), lambda: scene.kill_one(drawn, scene.processes("launch.py", "control")))
    return False


def kill_pass(scene: Scene, drawn: random.Random) -> bool:
    """Start a pass by hand and SIGKILL it somewhere in the middle."""
    process = scene.start_pass()

    def kill() -> bool:
        if process.poll() is not None:
            return False
        process.kill()
        process.wait()
        return True

    scene.pursue("pass by hand killed", drawn.uniform(0.05, 2.0), kill, patience=0.0)
    return False


def second_pass(scene: Scene, drawn: random.Random) -> bool:
    """Two controllers at once: one or two passes by hand beside the chain's."""
    for _ in range(drawn.choice((1, 2))):
        scene.start_pass()
    return True


def tear_result(scene: Scene, drawn: random.Random) -> bool:
    """Truncate a result: it then counts neither as success nor as failure."""
    found = sorted(path for path in scene.results.glob("store/*/*/result.json") if path.stat().st_size)
    if not found:
        return False
    path = drawn.choice(found)
    path.write_bytes(path.read_bytes()[: drawn.randrange(0, 200)])
    return True
