"""Executes the stages of one task: claim, verify inputs, compute, publish. The same on this machine and under Slurm.

    python -m jobs.worker.main DESCRIPTION [INDEX]      INDEX: which task of the description; default: SLURM_ARRAY_TASK_ID

Exit codes: 0 every stage of the task has a result · 1 a stage failed or was refused · 2 no such description or task ·
3 unfinished without a failure: asked to stop, claimed by another worker, or an upstream result is missing.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import UsageError
from jobs.store.clock import file_time, measure
from jobs.worker.packing import run_packed
from jobs.worker.processes import limit_threads
from jobs.worker.stage import Verdict, WorkerProcess, execute
from jobs.worker.task import Description, read_description
from jobs.worker.team_start import work_together


def run_task(process: WorkerProcess, index: int) -> int:
    """Compute the stages of task `index`, one by one or concurrently; returns the exit code. A failed stage does not end the task."""
    measure(process.place.layout.root)
    process.began = file_time(process.place.layout.root)
    nodes = [process.description.nodes[key] for key in process.description.tasks[index]]
    if process.description.at_once != 1 and len(nodes) > 1 and process.team is None:
        return run_packed(process, nodes)
    code = 0
    for node in nodes:
        verdict = Verdict.interrupted if process.stop() or not process.ready() else execute(process, node)
        process.report(f"{node.name}: {verdict.value}")
        code = code if code == 1 else verdict.exit_code or code
    return code


def main(arguments: Sequence[str]) -> int:
    """Run one task of a description file."""
    faulthandler.enable()
    try:
        index = int(arguments[1] if len(arguments) > 1 else os.environ.get("SLURM_ARRAY_TASK_ID", ""))
        description = read_description(Path(arguments[0]))
    except (IndexError, ValueError):
        return _usage("usage: python -m jobs.worker.main DESCRIPTION INDEX")
    except UsageError as error:
        return _usage(str(error))
    if not 0 <= index < len(description.tasks):
        return _usage(f"{arguments[0]}: no task {index}, there are {len(description.tasks)}")
    threads = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
    limit_threads(threads)
    process = WorkerProcess(description, threads, print_line, log=_slurm_log(description))
    process.stop.install()
    return work_together(process, lambda: run_task(process, index), os.environ)


def _slurm_log(description: Description) -> str:
    """File that Slurm writes the output of this array task to, as slurm_templates/stage.sh.j2 names it; "" outside of an array task."""
    name, array, index = (os.environ.get(f"SLURM_{key}", "") for key in ("JOB_NAME", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    return str(description.place.layout.logs / f"{name}_{array}_{index}.out") if array else ""


def print_line(line: str) -> None:
    """Print one line with the time of day: the log of this process."""
    sys.stdout.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
    sys.stdout.flush()


def _usage(line: str) -> int:
    sys.stderr.write(line + "\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
