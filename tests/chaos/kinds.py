"""The kinds of faults, and how often each strikes relative to the others."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.chaos import process_faults, slurm_faults, storage_faults
from tests.chaos.scene import Scene

HOUR = "an hour without slurmctld"  # once a run
LOST_REPLY = "sbatch reply lost"  # by the wrapper around sbatch (tests.chaos.grid)
# name -> what injects it and returns whether it found a target (or will count it itself), how often it is in a round of the schedule
KINDS: dict[str, tuple[Callable[[Scene, random.Random], bool], int]] = {
    "worker killed": (process_faults.kill_worker, 6),
    "step killed": (process_faults.kill_step, 3),
    "controller killed": (process_faults.kill_link, 2),
    "pass by hand killed": (process_faults.kill_pass, 2),
    "second controller": (process_faults.second_pass, 1),
    "result torn": (process_faults.tear_result, 1),
    "node powered off": (slurm_faults.power_off, 2),
    "node cut off, its jobs live on": (slurm_faults.cut_off, 2),
    "slurmctld killed": (slurm_faults.kill_slurmctld, 1),
    "slurmctld deaf": (slurm_faults.deafen_slurmctld, 1),
    "element requeued": (slurm_faults.requeue_element, 3),
    "scancel by an operator": (slurm_faults.cancel_as_operator, 2),
    "storage error in a task": (storage_faults.error_in_task, 3),
    "storage error in a link": (storage_faults.error_in_link, 2),
    "storage error on a node": (storage_faults.error_on_node, 1),
    "disk full": (storage_faults.fill_disk, 1),
    "results read-only on a node": (storage_faults.remount_read_only, 1),
    "link on a node without the results": (storage_faults.hide_results, 1),
    "clock of a node jumped": (storage_faults.jump_clock, 2),
}


def missing(counts: dict[str, int], root: bool) -> list[str]:
    """Kinds that never struck. Without `root`, an ordinary user, those that need mounts or a second user are not missed."""
    needs_root = {"scancel by an operator", "disk full", "results read-only on a node", "link on a node without the results"}
    return [kind for kind in (*KINDS, HOUR, LOST_REPLY) if not counts.get(kind) and (root or kind not in needs_root)]
