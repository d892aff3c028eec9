"""The chaos run: an undisturbed grid on this machine, the same grid on Slurm under faults, and the comparison of their tables."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.check import differences, overlaps, table
from tests.chaos.grid import lose_replies, make_corpus, make_source, run_launcher
from tests.chaos.injection import build
from tests.chaos.kinds import HOUR, KINDS, LOST_REPLY, missing
from tests.chaos.launcher import SCALE
from tests.chaos.scene import Scene
from tests.chaos.schedule import schedule
from tests.chaos.slurm_faults import make_operator, stop_for_an_hour
from tests.slurm_cluster.cluster import Cluster
from tests.slurm_cluster.configuration import ClusterSettings

RESULTS_BYTES = 128 << 20  # size of the file system of the results
TICK_SECONDS = 0.1
ATTEND_SECONDS = 2.0  # between two looks at drained nodes


def disturb(scene: Scene, seed: int, faults: int, seconds: float, slower: float) -> None:
    """Inject faults until so many have struck, the grid is finished or the time is up; then repair everything.

    `slower`: factor on the pauses between faults. The hour without slurmctld begins after a third of the faults; others strike meanwhile.
    """
    plan, following, attended = schedule(seed, {kind: weight for kind, (_, weight) in KINDS.items()}), 0.0, 0.0
    while scene.total < faults and time.monotonic() - scene.begun < seconds and chain_state(scene.results) not in ("ended", "broken"):
        scene.work()
        now = time.monotonic()
        if not scene.counts[HOUR] and scene.total >= faults // 3 and stop_for_an_hour(scene, 3600 / SCALE):
            scene.count(HOUR)
        if now >= following:
            planned = next(plan)
            if KINDS[planned.kind][0](scene, random.Random(planned.seed)):
                scene.count(planned.kind)
            following = now + planned.pause * slower
        if now - attended > ATTEND_SECONDS:
            scene.resume_nodes()
            attended = now
        time.sleep(TICK_SECONDS)
    scene.work(everything=True)


def await_end(scene: Scene, seconds: float) -> str:
    """Wait until the chain has ended by itself; its state."""
    deadline = time.monotonic() + seconds
    while (state := chain_state(scene.results)) not in ("ended", "broken") and time.monotonic() < deadline:
        scene.resume_nodes()
        time.sleep(ATTEND_SECONDS)
    return state


def chain_state(results: Path) -> str:
    """State of the last link of the chain; "" if it cannot be read."""
    try:
        return str(json.loads((results / "chaos" / "controller.json").read_text())["state"])
    except (OSError, ValueError, KeyError):
        return ""


@contextmanager
def own_file_system(folder: Path) -> Iterator[None]:
    """A small file system of its own for a folder, which can be full, if this is root."""
    folder.mkdir(parents=True)
    if os.getuid() != 0:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={RESULTS_BYTES}", "chaos", str(folder)], check=True)
    try:
        yield
    finally:
        shutil.copytree(folder, folder.with_name(f"{folder.name}-kept"), symlinks=True)
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main(arguments: list[str]) -> int:
    """Run it; 0 only if the disturbed grid ended by itself with the undisturbed one's table, and no stage was executed twice at once."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--minutes", type=float, default=20.0, help="time limit of the disturbed run")
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--slower", type=float, default=1.0, help="factor on the pauses between faults, for a machine that has other work")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--step-seconds", type=float, default=0.8)
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    chosen = parser.parse_args(arguments)
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(10**6)
    sys.stdout.write(
        f"seed {seed}: python -m tests.chaos --seed {seed} --faults {chosen.faults} injects the same faults in the same order\n"
    )
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    folder.chmod(0o755)  # the operator, another user, reads slurm.conf
    source = make_source(folder / "source")
    begun = time.monotonic()
    code = run_launcher(source, "local", folder / "calm" / "results", make_corpus(folder / "calm" / "corpus"), chosen)
    sys.stdout.write(f"undisturbed, on this machine: exit code {code}, {time.monotonic() - begun:.0f} s\n")
    wrong = run_disturbed(folder, source, seed, chosen)
    sys.stdout.write("\n".join(wrong) + "\n" if wrong else "the tables are the same, byte for byte; no stage was executed twice at once\n")
    if not chosen.keep and not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        sys.stdout.write(f"everything lies in {folder}\n")
    return 1 if wrong else 0


def run_disturbed(folder: Path, source: Path, seed: int, chosen: argparse.Namespace) -> list[str]:
    """The disturbed grid; what went wrong."""
    results, corpus, lost = folder / "wild" / "results", make_corpus(folder / "wild" / "corpus"), folder / "lost-replies"
    control = folder / "control"
    control.mkdir()
    cluster = Cluster(folder / "slurm", ClusterSettings(nodes=6, cpus=2))
    with own_file_system(results):
        cluster.up()
        try:
            lose_replies(folder / "bin", lost, cluster.environment["PATH"])
            os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
            scene = Scene(cluster, source, results, control)
            make_operator(scene)
            code = run_launcher(source, "start", results, corpus, chosen, cluster.environment, build(control, results))
            if code:
                return [f"not launched (exit code {code})"]
            disturb(scene, seed, chosen.faults, chosen.minutes * 60, chosen.slower)
            struck = time.monotonic() - scene.begun
            state = await_end(scene, max(60.0, chosen.minutes * 60 - struck))
            seconds = time.monotonic() - scene.begun
            code = scene.start_pass().wait(120)
            left = scene.quietly("squeue", "-h", "-o", "%i %j %T %r")
        finally:
            cluster.down()
        scene.counts[LOST_REPLY] = len(lost.read_text().splitlines()) if lost.exists() else 0
        sys.stdout.write(f"disturbed: faults for {struck:.0f} s, end after {seconds:.0f} s; left in the queue: {left or 'nothing'}\n")
        sys.stdout.write(f"{scene.total} faults:\n" + "".join(f"{number:6}  {kind}\n" for kind, number in scene.counts.most_common()))
        wrong = [f"no fault of the kind: {kind}" for kind in missing(scene.counts, root=os.getuid() == 0)]
        wrong += [f"{scene.total} faults only: the grid is too small for {chosen.faults}"] if scene.total < chosen.faults else []
        wrong += [] if state == "ended" else [f"the chain has not ended by itself, but is {state or 'not known'}"]
        wrong += [] if code == 0 else [f"not complete (exit code {code}): see by-hand.log"]
        if code == 0:
            wrong += differences(table(folder / "calm" / "results", source), table(results, source))
        return wrong + overlaps(corpus / "trace", scene.zombies, scene.lapses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
