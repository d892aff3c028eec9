"""A part whose process dies after its first finding."""

from __future__ import annotations

import os
import signal
import sys

from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.record import Record


def run(record: Record, plan: Plan) -> None:
    del plan
    record.proof("before the crash", True, "kept")
    sys.stderr.write("the last words of the part\n")
    os.kill(os.getpid(), signal.SIGSEGV)
