from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ser_core.corpora.validation import FIXED_PART
from ser_core.errors import InputError
from ser_core.registry import REGISTRY, VERSIONS, StageCall
from ser_core.settings.backbone import BackboneSettings, Padding, Wav2vecSettings
from ser_core.settings.execution import Attention, FeatureCache
from ser_core.settings.finetune import Pooling
from ser_core.settings.recipe import Protocol, Recipe
from ser_core.settings.text import CrossSettings, FusedLayerSettings

ROOT = Path(__file__).parents[2]


def recipe(**changes: Any) -> Recipe:
    wav2vec = Wav2vecSettings(config={"conv_feature_layers": [[8, 10, 5], [8, 8, 4]]})
    chosen = Recipe(backbone=BackboneSettings(checkpoint=None, config={"hidden_size": 8}), **changes)
    chosen.states.wav2vec = wav2vec
    return chosen


def stages(call: StageCall) -> dict[str, StageCall]:
    found = {call.stage if call.stage != "cluster" else f"cluster {call.settings['k']}": call}
    for parent in call.upstream.values():
        found |= stages(parent)
    return found


def test_methods_need_the_stages_of_the_paper() -> None:
    """V-FT is fine-tuning alone; TAPT comes before it; P-TAPT reads one cluster stage for each k, and these the emotion states."""
    calls = {method: REGISTRY.call(method, recipe(), fold="2", seed=7) for method in REGISTRY.default_methods}
    assert list(calls) == ["vft", "tapt", "ptapt"]
    assert calls["vft"].upstream == {}
    assert {role: parent.stage for role, parent in calls["tapt"].upstream.items()} == {"backbone": "tapt"}
    ptapt = calls["ptapt"].upstream["backbone"]
    counts = {role: parent.settings["k"] for role, parent in ptapt.upstream.items()}
    assert counts == {"clusters.64": 64, "clusters.512": 512, "clusters.4096": 4096}
    states = [parent.upstream["states"] for parent in ptapt.upstream.values()]
    assert states[0] == states[1] == states[2]
    assert all(call.version == VERSIONS[call.stage] for call in stages(calls["ptapt"]).values())


@pytest.mark.parametrize("method", [*REGISTRY.methods, *REGISTRY.measurements])
def test_what_a_method_does_not_read_is_in_no_key_of_its_stages(method: str) -> None:
    """Another value of such a setting changes no stage; of one that it reads, it does. A measurement reads a part of them."""

    def changes(other: Recipe) -> dict[str, Callable[[], None]]:
        return {
            "backbone": lambda: setattr(other.backbone, "init_seed", 9),
            "features": lambda: setattr(other.features, "padding", Padding.reference),
            "finetune": lambda: setattr(other.finetune, "epochs", 9),
            "tapt": lambda: setattr(other.tapt, "steps", 9),
            "states": lambda: setattr(other.states, "steps", 9),
            "cluster": lambda: setattr(other.cluster, "iterations", 9),
            "ptapt": lambda: setattr(other.ptapt, "steps", 9),
            "pretraining_loss": lambda: setattr(other.pretraining_loss, "draws", 9),
            "two_stage": lambda: setattr(other.two_stage, "target", "a*"),
            "text": lambda: other.text.__dict__.update(epochs=9, max_tokens=9),
            "fusion": lambda: other.fusion.__dict__.update(
                text_weight=0.9, layer=FusedLayerSettings(epochs=9), cross=CrossSettings(heads=9)
            ),
            "protocol": lambda: setattr(other, "protocol", Protocol.scripts_disjoint),
            "training_fraction": lambda: setattr(other, "training_fraction", 0.5),
            "upstream_seed": lambda: setattr(other, "upstream_seed", 9),
        }

    def changed(key: str) -> Recipe:
        other = recipe()
        changes(other)[key]()
        return other

    def planned(chosen: Recipe) -> StageCall:
        return replace(REGISTRY.call(method, chosen, fold="1", seed=0), runtime={})

    different = {key for key in changes(recipe()) if planned(changed(key)) != planned(recipe())}
    assert different <= set(recipe().reads(method))
    if method not in REGISTRY.measurements:
        assert different == set(recipe().reads(method)) & set(changes(recipe()))


def test_only_fine_tuning_takes_the_seed_of_the_run() -> None:
    """Upstream stages are the same for every seed, and follow `upstream_seed`."""
    first, second = (REGISTRY.call("ptapt", recipe(), fold="1", seed=seed) for seed in (1, 2))
    assert (first.seed, second.seed) == (1, 2)
    assert first.upstream == second.upstream
    other = REGISTRY.call("ptapt", recipe(upstream_seed=5), fold="1", seed=1)
    assert {call.seed for name, call in stages(other).items() if name != "finetune"} == {5}


def test_the_stages_that_load_pretrained_weights_state_their_origin() -> None:
    """The stage that starts from the backbone, and `states` from wav2vec v1; no stage that starts from an upstream artifact."""
    v1, v2 = (f"wav2vec {version} with random weights (seed 0)" for version in ("v1", "2.0"))
    for method, expected in (("vft", {"finetune": v2}), ("tapt", {"tapt": v2}), ("ptapt", {"states": v1, "ptapt": v2})):
        found = stages(REGISTRY.call(method, recipe(), fold="1", seed=0))
        assert {name: call.runtime["weights"] for name, call in found.items() if "weights" in call.runtime} == expected


def test_settings_are_json_and_hold_what_determines_the_output() -> None:
    """Every setting of a stage is included, enums by name; a backbone from an upstream stage is not included again."""
    found = stages(REGISTRY.call("ptapt", recipe(), fold="1", seed=0))
    for call in found.values():
        assert json.loads(json.dumps(call.settings)) == call.settings
        assert json.loads(json.dumps(call.runtime)) == call.runtime
    assert found["finetune"].settings["finetune"]["head"]["pooling"] == "paper"
    assert found["finetune"].settings["features"] == {"padding": "independent"}
    assert "backbone" not in found["finetune"].settings
    assert found["ptapt"].settings["backbone"] == {"config": {"hidden_size": 8}, "init_seed": 0}
    assert found["ptapt"].settings["counts"] == [64, 512, 4096]
    assert found["cluster 64"].settings == {"k": 64, "iterations": 20}
    assert "wav2vec" not in found["states"].settings["states"]
    assert REGISTRY.call("vft", recipe(), fold="1", seed=0).settings["backbone"] == {"config": {"hidden_size": 8}, "init_seed": 0}


def test_execution_settings_are_not_part_of_the_identity() -> None:
    """Device, cache, attention, batches of the test and the order of the counts change no settings."""
    one, other = recipe(), recipe()
    other.execution.device = "cuda"
    other.execution.feature_cache = FeatureCache.none
    other.execution.attention = Attention.eager
    other.execution.evaluation_batch = 1
    other.cluster.counts = [512, 4096, 64]
    first, second = (stages(REGISTRY.call("ptapt", each, fold="1", seed=0)) for each in (one, other))
    assert {name: call.settings for name, call in first.items()} == {name: call.settings for name, call in second.items()}
    assert second["tapt" if "tapt" in second else "ptapt"].runtime["execution"]["device"] == "cuda"


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda r: setattr(r.finetune.head, "pooling", Pooling.reference), {"finetune"}),
        (lambda r: setattr(r.features, "padding", Padding.reference), {"finetune", "ptapt"}),
        (lambda r: setattr(r.ptapt, "steps", 3), {"ptapt"}),
        (lambda r: setattr(r.cluster, "iterations", 3), {"cluster 64", "cluster 512", "cluster 4096"}),
        (lambda r: setattr(r.states, "steps", 3), {"states"}),
        (lambda r: setattr(r.states.wav2vec, "init_seed", 3), {"states"}),
        (lambda r: setattr(r.tapt, "steps", 3), set()),
    ],
)
def test_a_setting_changes_the_stages_it_belongs_to(change: Any, changed: set[str]) -> None:
    other = recipe()
    change(other)
    before, after = (stages(REGISTRY.call("ptapt", each, fold="1", seed=0)) for each in (recipe(), other))
    assert {name for name in before if before[name].settings != after[name].settings} == changed


def test_a_checkpoint_folder_counts_by_its_content(tmp_path: Path) -> None:
    """The content of the folder is part of the identity, its path is not."""
    identities = []
    for name, content in (("a", b"weights"), ("b", b"weights"), ("c", b"others")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "wav2vec2", "_name_or_path": name}))
        (folder / "model.safetensors").write_bytes(content)
        chosen = recipe()
        chosen.backbone = BackboneSettings(checkpoint=str(folder))
        call = REGISTRY.call("vft", chosen, fold="1", seed=0)
        assert call.runtime["backbone"]["checkpoint"] == str(folder)
        identities.append(call.settings["backbone"])
    assert identities[0] == identities[1] != identities[2]


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'lora'.*vft, tapt, ptapt"):
        REGISTRY.call("lora", recipe(), fold="1", seed=0)


def test_a_missing_checkpoint_is_reported_while_planning(tmp_path: Path) -> None:
    chosen = recipe()
    chosen.states.wav2vec = Wav2vecSettings(checkpoint=str(tmp_path / "wav2vec_large.pt"))
    with pytest.raises(InputError, match=r"wav2vec_large\.pt"):
        REGISTRY.call("ptapt", chosen, fold="1", seed=0)
    REGISTRY.call("vft", chosen, fold="1", seed=0)  # which does not need it


def test_the_paper_s_own_recipe_is_in_range() -> None:
    REGISTRY.check(Recipe())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda r: setattr(r.finetune, "epochs", 0), "recipe.finetune.epochs=0: must be at least 1"),
        (lambda r: setattr(r.finetune, "learning_rate", 0.0), "recipe.finetune.learning_rate=0.0: must be above 0"),
        (lambda r: setattr(r.tapt, "learning_rate", float("nan")), "recipe.tapt.learning_rate=nan: must be above 0"),
        (lambda r: setattr(r.finetune.spec_augment, "time_probability", 1.5), "time_probability=1.5: must lie between 0 and 1"),
        (lambda r: setattr(r.cluster, "counts", []), "name at least one"),
        (lambda r: setattr(r.cluster, "counts", [8, 8]), "each number of clusters once"),
        (lambda r: setattr(r.cluster, "counts", [1, 8]), "1 is not a number of clusters"),
        (lambda r: setattr(r.states, "validation_fraction", 0.0), "both excluded"),
        (lambda r: setattr(r.execution, "device", "tpu"), "known are auto, cpu, cuda"),
        (lambda r: setattr(r.ptapt, "mask_probability", 0.0), "nothing to predict"),
    ],
)
def test_a_value_out_of_range_is_one_line(change: Any, line: str) -> None:
    chosen = Recipe()
    change(chosen)
    with pytest.raises(InputError) as refused:
        REGISTRY.check(chosen)
    assert len(refused.value.problems) == 1
    assert line in refused.value.problems[0]


def test_all_problems_are_reported_at_once() -> None:
    chosen = Recipe()
    chosen.finetune.epochs = 0
    chosen.tapt.steps = 0
    with pytest.raises(InputError) as refused:
        REGISTRY.check(chosen)
    assert len(refused.value.problems) == 2


def identity(call: StageCall) -> str:
    """A digest of everything that determines a key, except the corpus."""
    upstream = {role: identity(parent) for role, parent in sorted(call.upstream.items())}
    facts = [call.stage, call.version, call.settings, call.fold, call.seed, upstream]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def test_keys_of_a_grid_are_unchanged() -> None:
    """If their keys changed unintentionally, every existing result would be computed again. Their settings contain no validation."""
    for method, expected in (("vft", "4f6cf378e9bb69df"), ("tapt", "1397ef33e99014f8"), ("ptapt", "03ad8be666150970")):
        call = REGISTRY.calls(method, recipe())("2", 7)
        assert identity(call) == expected, method
        assert call == REGISTRY.call(method, recipe(), fold="2", seed=7)
        assert not any("validation" in each.settings for each in stages(call).values())


@pytest.mark.parametrize("method", REGISTRY.methods)
def test_settings_of_every_stage_of_a_sweep_name_the_validation_speakers(method: str) -> None:
    """Sorted and unique, in addition to the settings of the grid, for every method and any order of the speakers."""
    grid, sweep = (stages(REGISTRY.calls(method, recipe(), each)("2", 7)) for each in (None, {"2": ("M3", "F3", "M3"), "1": ("F2",)}))
    assert {name: {**call.settings, "validation": ["F3", "M3"]} for name, call in grid.items()} == {
        name: call.settings for name, call in sweep.items()
    }
    assert {name: (call.version, call.runtime, call.seed) for name, call in grid.items()} == {
        name: (call.version, call.runtime, call.seed) for name, call in sweep.items()
    }


def test_a_validation_part_changes_the_fine_tuning_alone() -> None:
    """No stage of the grid trains on it either, so all upstream stages are the grid's and computed once for both."""
    grid, sweep = (REGISTRY.calls("ptapt", recipe(), each)("2", 7) for each in (None, {"2": FIXED_PART}))
    assert sweep.upstream == grid.upstream
    assert sweep.settings == {**grid.settings, "validation": list(FIXED_PART)}


@pytest.mark.parametrize("validation", [{}, {"1": ("F2",)}, {"2": ()}])
def test_a_sweep_s_run_without_validation_is_refused(validation: dict[str, tuple[str, ...]]) -> None:
    """It would be tested on the held-out fold."""
    with pytest.raises(InputError, match="fold '2': no validation speakers"):
        REGISTRY.calls("ptapt", recipe(), validation)("2", 7)


def test_planning_imports_nothing_heavy() -> None:
    """The command line imports the registry at every start, without numpy, torch and the like."""
    code = "import sys, ser_core.registry; print(sorted({name.split('.')[0] for name in sys.modules} & set(sys.argv[1:])))"
    heavy = ["numpy", "torch", "transformers", "omegaconf", "sklearn", "soundfile", "fairseq"]
    found = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_preloading_starts_no_thread() -> None:
    """After `preload` everything a stage imports is there, and this process has one thread."""
    code = (
        "import sys, threading; from ser_core.registry import REGISTRY; REGISTRY.preload(); "
        "print(threading.active_count(), all(name in sys.modules for name in "
        "['torch', 'transformers', 'sklearn.metrics', 'tensorboard', 'ser_core.stages.finetune']))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "True"]
