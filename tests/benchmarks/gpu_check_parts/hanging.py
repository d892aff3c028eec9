"""A part that never ends, and has a child process that does not end either."""

from __future__ import annotations

import subprocess
import time

from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.record import Record


def run(record: Record, plan: Plan) -> None:
    del plan
    child = subprocess.Popen(["sleep", "1000"])
    record.row("children", pid=child.pid)
    time.sleep(1000)
