"""A launch of which nothing can ever start is refused before anything is written; one of which a part cannot names that part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from jobs.commands.grid import run_grid
from jobs.commands.session import Session
from jobs.commands.startable import require_startable, startable
from jobs.errors import UsageError
from jobs.experiment.config import Cluster, Experiment, Policy, SlurmSite, StageResources
from jobs.experiment.launched import Corpus, Launched
from jobs.store.layout import Layout
from tests.command_line import ROOT
from tests.jobs.fake_registry import make_graph
from tests.jobs.local_launch import workplace
from tests.jobs.slurm_cases import batch_of, graph_of, node
from tests.slurm_cluster import Cluster as SlurmCluster


def session_of(folder: Path, **minutes: int) -> Session:
    """A new launch of TAPT on a Slurm partition of one hour, with some minutes for each stage."""
    graph, layout = make_graph(methods=("tapt",), folds=("1",), seeds=1), Layout(folder / "results", "exp")
    small = {name: StageResources(cpus=1, gpus=0, memory_gb=0.5, minutes=given) for name, given in minutes.items()}
    experiment = Experiment(
        name="exp",
        corpus="fake",
        cluster=Cluster.slurm,
        policy=Policy(controller=False),
        resources=small,
        slurm=SlurmSite(partition="hidden", extra={"comment": "ours"}),
    )
    launched = Launched(experiment, Corpus("fake", "d1", ("1",), str(folder)), graph, layout, 1000.0, lambda generations: graph)
    return Session(launched, workplace(folder), ROOT, folder / "published.yaml", new=True)


def test_what_waits_for_an_impossible_stage_cannot_start_either() -> None:
    """Of a chain whose first stage is impossible nothing can start; a stage beside it can."""
    chain = [node("a", "states"), node("b", "cluster", {"states": "a"}), node("c", "finetune", {"cluster": "b"})]
    alone = node("d", "finetune", fold="2")
    graph = graph_of([*chain, alone])
    batches = [batch_of([each]) for each in (*chain, alone)]
    assert list(startable(batches, graph, {batches[0]: "never"})) == ["d"]
    assert list(startable(batches[:3], graph, {batches[0]: "never"})) == []
    assert list(startable(batches[:3], graph, {batches[2]: "never"})) == ["a", "b"]


@pytest.mark.slurm
def test_a_launch_of_which_nothing_can_start_is_refused(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the stage, the reason and the key; nothing is stored, nothing submitted.

    Before: it was submitted, waited with the reason PartitionTimeLimit, and a notice came hours later. sbatch is asked once about the
    request that both stages have, also where it has to know an option of `slurm.extra`.
    """
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nexec {shutil.which("sbatch")} "$@"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    with pytest.raises(UsageError, match=r"exp: nothing is submitted: tapt tapt can never start: .*PartitionTimeLimit.*resources\.tapt"):
        run_grid(session_of(tmp_path, default=90), wait=False)
    assert not (tmp_path / "results" / "exp").exists()
    assert slurm_cluster.run("squeue", "--all", "--noheader") == ""
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "--test-only" in call


@pytest.mark.slurm
def test_a_stage_that_cannot_start_is_named_if_others_can(
    slurm_cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pretraining can run, the fine-tuning cannot: a line on stderr, and no refusal. Where all can, nothing is printed."""
    session = session_of(tmp_path, default=10, finetune=90)
    require_startable(session, session.look(ask_slurm=False))
    assert "exp: finetune tapt can never start: its time limit, 90 min, is above the 60 min" in capsys.readouterr().err
    session = session_of(tmp_path, default=10)
    require_startable(session, session.look(ask_slurm=False))
    assert capsys.readouterr().err == ""
