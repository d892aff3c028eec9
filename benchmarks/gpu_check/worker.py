"""The process of one part: `python -m benchmarks.gpu_check.worker REQUEST` calls `run(record, plan)` of the part's module."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.record import Record


def main(request: str) -> None:
    """Run the part that the JSON request names; an exception ends the process with its traceback and exit code 1."""
    told = json.loads(request)
    plan = Plan(Path(told["folder"]), told["device"])
    record = Record(Path(told["findings"]), float(told["seconds"]))
    module = importlib.import_module(told["module"] if "." in told["module"] else f"benchmarks.gpu_check.{told['module']}")
    module.run(record, plan)


if __name__ == "__main__":
    main(sys.argv[1])
