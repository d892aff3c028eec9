"""Prove that everything is right on this machine's GPU, and measure how fast it is: `make gpu-check` (docs/gpu-check.md).

    python -m benchmarks.gpu_check                       at most 8 minutes on one GPU
    python -m benchmarks.gpu_check --cpu                 what needs no GPU, at most 3 minutes
    python -m benchmarks.gpu_check --only stages steps   some of the parts

Results are in the output folder: results.json, report.txt, and a log for each part. The exit code is 0 if all proofs hold, 1 if not, and 2
if the check cannot run here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_check.environment import missing_packages
from benchmarks.gpu_check.parts import PARTS, Plan, chosen_parts
from benchmarks.gpu_check.report import as_json, as_text
from benchmarks.gpu_check.runner import ROOT, PartResult, passed, run_parts

GPU_SECONDS, CPU_SECONDS = 480.0, 180.0
PROVING = frozenset({"environment", "suite", "stages", "resume", "memory", "processes"})  # the parts that must be done; others only measure


def main(arguments: list[str] | None = None) -> int:
    """Run the check and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="run what needs no GPU, with transformers' encoder in the GPU's place")
    parser.add_argument("--seconds", type=float, help=f"in total (default: {GPU_SECONDS:g}, with --cpu {CPU_SECONDS:g})")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=f"of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-check", help="folder of the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    missing = missing_packages()
    if missing:
        print(f"gpu-check: this Python ({sys.executable}) lacks {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    try:
        parts = chosen_parts(options.only)
    except ValueError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    seconds = options.seconds or (CPU_SECONDS if options.cpu else GPU_SECONDS)
    options.output.mkdir(parents=True, exist_ok=True)
    device = "cpu" if options.cpu else "cuda"
    commit = current_commit()

    def write(results: list[PartResult]) -> None:
        good = passed(results, parts, PROVING)
        found = as_json(results, device=device, commit=commit, passed=good, complete=len(results) == len(parts))
        replace_text(options.output / "results.json", json.dumps(found, indent=1) + "\n")
        replace_text(options.output / "report.txt", as_text(found))

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        results = run_parts(parts, Plan(Path(work), device), options.output, seconds, write, lambda line: print(line, flush=True))
    print()
    print((options.output / "report.txt").read_text(encoding="utf-8"))
    print(f"results: {options.output / 'results.json'}")
    if len(results) < len(parts):  # nothing can be computed here
        return 2
    return 0 if passed(results, parts, PROVING) else 1


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


def current_commit() -> str:
    """Return the commit of the checkout, marked `+` if files differ from it; "" without git."""
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}+" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


if __name__ == "__main__":
    sys.exit(main())
