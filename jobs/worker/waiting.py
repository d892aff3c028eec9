"""How long the Slurm job of an attempt waited in the queue, by what the worker knows: nothing is asked of Slurm.

A job is eligible once it is submitted, the stages that it reads have their results, and the last attempt of its stage has ended: before
that it waits for a dependency, or was running until it was requeued.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jobs.store.attempts import modified_at
from jobs.store.layout import StageFolder
from jobs.store.records import attempt_numbers, read_claim

START_TIME = "SLURM_JOB_START_TIME"  # seconds since the epoch by slurmctld's clock; Slurm 22.05 does not set it
LONGEST_START = 600.0  # seconds from the start of a job to that of its worker; a larger difference is one of the clocks


def job_times(
    submitted: float, folder: StageFolder, number: int, upstream: Iterable[StageFolder], began: float, environment: Mapping[str, str]
) -> dict[str, float]:
    """`submitted`, `eligible` and `job_started` of a claim of attempt `number`; {} if no job was submitted (0).

    `began`: when the worker began, which counts where Slurm does not state the start of the job. Times in seconds since the epoch.
    """
    if not submitted:
        return {}
    before = folder.attempt(number - 1)
    ended = modified_at(before.outcome) or modified_at(before.claim)
    eligible = max(submitted, ended, *(modified_at(each.result) for each in upstream))
    stated = environment.get(START_TIME, "")
    started = float(stated) if stated.isdecimal() and 0 <= began - float(stated) < LONGEST_START else began
    return {"submitted": submitted, "eligible": eligible, "job_started": started}


def queue_facts(folder: StageFolder, number: int) -> dict[str, float]:
    """The times of the job of attempt `number`, the seconds that it `waited`, and those of the attempts `before`; {} if not known."""
    claims = {each: claim for each in attempt_numbers(folder) if each <= number and (claim := read_claim(folder.attempt(each)))}
    own = claims.pop(number, None)
    if own is None or not own.submitted:
        return {}
    before = sum(claim.waited for claim in claims.values())
    times = {"submitted": own.submitted, "eligible": own.eligible, "started": own.job_started, "waited": own.waited, "before": before}
    return {name: round(value, 3) for name, value in times.items()}
