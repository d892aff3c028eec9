"""What `doctor EXPERIMENT` says of corpus and checkpoints, here and on a compute node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.commands.doctor import collect_slurm, examine, probe
from jobs.commands.doctor_checks import Verdict
from jobs.commands.needs import Needs, judge_files, judge_needs, stages_of
from jobs.experiment.config import Cluster, Experiment, SlurmSite, StageResources
from jobs.slurm.client import SlurmClient
from ser_core.models.needed_weights import NeededWeights, needed_weights
from ser_core.registry import REGISTRY
from ser_core.settings.recipe import Recipe
from tests.command_line import ROOT
from tests.slurm_cluster import Cluster as SlurmCluster


def test_weights_of_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub name that is in the cache or not, a folder, a path that is not there; random weights need nothing."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = Recipe()
    recipe.backbone.checkpoint, recipe.backbone.revision = "own/small", "1" * 40
    (found,) = needed_weights("vft", recipe)
    assert (found.key, found.path, found.downloadable) == ("recipe.backbone.checkpoint", "", True)
    assert f"run `hf download own/small --revision {'1' * 40}`" in found.missing
    snapshot = tmp_path / "hub" / "models--own--small" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    assert needed_weights("tapt", recipe) == [NeededWeights("recipe.backbone.checkpoint", str(snapshot))]
    recipe.backbone.checkpoint = str(tmp_path / "nowhere")
    recipe.states.wav2vec.checkpoint = str(tmp_path / "wav2vec_large.pt")
    backbone, wav2vec = needed_weights("ptapt", recipe)
    assert "no such backbone folder" in backbone.missing
    assert "no such wav2vec checkpoint; set recipe.states.wav2vec.checkpoint" in wav2vec.missing
    assert (backbone.downloadable, wav2vec.downloadable) == (False, False)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "wav2vec_large.pt").touch()
    assert [each.path for each in needed_weights("ptapt", recipe)] == [str(tmp_path / "nowhere"), str(tmp_path / "wav2vec_large.pt")]
    recipe.backbone.checkpoint = recipe.states.wav2vec.checkpoint = None
    assert needed_weights("ptapt", recipe) == []


def test_what_is_missing_is_a_problem_and_what_can_be_downloaded_a_note() -> None:
    """Nodes must see what is there."""
    weights = (NeededWeights("a", "/models/a"), NeededWeights("b", missing="gone"), NeededWeights("c", missing="far", downloadable=True))
    checks = judge_needs(Needs("mine", Path("/data/mine"), weights=weights))
    assert [(each.name, each.verdict) for each in checks] == [
        ("corpus", Verdict.ok),
        ("weights", Verdict.ok),
        ("weights", Verdict.problem),
        ("weights", Verdict.note),
    ]
    assert Needs("mine", Path("/data/mine"), weights=weights).files == ("/data/mine", "/models/a")
    missing = Needs("mine", Path("/data/mine"), problem="corpus 'mine' is not prepared\nmore", weights=weights)
    assert (judge_needs(missing)[0].verdict, judge_needs(missing)[0].text) == (Verdict.problem, "corpus 'mine' is not prepared")
    assert missing.files == ("/models/a",)
    assert judge_files("n1", ()) == []
    (unseen,) = judge_files("n1", ("/models/a",))
    assert (unseen.verdict, unseen.text) == (Verdict.problem, "n1 does not see /models/a")


def test_stages_of_methods() -> None:
    """Only those that the methods need, upstream first."""
    recipe = Recipe()
    recipe.backbone.checkpoint, recipe.backbone.config = None, {"hidden_size": 8}
    calls = [REGISTRY.call(method, recipe, fold="", seed=0) for method in ("vft", "tapt")]
    assert stages_of(calls[:1]) == ("finetune",)
    assert stages_of(calls) == ("finetune", "tapt")


@pytest.mark.slurm
def test_a_node_looks_for_what_the_stages_read(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    """The probe job reports which files it does not see; what a stage without an entry in `resources` asks for is tried too."""
    here, gone = tmp_path / "here", tmp_path / "gone"
    here.mkdir()
    (tmp_path / "results").mkdir()
    facts = probe(SlurmClient(), SlurmSite(), tmp_path / "results", files=[str(here), str(gone)])
    assert facts.unseen == (str(gone),)
    experiment = Experiment(name="t", corpus="c", cluster=Cluster.slurm, resources={"default": StageResources(cpus=1, gpus=1, memory_gb=1)})
    assert collect_slurm(SlurmClient(), SlurmSite(), experiment, ("tapt",)).refused == {}
    greedy = replace(experiment, resources={"default": StageResources(cpus=1, gpus=9), "finetune": StageResources(gpus=0)})
    assert list(collect_slurm(SlurmClient(), SlurmSite(), greedy, ("finetune", "tapt")).refused) == ["default", "tapt"]
    needs = Needs("c", here, weights=(NeededWeights("k", str(gone)),), stages=("finetune",))
    checks = examine(tmp_path / "results", source=ROOT, experiment=experiment, needs=needs)
    (unseen,) = [each.text for each in checks if each.name == "files"]
    assert unseen.endswith(f" does not see {gone}")
