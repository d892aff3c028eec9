"""The production client of Slurm with its commands run on the simulated Slurm."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import SubmissionFailedError
from jobs.experiment.config import SlurmSite
from jobs.slurm.client import SlurmClient
from tests.simulation.crashes import Killed, reach
from tests.simulation.slurm import AWAY, LATE_SECONDS, LOST, SBATCH_SECONDS, UNREACHABLE, VERY_LATE_SECONDS, Reply, SimulatedSlurm, UnderWay


class SimulatedClient(SlurmClient):
    """Runs the commands of the production client on the simulated Slurm; each call is two points of the calling process."""

    def __init__(self, slurm: SimulatedSlurm) -> None:
        super().__init__(looks=1, pause=0.0)
        self._slurm = slurm

    def submit(self, folder: Path, script: str, parameters: Mapping[str, Any], site: SlurmSite) -> str:
        self.calls += 1
        slurm, name, reply = self._slurm, str(parameters["job_name"]), self._slurm.reply
        reach("before sbatch")
        try:
            reach("during sbatch")
        except Killed:  # sbatch is a process of its own, and goes on
            slurm.under_way.append(UnderWay(slurm.clock() + SBATCH_SECONDS, name, dict(parameters), sbatch_runs=True))
            raise
        slurm.calls.append("sbatch")
        slurm.reply = Reply.given
        if not slurm.reachable or reply is Reply.never:
            raise SubmissionFailedError(LOST if slurm.reachable else UNREACHABLE)
        if reply.name in AWAY:
            raise SubmissionFailedError(AWAY[reply.name])
        if reply in (Reply.late, Reply.very_late):
            very_late = reply is Reply.very_late
            lands = slurm.clock() + (VERY_LATE_SECONDS if very_late else LATE_SECONDS)
            slurm.under_way.append(UnderWay(lands, name, dict(parameters), very_late=very_late))
            raise SubmissionFailedError("sbatch timed out")
        number = slurm.submit(name, parameters)
        reach("after sbatch")
        if reply is Reply.lost:
            raise SubmissionFailedError(LOST)
        return str(number)

    def _run(self, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str] | None:
        self.calls += 1
        reach(f"before {command[0]}")
        found = self._slurm.run(command)
        reach(f"after {command[0]}")
        return None if found is None else subprocess.CompletedProcess(list(command), *found)
