"""The chaos run: an undisturbed grid on this machine, the same grid on Slurm under random faults, and the comparison of their tables."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.check import differences, overlaps, table
from tests.chaos.faults import FAULTS, Scene, quietly, restore
from tests.slurm_cluster.cluster import Cluster
from tests.slurm_cluster.configuration import ClusterSettings

ROOT = Path(__file__).resolve().parents[2]
PAUSE_SECONDS = (0.5, 4.0)  # between faults
QUIET_SHARE = 0.6  # of the time limit after which no more faults are injected
LOST_REPLY = """#!/bin/sh
# sbatch whose answer is lost now and then: before it asks, or after
n=$(od -An -N1 -tu1 /dev/urandom)
[ "$n" -lt 12 ] && { echo "sbatch: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }
"%s" "$@" > "$0.$$" || { code=$?; rm -f "$0.$$"; exit $code; }
[ "$n" -gt 240 ] && { echo lost >> "$0.lost"; rm -f "$0.$$"; exit 1; }
cat "$0.$$"; rm -f "$0.$$"
"""


def make_source(folder: Path) -> Path:
    """A source tree with the product's jobs package and the chaos stages."""
    shutil.copytree(ROOT / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "slurm_templates", folder / "slurm_templates")
    (folder / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "published.yaml", folder / "configs")
    (folder / "ser_core").mkdir()
    (folder / "ser_core" / "__init__.py").write_text("")
    shutil.copy(Path(__file__).with_name("registry.py"), folder / "ser_core" / "registry.py")
    shutil.copy(Path(__file__).with_name("launcher.py"), folder / "launch.py")
    return folder


def make_corpus(folder: Path) -> Path:
    folder.mkdir()
    (folder / "digest").write_text("d1")
    return folder


def command(source: Path, what: str, results: Path, chosen: argparse.Namespace, corpus: Path) -> list[str]:
    shape = ["--folds", str(chosen.folds), "--seeds", str(chosen.seeds), "--steps", str(chosen.steps)]
    places = ["--results", str(results), "--corpus", str(corpus), "--step-seconds", str(chosen.step_seconds)]
    return [sys.executable, str(source / "launch.py"), what, "chaos", *shape, *places]


def disturb(scene: Scene, seconds: float) -> tuple[Counter[str], int]:
    """Inject faults for most of the time, then wait for the end. Returns what was injected how often, and the last pass's exit code."""
    injected: Counter[str] = Counter()
    names = list(FAULTS)
    weights = [FAULTS[name][1] for name in names]
    begun = time.monotonic()
    code = 3
    while time.monotonic() - begun < seconds and code == 3:
        restore(scene)
        quiet = time.monotonic() - begun > seconds * QUIET_SHARE
        if not quiet:
            name = scene.random.choices(names, weights)[0]
            if FAULTS[name][0](scene):
                injected[name] += 1
                sys.stdout.write(f"{time.monotonic() - begun:6.1f} s  {name}\n")
                sys.stdout.flush()
            time.sleep(scene.random.uniform(*PAUSE_SECONDS))
        else:
            restore(scene, everything=True)
            time.sleep(3)
        if not scene.processes("launch.py", "control") or quiet:
            process = scene.start_pass()  # whoever looks at the grid runs a pass
            try:
                code = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            if code not in (0, 3, 4):
                sys.stdout.write(f"         a pass by hand left with {code}: see {scene.results.parent}/by-hand.log\n")
                code = 3
    restore(scene, everything=True)
    return injected, code


def main(arguments: list[str]) -> int:
    """Run it; 0 only if the disturbed grid ended with the undisturbed one's table and no stage was ever executed twice at once."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--minutes", type=float, default=10.0, help="for the disturbed run")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-seconds", type=float, default=1.2)
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    chosen = parser.parse_args(arguments)
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(10**6)
    sys.stdout.write(f"seed {seed}\n")
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    source = make_source(folder / "source")
    calm, wild = folder / "calm", folder / "wild"
    for place in (calm, wild):
        place.mkdir()
    begun = time.monotonic()
    done = subprocess.run(command(source, "local", calm / "results", chosen, make_corpus(calm / "corpus")), check=False, cwd=source)
    sys.stdout.write(f"undisturbed, on this machine: exit code {done.returncode}, {time.monotonic() - begun:.0f} s\n")
    cluster = Cluster(folder / "slurm", ClusterSettings(nodes=6, cpus=2))
    cluster.up()
    try:
        sbatch = shutil.which("sbatch", path=cluster.environment["PATH"]) or "sbatch"
        wrapper = folder / "bin" / "sbatch"
        wrapper.parent.mkdir()
        wrapper.write_text(LOST_REPLY % sbatch)
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
        os.environ["PATH"] = f"{wrapper.parent}:{os.environ['PATH']}"
        scene = Scene(cluster, source, wild / "results", random.Random(seed))
        begun = time.monotonic()
        corpus = make_corpus(wild / "corpus")
        started = subprocess.run(
            command(source, "start", scene.results, chosen, corpus), check=False, cwd=source, env=dict(cluster.environment)
        )
        if started.returncode:
            return started.returncode
        injected, code = disturb(scene, chosen.minutes * 60)
        seconds = time.monotonic() - begun
        lost = Path(f"{wrapper}.lost")
        injected["sbatch reply lost"] = len(lost.read_text().splitlines()) if lost.exists() else 0
        left = quietly(scene, "squeue", "-h", "-o", "%i %j %T %r")
    finally:
        cluster.down()
    wrong = (
        differences(table(calm / "results", source), table(scene.results, source)) if code == 0 else [f"not complete (exit code {code})"]
    )
    wrong += overlaps(corpus / "trace")
    sys.stdout.write(f"disturbed: exit code {code}, {seconds:.0f} s; left in the queue: {left or 'nothing'}\n")
    sys.stdout.write(f"faults: {sum(injected.values())}: " + ", ".join(f"{count} {name}" for name, count in injected.most_common()) + "\n")
    sys.stdout.write("\n".join(wrong) + "\n" if wrong else "the tables are the same, byte for byte; no stage was executed twice at once\n")
    if not chosen.keep and not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        sys.stdout.write(f"everything lies in {folder}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
