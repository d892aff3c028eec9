"""Stages of earlier settings in Slurm's queue when an experiment is launched again with others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.commands.relaunch import OldStages, settle_old_stages, unneeded_now
from jobs.commands.session import Session
from jobs.control.facts import Phase
from jobs.experiment.launched import Corpus, LastLaunch, Launched
from jobs.experiment.stored_config import resolved_values
from tests.jobs.slurm_cases import arrays_of, batch_of, drained, experiment_of, facts_of, graph_of, layout_of, node, place_of
from tests.slurm_cluster import Cluster
from tests.waiting import until

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(("choice", "answer"), [("ask", None), ("ask", True), ("ask", False), ("withdraw", None), ("keep", None)])
def test_what_nobody_needs_any_more_is_withdrawn_or_kept(
    slurm_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], choice: str, answer: bool | None
) -> None:
    """One stage of three is needed by the new settings. Where nobody can be asked the other two are withdrawn; running ones are warned."""
    nodes = [node(f"key{number}", "finetune", sleep=90) for number in range(3)]
    experiment, corpus = experiment_of(throttle=2), Corpus("test", "0" * 64, ("1",), str(tmp_path))
    arrays = arrays_of(tmp_path, experiment)
    arrays.submit(batch_of(nodes), graph_of(nodes), {})
    until(lambda: all(facts_of(tmp_path, key, begun=True) for key in ("key0", "key1")))
    now = graph_of(nodes[:1])
    launched = Launched(replace(experiment, seeds=1), corpus, now, layout_of(tmp_path), 1.0, lambda generations: now)
    former = LastLaunch(resolved_values(experiment), corpus, 0.0, graph_of(nodes))
    session = Session(launched, place_of(tmp_path), tmp_path / "source", tmp_path / "published.yaml", new=True, former=former)
    old = unneeded_now(session)
    assert (old.queued, old.running) == (("key2",), ("key1",))
    asked: list[str] = []

    def reply(text: str) -> bool:
        asked.append(text)
        return bool(answer)

    settle_old_stages(session, OldStages[choice], None if answer is None else reply)
    errors = capsys.readouterr().err
    assert "trial differs from its last launch" in errors
    assert "  seeds: 5 -> 1\n" in errors
    assert "1 queued and 1 running stages of earlier settings" in (asked or [errors])[0]
    kept = choice == "keep" or answer is False
    assert session.launched.keep_old is kept
    if kept:
        assert {key: each.phase for key, each in arrays.in_flight().items()} == {
            "key0": Phase.running,
            "key1": Phase.running,
            "key2": Phase.queued,
        }
    else:
        until(lambda: set(arrays.in_flight()) == {"key0"})
        until(lambda: facts_of(tmp_path, "key1") is not None)
        assert (facts_of(tmp_path, "key1") or {})["signals"] == ["SIGTERM"]
        assert facts_of(tmp_path, "key2", begun=True) is None
        until(lambda: bool(arrays.departures(["key1"])))
        assert all(each.withdrawn for each in arrays.departures(["key1"])["key1"])
    arrays.cancel_all()
    until(drained(arrays))
