"""One training in one, two and four processes, from the command line: the same numbers, also after one of four was killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command_line import CommandLine
from tests.slurm_cluster.cluster import Cluster
from tests.waiting import wait_until

TINY = (
    *(
        "corpus=small",
        "methods=[tapt]",
        "folds=[1]",
        "seeds=1",
        "policy.poll_seconds=0.2",
        "recipe.finetune.epochs=1",
        "recipe.finetune.batch_size=24",
    ),
    *("recipe.tapt.steps=8", "recipe.tapt.warmup_steps=3", "recipe.tapt.batch_seconds=20.0"),
    *("recipe.finetune.precision=float32", "recipe.tapt.precision=float32"),  # sums in another order would be rounded to bfloat16
    *("recipe.execution.log_every=1", "recipe.execution.checkpoint_minutes=0", "recipe.execution.micro_batch=2"),
)
ON_TWO_NODES = ("policy.poll_seconds=1", "resources.default.nodes=2", "resources.default.processes=2", "resources.default.cpus=2")


def attempts(results: Path, stage: str) -> list[Path]:
    return sorted((results / "store" / stage).glob("*/attempts/*"))


def result(results: Path, stage: str) -> dict[str, Any]:
    (file,) = (results / "store" / stage).glob("*/result.json")
    return dict(json.loads(file.read_text()))


def curve(results: Path, stage: str) -> list[float]:
    """Training loss of every step."""
    events = EventAccumulator(str(attempts(results, stage)[-1] / "output" / "tensorboard"))
    events.Reload()
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, len(points) + 1))
    return [point.value for point in points]


def process_of_rank(rank: int, results: Path) -> int:
    """Pid, as seen from here, of a process of a Slurm step on any of the test cluster's nodes; 0: there is none."""
    mark = f"SLURM_PROCID={rank}".encode()
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes()
            if b"\0worker\0" in command and bytes(results) in command and mark in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
        except OSError:
            continue
    return 0


@pytest.mark.slow
@pytest.mark.slurm
def test_the_number_of_processes_changes_no_number(slurm_cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    """Loss curves of one, two and four processes are equal to float sums; of the four, on two nodes, one is killed on the way.

    One and two compute while the four begin and begin again: numbers do not depend on the load either.
    """
    one, two, four = (CommandLine(small_data, tmp_path / name) for name in ("one", "two", "four"))
    running = [four.start("grid", "demo", "--cluster", "slurm", "--wait", *TINY, *ON_TWO_NODES), one.start("grid", "demo", *TINY)]
    try:
        checkpoint = wait_until(lambda: any((four.results / "store" / "tapt").glob("*/checkpoint/[!.]*")), step=0.05)
        assert checkpoint
        lost = process_of_rank(3, four.results)
        assert lost
        os.kill(lost, signal.SIGKILL)
        alone, _ = running[1].communicate()
        running.append(two.start("grid", "demo", *TINY, "resources.default.processes=2", "resources.default.cpus=2"))
        said = [each.communicate()[0] for each in (running[0], running[2])]
    finally:
        for each in running:
            each.kill()
    assert [each.returncode for each in running] == [0, 0, 0], [alone, *said]
    outcome = json.loads((attempts(four.results, "tapt")[0] / "outcome.json").read_text())
    assert outcome["kind"] == "communication"
    assert "rank 3" in outcome["message"]
    assert len(attempts(four.results, "tapt")) == 2
    resumed = result(four.results, "tapt")["provenance"]["durations"]["resumed_at_step"]
    assert 0 < resumed < 8

    for stage, steps in (("tapt", 8), ("finetune", None)):
        expected = curve(one.results, stage)
        assert len(expected) == (steps or len(expected)) > 1
        for runs, processes in ((two, 2), (four, 4)):
            assert result(runs.results, stage)["provenance"]["processes"] == processes
            assert curve(runs.results, stage) == pytest.approx(expected, rel=1e-5)
        assert len({result(runs.results, stage)["key"] for runs in (one, two, four)}) == 1
