"""A dry run shows the scripts and touches neither disk nor Slurm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.control.executor_protocol import Limits
from jobs.control.facts import InFlight, Phase
from jobs.errors import UsageError
from jobs.experiment.config import SlurmSite
from jobs.slurm.submissions import State, SubmissionBook, new_submission
from jobs.store.snapshot import take_snapshot
from tests.jobs.slurm_cases import arrays_of, batch_of, experiment_of, graph_of, layout_of, node


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_whole_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three arrays; placeholders stand for job ids that are known only after submission. No Slurm command is in PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    states = [node(f"s{fold}", "states", fold=str(fold)) for fold in range(2)]
    cluster = [node(f"c{fold}", "cluster", {"states": f"s{fold}"}, fold=str(fold)) for fold in range(2)]
    runs = [node(f"r{fold}{seed}", "finetune", {"cluster": f"c{fold}"}, fold=str(fold)) for fold in range(2) for seed in range(3)]
    graph = graph_of([*states, *cluster, *runs])
    arrays = arrays_of(tmp_path, experiment_of(throttle=2))
    before = everything(tmp_path)
    found = arrays.previews([batch_of(states), batch_of(cluster), batch_of(runs)], graph, {})
    assert everything(tmp_path) == before
    assert "#SBATCH --dependency=singleton" in found[0].script
    assert "#SBATCH --dependency=aftercorr:JOB1,singleton" in found[1].script
    assert "#SBATCH --dependency=afterok:JOB2_0:JOB2_1,singleton" in found[2].script
    assert "#SBATCH --array=0-5%2" in found[2].script
    assert found[2].refinements == (
        "scontrol update JobId=JOB_[0-2] Dependency=afterok:JOB2_0",
        "scontrol update JobId=JOB_[3-5] Dependency=afterok:JOB2_1",
    )
    assert len({preview.name for preview in found}) == 3


def test_a_preview_equals_the_submission(tmp_path: Path) -> None:
    """The folder that it names is the snapshot that a launch would take."""
    nodes = [node("a", "states"), node("b", "tapt", {"states": "a"})]
    arrays = arrays_of(tmp_path)
    preview = arrays.preview(batch_of(nodes[1:]), graph_of(nodes), {"a": InFlight(Phase.running, "77_3")})
    assert "--dependency=afterok:77_3,singleton" in preview.script
    snapshot = take_snapshot(tmp_path / "source", layout_of(tmp_path))
    assert f"cd -- {snapshot.path} " in preview.script


def test_scripts_name_the_results_folder_as_its_user_does(tmp_path: Path) -> None:
    """Not what a symbolic link of an automounter leads to: compute nodes may mount it elsewhere."""
    (tmp_path / "mounted-here-only").mkdir()
    home = tmp_path / "home"
    home.symlink_to("mounted-here-only")
    nodes = [node("a", "states")]
    preview = arrays_of(home).preview(batch_of(nodes), graph_of(nodes), {})
    assert f"cd -- {layout_of(home).snapshots}/" in preview.script
    assert str(layout_of(home).logs) in preview.script
    assert "mounted-here-only" not in preview.script
    assert preview.name == arrays_of(tmp_path / "mounted-here-only").preview(batch_of(nodes), graph_of(nodes), {}).name


def test_stages_downstream_of_an_unknown_outcome_are_deferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command is called, nothing is written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    nodes = [node("a", "states"), node("b", "tapt", {"states": "a"})]
    arrays = arrays_of(tmp_path)
    before = everything(tmp_path)
    assert arrays.submit(batch_of(nodes[1:]), graph_of(nodes), {"a": InFlight(Phase.queued, "?trial.states")}) == {}
    assert arrays.in_flight() == {}
    assert everything(tmp_path) == before


def test_a_dry_run_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was submitted counts as queued, the limits are the profile's, and a real pass fails with one line."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    arrays = arrays_of(tmp_path, experiment_of(SlurmSite(max_array_size=7)))
    before = everything(tmp_path)
    assert arrays.look_only() == {}
    assert arrays.live_jobs() is None
    assert arrays.limits() == Limits(array_size=7)
    assert everything(tmp_path) == before
    nodes = [node("a", "states")]
    with pytest.raises(UsageError, match="not in PATH"):
        arrays_of(tmp_path).submit(batch_of(nodes), graph_of(nodes), {})
    assert arrays_of(tmp_path).in_flight() == {}, "no intent stays of what was never asked for"
    book = SubmissionBook(layout_of(tmp_path))
    book.begin(replace(new_submission("trial.states.vft.0.1", batch_of(nodes), 1.0), state=State.submitted, job="12"))
    assert arrays_of(tmp_path).look_only() == {"a": InFlight(Phase.queued, "12_0")}
