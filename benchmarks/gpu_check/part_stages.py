"""Part 3: every stage and method on small models, computed on the CPU and on the device from the same upstream artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_check import compare
from benchmarks.gpu_check.corpora import tones
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.recipes import FOLD, LAYER_NORM, STAGES, calls_of, small_recipe
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.stage_runs import ON_CPU, Bench, Ran, comparable, on
from ser_core.clustering.pseudo_labels import read_labels
from ser_core.corpora.manifest import load_manifest
from ser_core.models.backbone import load_encoder
from ser_core.models.front_end import project_independent
from ser_core.registry import REGISTRY
from ser_core.settings.execution import Precision
from ser_core.settings.recipe import Recipe
from ser_core.stages.states import FRAMES
from ser_core.training.evaluate import PREDICTIONS
from ser_core.training.splits import Split

STEPS, FEW_STEPS = 20, 4
SLOW_SECONDS = 15.0  # what one comparison may take on a slow machine


def run(record: Record, plan: Plan) -> None:
    """Compare in float32 first, then in the types that the device has units for, then the preset `published` and other norms."""
    corpus = tones(plan.folder)
    bench = Bench(corpus.folder, plan.folder / "stages", threads=1)  # the models are small
    steps = FEW_STEPS if plan.small else STEPS
    with comparable():
        plain = small_recipe(Precision.float32, steps=steps)
        compare_features(record, plain, corpus.folder, plan.device)
        made = compare_stages(record, bench, plain, plan.device, "float32", "")
        compare_clusters(record, bench, plain, made, plan.device)
        compare_methods(record, bench, plain, made, plan.device)
        for precision in _precisions(plan.device):
            if record.has_time(SLOW_SECONDS, precision.name):
                recipe = small_recipe(precision, steps=steps)
                compare_stages(record, bench, recipe, plan.device, precision.name, "", expected_runs=made)
        if record.has_time(SLOW_SECONDS, "preset published"):
            published = small_recipe(Precision.float32, reference=True, steps=steps)
            compare_stages(record, bench, published, plan.device, "float32", "preset published, ")
        if record.has_time(SLOW_SECONDS, "layer norm"):
            large = small_recipe(Precision.float32, steps=steps, backbone=LAYER_NORM)
            compare_stages(record, bench, large, plan.device, "float32", "layer-norm model, ", stages=("finetune", "tapt"))


def compare_features(record: Record, recipe: Recipe, corpus: Path, device: str) -> None:
    """The output of the front end for every utterance; without a GPU that of transformers' modules."""
    model = load_encoder(recipe.backbone)
    manifest = load_manifest(corpus)
    split = Split(manifest, manifest.training(FOLD))
    waves = [split.wave(position) for position in range(len(split))]
    expected = [each.numpy() for each in project_independent(model, waves)]
    with torch.no_grad():
        if device == "cuda":
            found = [each.cpu().numpy() for each in project_independent(model.to(device), waves)]
        else:
            found = [model.feature_projection(model.feature_extractor(wave[None]).transpose(1, 2))[0][0].numpy() for wave in waves]
    worst = max(compare.array_difference(a, b) for a, b in zip(expected, found, strict=True))
    text = f"{len(found)} utterances, largest difference {worst:.1e} of the largest feature (allowed {compare.FEATURES:.0e})"
    record.proof("features", worst <= compare.FEATURES, text)


def compare_stages(
    record: Record,
    bench: Bench,
    recipe: Recipe,
    device: str,
    precision: str,
    label: str,
    *,
    stages: tuple[str, ...] = STAGES,
    expected_runs: Mapping[str, Ran] | None = None,
) -> dict[str, Ran]:
    """Compare the stages with `expected_runs`, by default those of the same recipe on the CPU; return them.

    Both sides of P-TAPT's stage 3 read the clusters of the CPU.
    """
    tolerance = compare.TOLERANCES[precision]
    calls = calls_of(recipe)
    made: dict[str, Ran] = dict(expected_runs or {})
    for stage in stages:
        if stage not in made:
            upstream: Mapping[str, Path] = {}
            if stage == "ptapt":
                states = {"states": made["states"].output}
                upstream = {role: bench.run(call, ON_CPU, upstream=states).output for role, call in calls["ptapt"].upstream.items()}
            made[stage] = bench.run(calls[stage], ON_CPU, upstream=upstream)
        expected = made[stage]
        found = bench.run(calls[stage], on(device), upstream=expected.upstream, shared=bench.root / f"shared-{device}")
        holds, text = compare.same_losses(expected.losses, found.losses, tolerance)
        record.proof(f"{label}{precision}, losses of {stage}", holds, text)
        if stage == "finetune":
            record.proof(f"{label}{precision}, test of {stage}", *_predictions(expected, found, tolerance))
        if stage == "states" and precision == "float32":
            frames = [np.load(each.output / FRAMES) for each in (expected, found)]
            difference = compare.norm_difference(*frames)
            shown = f"{frames[1].shape} emotion states, relative error {difference:.1e} (allowed {compare.FRAMES:.0e})"
            record.proof(f"{label}{precision}, frames of {stage}", difference <= compare.FRAMES, shown)
            holds, text = compare.same_losses(expected.validation, found.validation, tolerance)
            record.proof(f"{label}{precision}, validation of {stage}", holds, text)
    return made


def compare_clusters(record: Record, bench: Bench, recipe: Recipe, made: Mapping[str, Ran], device: str) -> None:
    """k-means from the same frames; without a GPU with another number of threads, which must give the same bits."""
    states = {"states": made["states"].output}
    for role, call in calls_of(recipe)["ptapt"].upstream.items():
        expected = bench.run(call, ON_CPU, upstream=states, threads=2)
        found = bench.run(call, on(device), upstream=states, threads=1)
        ids = [utterance.id for utterance in load_manifest(bench.corpus).training(FOLD)]
        labels = [np.concatenate(read_labels(each.output, ids)) for each in (expected, found)]
        same = float((labels[0] == labels[1]).mean())
        inertia = compare.largest_difference([expected.outcome["metrics"]["inertia"]], [found.outcome["metrics"]["inertia"]])
        text = (
            f"{100 * same:.2f} % of {len(labels[0])} labels equal (needed {100 * compare.LABELS:.0f} %), inertia differs by {inertia:.1e}"
        )
        record.proof(f"k-means, {role}", same >= compare.LABELS and inertia <= compare.INERTIA, text)


def compare_methods(record: Record, bench: Bench, recipe: Recipe, made: Mapping[str, Ran], device: str) -> None:
    """The fine-tuning that ends each method, from the encoder that the CPU has pretrained."""
    tolerance = compare.TOLERANCES["float32"]
    for method in ("tapt", "ptapt"):
        call = REGISTRY.call(method, recipe, fold=FOLD, seed=0)
        upstream = {"backbone": made[method].output}
        expected, found = bench.run(call, ON_CPU, upstream=upstream), bench.run(call, on(device), upstream=upstream)
        holds, text = compare.same_losses(expected.losses, found.losses, tolerance)
        record.proof(f"fine-tuning after {method}, losses", holds, text)
        record.proof(f"fine-tuning after {method}, test", *_predictions(expected, found, tolerance))


def _predictions(expected: Ran, found: Ran, tolerance: compare.Tolerance) -> tuple[bool, str]:
    return compare.same_predictions(expected.output / PREDICTIONS, found.output / PREDICTIONS, tolerance)


def _precisions(device: str) -> list[Precision]:
    """bfloat16 and float16 on a GPU, bfloat16 on a CPU, where this project's encoder stays float32 between the products."""
    return [Precision.bfloat16, Precision.float16] if device == "cuda" else [Precision.bfloat16]
