"""Teams on a real Slurm: two nodes, two processes each, three teams at the same time, and one process of each is lost."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.experiment.config import SlurmSite
from jobs.store.failures import FailureClass
from jobs.store.records import Outcome
from jobs.worker.team_channel import SILENT_VARIABLE
from tests.jobs.failure_trial import Trial
from tests.slurm_cluster import Cluster

pytestmark = pytest.mark.slurm

LOST, FROZEN, FULL = 0, 1, 2  # slots
BEHAVIOURS = {LOST: "lost:3", FROZEN: "frozen:2", FULL: "full:1"}
SILENT = 3.0  # seconds


@pytest.fixture(scope="module")
def trial(slurm_session: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """The grid, after all of it has been tried again and has succeeded."""
    slurm_session.clear()
    site = SlurmSite(environment={SILENT_VARIABLE: str(SILENT)})
    found = Trial(tmp_path_factory.mktemp("teams"), BEHAVIOURS, seeds=3, site=site, nodes=2, processes=2, cpus=2)
    try:
        report = found.settle(400)
        assert report.complete, report.facts
        yield found
    finally:
        slurm_session.clear()


def first(trial: Trial, slot: int) -> Outcome:
    outcome = trial.outcome(slot)
    assert outcome is not None
    return outcome


@pytest.mark.parametrize("slot", BEHAVIOURS)
def test_it_is_tried_again_and_succeeds(trial: Trial, slot: int) -> None:
    """Four processes on two nodes computed the result, in the second attempt."""
    result = trial.result(slot)
    assert result is not None
    assert result.attempt == 2
    assert result.provenance["processes"] == 4
    assert len(result.provenance["hosts"]) == 2
    assert trial.starts(slot) == 2
    assert len(trial.claims(slot)) == 2


@pytest.mark.parametrize(("slot", "rank"), [(LOST, 3), (FROZEN, 2)])
def test_a_lost_process_is_a_communication_failure(trial: Trial, slot: int, rank: int) -> None:
    """The leader records its rank and machine, and the next attempt avoids that machine."""
    outcome = first(trial, slot)
    assert outcome.kind == FailureClass.communication.name
    assert re.search(rf"rank {rank} \(process \d+ on {outcome.node}\)", outcome.message)
    before, after = trial.claims(slot)
    assert outcome.node == before.team.split(",")[1], "ranks 2 and 3 are on the second node"
    assert before.node == before.team.split(",")[0]
    assert outcome.node not in after.team.split(",")
    assert outcome.seconds < SILENT + 20


def test_one_process_out_of_memory_is_a_memory_failure(trial: Trial) -> None:
    """With that process's error; the next attempt requests more memory and uses a smaller micro-batch."""
    outcome = first(trial, FULL)
    assert outcome.kind == FailureClass.memory.name
    assert "rank 1 (process" in outcome.detail
    assert "CUDA out of memory" in outcome.message
    assert [claim.relief for claim in trial.claims(FULL)] == [0, 1]


def test_every_team_has_a_rendezvous_file_and_removes_it(trial: Trial) -> None:
    """Two nodes of three each: those that ran at the same time shared one."""
    begun = [trial.claims(slot)[0] for slot in BEHAVIOURS]
    spans = sorted((claim.started, claim.started + first(trial, slot).seconds) for slot, claim in zip(BEHAVIOURS, begun, strict=True))
    assert any(later < end for (_, end), (later, _) in itertools.pairwise(spans))
    assert len({node for claim in begun for node in claim.team.split(",")}) <= 3
    assert not list(trial.layout.teams.iterdir())


def test_log_lines_of_followers_name_their_rank(trial: Trial) -> None:
    """Followers write to the log of the array task, each line with its rank."""
    log = trial.claims(LOST)[1].log
    assert {f"rank {rank}" for rank in (1, 2, 3)} == set(re.findall(r"rank \d(?=: finetune)", Path(log).read_text()))
