"""Content keys of the shipped experiments: a key that changes makes every result of its stage be computed again."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from jobs.experiment.config import load_experiment
from jobs.experiment.launched import Corpus, launch
from jobs.store.layout import Layout
from jobs.sweeps.records import folds_of
from jobs.sweeps.space import listed_points
from jobs.sweeps.stages import point_graph, sweep_digest
from ser_core.registry import REGISTRY
from ser_core.settings.recipe import Recipe

ROOT = Path(__file__).parents[1]
WITHOUT_CHECKPOINT = "methods=[vft,tapt]"  # P-TAPT of these reads the digest of a wav2vec checkpoint file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folds", "overrides", "stages", "digest"),
    [
        ("demo", 5, (), 105, "7203b1439f3e8fe80b44a2f1"),
        ("emodb", 5, (), 75, "dfed1b95138b59eb7cc25be1"),
        ("emodb-peft", 5, (), 75, "a1ea5a04aec6dc3524dc621f"),
        ("emodb-backbones", 5, (), 225, "d8da35503a1a9ea78326dd8d"),
        ("iemocap-peft", 5, (), 225, "ac1529d48bc2d2d8424d7927"),
        ("iemocap-peft", 5, ("methods=[vft]",), 25, "067d5c9be8b1ec142b09f6ad"),  # the same stages as the next one
        ("iemocap", 5, ("methods=[vft]",), 25, "067d5c9be8b1ec142b09f6ad"),
        ("emodb-base", 10, (WITHOUT_CHECKPOINT,), 410, "3bfb543911cf3f854e1ba038"),
        ("iemocap", 5, (WITHOUT_CHECKPOINT,), 55, "9f12976a1a53eec7625d73b9"),
        ("iemocap", 5, (WITHOUT_CHECKPOINT, "seeds=3", "first_seed=7"), 35, "7676511f1592211621c87e9e"),
        ("savee", 4, (WITHOUT_CHECKPOINT,), 164, "ba3373c9cfad45758ce9b86a"),
    ],
)
def test_keys_of_the_shipped_experiments_change_only_with_a_stage_version(
    name: str, folds: int, overrides: tuple[str, ...], stages: int, digest: str
) -> None:
    """A digest here changes together with a version in ser_core/registry.py or a default in configs/, never by a change of structure."""
    experiment = load_experiment(name, list(overrides), configs=ROOT / "configs", recipe_schema=Recipe)
    corpus = Corpus(experiment.corpus, "d" * 64, tuple(str(fold) for fold in range(1, folds + 1)), "/nowhere")
    keys = list(launch(experiment, corpus, REGISTRY, Layout(Path("/nowhere"), name)).graph.nodes)
    assert len(keys) == stages
    assert hashlib.sha256(" ".join(keys).encode()).hexdigest()[:24] == digest


@pytest.mark.slow
def test_audio_and_text_share_the_stages_of_audio() -> None:
    """Of V-FT and TAPT nothing is computed again; what is new is text, fusion, and V-FT with disjoint scripts."""
    corpus = Corpus("iemocap", "d" * 64, tuple("12345"), "/nowhere")
    graphs = []
    for name, overrides in (("iemocap", [WITHOUT_CHECKPOINT]), ("iemocap-text", [])):
        experiment = load_experiment(name, overrides, configs=ROOT / "configs", recipe_schema=Recipe)
        graphs.append(launch(experiment, corpus, REGISTRY, Layout(Path("/nowhere"), name)).graph)
    alone, fused = (graph.nodes for graph in graphs)
    assert set(alone) <= set(fused)
    new = Counter(node.stage + (", disjoint" if "protocol" in node.settings else "") for key, node in fused.items() if key not in alone)
    disjoint = {f"{stage}, disjoint": 25 for stage in ("finetune", "text", "score", "concat", "cross")}
    assert new == {"text": 25, "score": 50, "concat": 50, "cross": 25, **disjoint}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "corpora"), [("emodb-shift", ("demo", "emodb")), ("iemocap-shift", ("savee", "iemocap"))])
def test_a_domain_shift_is_one_stage_for_a_corpus(name: str, corpora: tuple[str, ...]) -> None:
    """Named after the corpus; beside the methods of another experiment on it, the same checkpoint is not measured again."""
    keys = []
    for corpus in corpora:
        experiment = load_experiment(name, [f"corpus={corpus}", f"name={corpus}-shift"], configs=ROOT / "configs", recipe_schema=Recipe)
        prepared = Corpus(corpus, corpus * 9, ("1", "2"), "/nowhere")
        [key] = launch(experiment, prepared, REGISTRY, Layout(Path("/nowhere"), name)).graph.nodes
        keys.append(key)
    assert len(set(keys)) == 2
    beside = load_experiment(corpora[1], ["methods=[vft,pretraining_loss]", "table=null"], configs=ROOT / "configs", recipe_schema=Recipe)
    prepared = Corpus(corpora[1], corpora[1] * 9, ("1",), "/nowhere")
    assert keys[1] in launch(beside, prepared, REGISTRY, Layout(Path("/nowhere"), name)).graph.nodes


@pytest.mark.parametrize(
    ("name", "folds", "stages", "keys", "sweep"),
    [("demo", 2, 36, "8f5b1d6f5e3eda080ea22a54", "c3e69a96bfec"), ("emodb", 5, 190, "8f9a0cae8128a918cef965c8", "67e8a5d3a7da")],
)
def test_keys_of_the_shipped_sweeps_change_only_with_a_stage_version(name: str, folds: int, stages: int, keys: str, sweep: str) -> None:
    """Pinned with the code in which Ray computed sweeps, and the recipes of today: nothing that it computed is computed again."""
    experiment = load_experiment(name, [], configs=ROOT / "configs", recipe_schema=Recipe)
    corpus = Corpus(experiment.corpus, "d" * 64, tuple(str(fold) for fold in range(1, folds + 1)), "/nowhere")
    validation = {fold: (f"speaker of {fold}",) for fold in corpus.folds}
    points = listed_points(experiment)
    assert points is not None
    graphs = [point_graph(experiment, corpus, point, folds_of(experiment, corpus), validation, REGISTRY) for point in points]
    found = sorted({key for graph in graphs for key in graph.nodes})
    assert len(found) == stages
    assert hashlib.sha256(" ".join(found).encode()).hexdigest()[:24] == keys
    assert sweep_digest(experiment, corpus, validation, REGISTRY) == sweep


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subsets", "whole", "folds", "overrides", "shared", "more"),
    [
        ("emodb-subsets", "emodb", ("03-08", "other"), ("seeds=3",), 15, 45),
        ("iemocap-subsets", "iemocap", tuple("12345"), ("seeds=5",), 11, 33),
    ],
)
def test_all_of_the_training_utterances_need_no_stage_of_their_own(
    subsets: str, whole: str, folds: tuple[str, ...], overrides: tuple[str, ...], shared: int, more: int
) -> None:
    """The stages on everything are those of the experiment without subsets; each smaller part has as many of its own."""
    keys = []
    for name in (subsets, whole):
        experiment = load_experiment(name, list(overrides), configs=ROOT / "configs", recipe_schema=Recipe)
        if whole == "iemocap":
            experiment.methods = [method for method in experiment.methods if not method.startswith("ptapt")]
        corpus = Corpus(experiment.corpus, "d" * 64, folds, "/nowhere")
        keys.append(set(launch(experiment, corpus, REGISTRY, Layout(Path("/nowhere"), name)).graph.nodes))
    assert (len(keys[0] & keys[1]), len(keys[0] - keys[1])) == (shared, more)
