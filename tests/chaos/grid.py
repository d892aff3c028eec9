"""The grid of a chaos run: its source tree, its corpus, and an sbatch whose reply is lost now and then."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.chaos.launcher import SCALE

ROOT = Path(__file__).resolve().parents[2]
WAIT_IN_SCRIPT, SCALED_WAIT = "{1..60}", f"{{1..{60 / SCALE:.0f}}}"  # seconds that a batch script waits for the shared folder
LOST_REPLY = """#!/bin/sh
# sbatch whose answer is lost now and then: before it asks, or after
n=$(od -An -N1 -tu1 /dev/urandom)
[ "$n" -lt 12 ] && { echo lost >> "%(log)s"; echo "sbatch: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }
reply=$(mktemp)
"%(sbatch)s" "$@" > "$reply" || { code=$?; rm -f "$reply"; exit $code; }
[ "$n" -gt 240 ] && { echo lost >> "%(log)s"; rm -f "$reply"; exit 1; }
cat "$reply"; rm -f "$reply"
"""


def make_source(folder: Path) -> Path:
    """A source tree with the product's jobs package and the chaos stages."""
    shutil.copytree(ROOT / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "slurm_templates", folder / "slurm_templates")
    script = folder / "slurm_templates" / "prepare.sh.j2"
    text = script.read_text()
    if WAIT_IN_SCRIPT not in text:
        raise ValueError(f"{script}: no wait of {WAIT_IN_SCRIPT} to scale")
    script.write_text(text.replace(WAIT_IN_SCRIPT, SCALED_WAIT))
    (folder / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "published.yaml", folder / "configs")
    (folder / "ser_core").mkdir()
    (folder / "ser_core" / "__init__.py").write_text("")
    shutil.copy(Path(__file__).with_name("registry.py"), folder / "ser_core" / "registry.py")
    shutil.copy(Path(__file__).with_name("launcher.py"), folder / "launch.py")
    return folder


def make_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "digest").write_text("d1")
    return folder


def lose_replies(folder: Path, log: Path, path: str) -> None:
    """Make the wrapper `folder/sbatch` of the sbatch in a PATH; it adds a line to `log` for each reply that is lost."""
    wrapper = folder / "sbatch"
    folder.mkdir()
    wrapper.write_text(LOST_REPLY % {"sbatch": shutil.which("sbatch", path=path) or "sbatch", "log": log})
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)


def run_launcher(
    source: Path,
    what: str,
    results: Path,
    corpus: Path,
    shape: argparse.Namespace,
    environment: Mapping[str, str] = os.environ,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Exit code of a command of the launcher. `shape`: size of the grid; `variables`: environment of its jobs."""
    size = ["--folds", str(shape.folds), "--seeds", str(shape.seeds), "--steps", str(shape.steps)]
    times = ["--step-seconds", str(shape.step_seconds), "--variables", json.dumps(dict(variables or {}))]
    command = [sys.executable, str(source / "launch.py"), what, "chaos", "--results", str(results), "--corpus", str(corpus), *size, *times]
    return subprocess.run(command, check=False, cwd=source, env=dict(environment)).returncode
