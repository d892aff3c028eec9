"""Runs the parts, each in its own process group with a time limit, and writes the JSON after every part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.parts import Part, Plan, seconds_for
from benchmarks.gpu_check.record import read_findings

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, TIMED_OUT, NO_TIME = "done", "failed", "timed out", "no time"
LEAST_SECONDS = 5.0  # a part that would get less is not started
SHOWN_LINES = 3  # of the log of a part that failed


@dataclass(frozen=True)
class PartResult:
    """Outcome of one part. `seconds` it took, of the `limit` it had; `error`: the last lines of its log unless it is done."""

    name: str
    title: str
    status: str
    seconds: float
    limit: float
    proofs: list[dict[str, Any]]
    rows: dict[str, list[dict[str, Any]]]
    notes: list[str]
    error: str


def run_parts(
    parts: Sequence[Part],
    plan: Plan,
    logs: Path,
    seconds: float,
    report: Callable[[list[PartResult]], None],
    show: Callable[[str], None],
) -> list[PartResult]:
    """Run the parts within `seconds` in total; `report` gets all results so far after every part, `show` a line.

    Stops after the part `environment` if a proof of it does not hold: nothing could be computed.
    """
    deadline = time.monotonic() + seconds
    results: list[PartResult] = []
    for number, part in enumerate(parts):
        limit = seconds_for([each.share(plan.device) for each in parts[number:]], deadline - time.monotonic())
        show(f"{part.name}: {part.title} (at most {limit:.0f} s)")
        results.append(run_part(part, plan, logs, limit))
        report(results)
        show(f"{part.name}: {one_line(results[-1])}")
        if part.name == "environment" and any(not proof["holds"] for proof in results[-1].proofs):
            break
    return results


def run_part(part: Part, plan: Plan, logs: Path, limit: float) -> PartResult:
    """Run one part in a new process, kill it and all its children at the limit, and read what it has recorded in `logs`."""
    findings, log = logs / f"{part.name}.jsonl", logs / f"{part.name}.log"
    findings.unlink(missing_ok=True)
    started = time.monotonic()
    status, error = NO_TIME, "the total time was used up"
    if limit >= LEAST_SECONDS:
        status, error = _executed(_command(part, plan, findings, limit), _environment(plan), log, limit)
    lines = findings.read_text(encoding="utf-8").splitlines() if findings.exists() else []
    found = read_findings(lines)
    took = time.monotonic() - started
    return PartResult(part.name, part.title, status, took, limit, found.proofs, found.rows, found.notes, error)


def _command(part: Part, plan: Plan, findings: Path, limit: float) -> list[str]:
    request = {"folder": str(plan.folder), "device": plan.device, "findings": str(findings), "seconds": limit, "module": part.module}
    return [sys.executable, "-m", "benchmarks.gpu_check.worker", json.dumps(request)]


def _environment(plan: Plan) -> dict[str, str]:
    """One CPU thread without a GPU: the models are small, and threads that wait for each other stall on a busy machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1"} if plan.device == "cpu" else dict(os.environ)


def _executed(command: list[str], environment: dict[str, str], log: Path, limit: float) -> tuple[str, str]:
    """Return status and error of a command."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return TIMED_OUT, f"killed after {limit:.0f} s; log: {log}"
        finally:
            _kill_group(process)
    if code == 0:
        return DONE, ""
    told = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SHOWN_LINES:]
    return FAILED, "\n".join([f"{told}; log: {log}", *tail])


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def one_line(result: PartResult) -> str:
    """Return the outcome of a part as one line."""
    held = sum(proof["holds"] for proof in result.proofs)
    proofs = f", {held} of {len(result.proofs)} proofs hold" if result.proofs else ""
    return f"{result.status} in {result.seconds:.0f} s{proofs}"


def passed(results: Sequence[PartResult], parts: Sequence[Part], proving: frozenset[str]) -> bool:
    """Whether every proof holds and every part in `proving` is done; the other parts only measure."""
    finished = {result.name for result in results if result.status == DONE}
    needed = {part.name for part in parts} & proving
    return needed <= finished and all(proof["holds"] for result in results for proof in result.proofs)
