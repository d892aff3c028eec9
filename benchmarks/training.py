"""Seconds of each gradient stage, ours beside a `reference` setting that computes as the authors' loop does, in one run.

    python benchmarks/training.py --backbone tiny --utterances 64
    python benchmarks/training.py --backbone base --utterances 16 --batch-size 8 --batch-seconds 30 --precision bfloat16

Both settings are the stages of this project, on the same utterances: noise of IEMOCAP-like lengths (log-normal, mean 4.5 s, at most 10 s).
`reference`: random batches padded to the longest, front end computed at every step, float32, eager attention, test in batches of one.
`ours`: features of a frozen front end computed once, a batch cut into parts of similar length, the precision asked for, test in batches
by length. Medians of the steps; an epoch is its steps and, for fine-tuning, its share of the front end over the recipe's epochs.
The shape of the table, not the seconds, carries over to other machines: run it on the one you have.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ser_core.corpora.manifest import SAMPLE_RATE, Manifest, Utterance, write_manifest
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings import (
    Attention,
    BackboneSettings,
    ClusterSettings,
    ExecutionSettings,
    FeatureCache,
    FeatureSettings,
    FinetuneSettings,
    Padding,
    Precision,
    PtaptSettings,
    Recipe,
    SpecAugmentSettings,
    StatesSettings,
    TaptSettings,
    Wav2vecSettings,
)
from ser_core.training.batches import bucketed_epoch

MEAN_SECONDS, SPREAD, SHORTEST_SECONDS, LONGEST_SECONDS = 4.5, 0.55, 0.6, 10.0
CLASSES = ("angry", "happy", "neutral", "sad")
EPOCHS = 15  # of the paper: what the front end's one pass is shared by

TINY_BACKBONE = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "conv_dim": [64] * 7,
    "num_conv_pos_embeddings": 32,
    "num_codevectors_per_group": 32,
    "codevector_dim": 64,
    "proj_codevector_dim": 64,
    "mask_time_prob": 0.65,
}
BASE_BACKBONE = {"mask_time_prob": 0.65}  # the configuration's defaults are wav2vec2-base
TINY_WAV2VEC = {
    "conv_feature_layers": [[64, 10, 5], [64, 8, 4], [64, 4, 2], [64, 4, 2], [64, 4, 2]],
    "conv_aggregator_layers": [[64, 2, 1], [64, 3, 1]],
}
BASE_WAV2VEC = {"log_compression": True}  # wav2vec large


@dataclass(frozen=True)
class Measured:
    """One stage in one setting; seconds."""

    step: float
    epoch: float
    loss: float
    test_utterance: float | None


def noise_corpus(folder: Path, training: int, test: int) -> Manifest:
    """Utterances of noise: fold `train` to train on, fold `test` held out."""
    rng = np.random.default_rng(0)
    location = np.log(MEAN_SECONDS) - SPREAD**2 / 2
    (folder / "audio").mkdir(parents=True)
    utterances = []
    for number in range(training + test):
        seconds = float(np.clip(rng.lognormal(location, SPREAD), SHORTEST_SECONDS, LONGEST_SECONDS))
        samples = int(seconds * SAMPLE_RATE)
        path = f"audio/{number:05d}.flac"
        soundfile.write(folder / path, 0.05 * rng.standard_normal(samples), SAMPLE_RATE, subtype="PCM_16")
        fold = "train" if number < training else "test"
        utterances.append(Utterance(f"{number:05d}", path, samples, CLASSES[number % len(CLASSES)], f"speaker of {fold}", fold))
    return write_manifest(folder, "noise", ["test", "train"], utterances)


def make_recipe(options: argparse.Namespace, *, reference: bool) -> Recipe:
    """The same stages in one setting or the other."""
    tiny = options.backbone == "tiny"
    precision = Precision.float32 if reference else Precision[options.precision]
    pretraining: dict[str, Any] = {"steps": options.steps, "batch_seconds": options.batch_seconds, "precision": precision}
    spec_augment = SpecAugmentSettings(feature_length=16 if tiny else 64)
    return Recipe(
        backbone=BackboneSettings(checkpoint=None, config=TINY_BACKBONE if tiny else BASE_BACKBONE),
        features=FeatureSettings(Padding.reference if reference else Padding.independent),
        finetune=FinetuneSettings(epochs=1, batch_size=options.batch_size, spec_augment=spec_augment, precision=precision),
        tapt=TaptSettings(**pretraining),
        states=StatesSettings(
            wav2vec=Wav2vecSettings(config=TINY_WAV2VEC if tiny else BASE_WAV2VEC),
            steps=options.steps,
            batch_size=options.batch_size,
            spec_augment=spec_augment,
            precision=precision,
        ),
        cluster=ClusterSettings(counts=[8, 32], iterations=2),
        ptapt=PtaptSettings(**pretraining),
        execution=ExecutionSettings(
            attention=Attention.eager if reference else Attention.sdpa,
            feature_cache=FeatureCache.none if reference else FeatureCache.memory,
            micro_batch=0 if reference else options.micro_batch,
            evaluation_batch=1 if reference else 8,
            log_every=1,
        ),
    )


class Bench:
    """Runs each call once; upstream artifacts are shared."""

    def __init__(self, corpus: Manifest, root: Path, threads: int) -> None:
        self.corpus = corpus
        self.root = root
        self.threads = threads
        self.count = 0

    def run(self, call: StageCall) -> tuple[dict[str, Any], Path]:
        """Outcome and output folder of a call, computed after its upstream stages."""
        upstream = {role: self.run(parent)[1] for role, parent in call.upstream.items()}
        self.count += 1
        output = self.root / f"{self.count:03d}-{call.stage}"
        outcome = REGISTRY.run(
            call.stage,
            settings=call.settings,
            runtime={**call.runtime, "threads": self.threads},
            corpus=self.corpus.folder,
            fold=call.fold,
            seed=call.seed,
            upstream=upstream,
            output=output,
            checkpoint=output / "checkpoint",
            should_stop=lambda: False,
            report=lambda line: None,
            relief=0,
        )
        return dict(outcome), output

    def measure(self, call: StageCall, epoch_steps: int) -> Measured:
        """Seconds of one stage."""
        outcome, _ = self.run(call)
        durations = outcome["durations"]
        front_end = durations.get("front_end", 0.0) / EPOCHS if call.stage == "finetune" else 0.0
        test = durations["test"] / outcome["metrics"]["test_utterances"] if call.stage == "finetune" else None
        return Measured(durations["step"], durations["step"] * epoch_steps + front_end, outcome["metrics"]["training_loss"], test)


def calls_of(recipe: Recipe) -> dict[str, StageCall]:
    """One call of each gradient stage; the cluster stages run as upstream of `ptapt`."""
    ptapt = REGISTRY.call("ptapt", recipe, fold="test", seed=0).upstream["backbone"]
    return {
        "finetune": REGISTRY.call("vft", recipe, fold="test", seed=0),
        "tapt": REGISTRY.call("tapt", recipe, fold="test", seed=0).upstream["backbone"],
        "ptapt": ptapt,
        "states": next(iter(ptapt.upstream.values())).upstream["states"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=["tiny", "base"], default="tiny")
    parser.add_argument("--utterances", type=int, default=64, help="to train on; a quarter as many are tested")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batch-seconds", type=float, default=100.0)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of the pretraining stages")
    parser.add_argument("--precision", choices=[each.name for each in Precision], default="auto", help="of ours; the reference is float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--stages", nargs="+", choices=["finetune", "tapt", "ptapt", "states"], default=["finetune", "tapt", "ptapt", "states"]
    )
    options = parser.parse_args()
    REGISTRY.preload()
    with tempfile.TemporaryDirectory() as temporary:
        corpus = noise_corpus(Path(temporary) / "corpus", options.utterances, max(4, options.utterances // 4))
        lengths = [utterance.samples for utterance in corpus.training("test")]
        bench = Bench(corpus, Path(temporary), options.threads)
        steps = {
            "finetune": max(1, options.utterances // options.batch_size),
            "states": max(1, options.utterances * 9 // 10 // options.batch_size),
        }
        print(
            f"{options.backbone} backbone, {options.utterances} utterances, mean {np.mean(lengths) / SAMPLE_RATE:.1f} s, "
            f"batch {options.batch_size} or {options.batch_seconds:g} s, ours {options.precision}, parts of {options.micro_batch}, "
            f"{options.threads} threads"
        )
        print(f"{'stage':<9} {'setting':<10} {'s/step':>8} {'s/epoch':>9} {'ratio':>6} {'test s/utterance':>17} {'ratio':>6} {'loss':>9}")
        for stage in options.stages:
            base: Measured | None = None
            for reference in (True, False):
                recipe = make_recipe(options, reference=reference)
                budget = round(options.batch_seconds * SAMPLE_RATE)
                epoch_steps = steps.get(stage) or len(bucketed_epoch(lengths, budget, recipe.tapt.buckets, 0, 0))
                found = bench.measure(calls_of(recipe)[stage], epoch_steps)
                base = found if reference else base
                print(row(stage, "reference" if reference else "ours", found, base), flush=True)


def row(stage: str, setting: str, found: Measured, base: Measured | None) -> str:
    """One line of the table; ratios are reference / this."""
    ratio = f"{base.epoch / found.epoch:6.2f}" if base else ""
    test = test_ratio = ""
    if found.test_utterance is not None and base is not None and base.test_utterance is not None:
        test, test_ratio = f"{found.test_utterance:17.4f}", f"{base.test_utterance / found.test_utterance:6.2f}"
    return f"{stage:<9} {setting:<10} {found.step:8.3f} {found.epoch:9.2f} {ratio:>6} {test:>17} {test_ratio:>6} {found.loss:9.4f}"


if __name__ == "__main__":
    main()
