"""Time of each stage that trains by gradient descent: the presets `published` and `paper` beside the authors' loop.

    python benchmarks/training.py --quick
    python benchmarks/training.py --backbone base --stages finetune --utterances 64 --steps 2 --output measured.json
    python benchmarks/training.py --quick --epochs 3 --repeat 3 --settings paper head lora ba ws wg ba+lora+ws+wg

All three are stages of this project on the same utterances: noise of IEMOCAP-like lengths (log-normal, mean 4.5 s, at most 10 s).
`authors`: the preset `published` computed as their loop does: each batch in one pass, padded to its longest utterance, float32,
transformers' encoder with eager attention and torch's dropout, default allocator, test in batches of one.
`published`: the same recipe with this project's encoder, parts by length, the requested precision, test in batches by length. The front end
is computed at every step on batches padded to one length: that is the recipe.
`paper`: features of a frozen front end computed once, else like `published`.
Names of adaptors (fine-tuning only): `paper` with these adaptors in place of full fine-tuning, of the default sizes.
Every stage runs in its own process, so that allocator and peak memory are its own; all use the same utterances and seeds. Steps
are medians. An epoch is its steps and, for fine-tuning, its share of the front end, which is computed once for all epochs of the recipe
(and in an experiment for all its runs, which is not counted here). FLOPs are those of the transformer on valid frames, forward and backward
(6 per weight and frame, plus attention), whatever else a setting computes; they are related to float32 matrix products measured in this
run. Machines differ: read ratios, and repeat the benchmark on a machine with other load.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ser_core.corpora.manifest import SAMPLE_RATE, Manifest, Utterance, write_manifest
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings.backbone import BackboneSettings, Wav2vecSettings
from ser_core.settings.execution import Attention, ExecutionSettings, FeatureCache, Precision
from ser_core.settings.finetune import Adaptor, FinetuneSettings
from ser_core.settings.pretraining import ClusterSettings, PtaptSettings, StatesSettings, TaptSettings
from ser_core.settings.recipe import Recipe
from ser_core.training.batches import Batch, Bucketing, bucketed_epoch, shuffled_epoch

MEAN_SECONDS, SPREAD, SHORTEST_SECONDS, LONGEST_SECONDS = 4.5, 0.55, 0.6, 10.0
CLASSES = ("angry", "happy", "neutral", "sad")
AUTHORS, PUBLISHED, PAPER = SETTINGS = ("authors", "published", "paper")
ADAPTED = ("head", "lora", "ba", "ws", "wg", "ba+lora+ws+wg")  # settings of fine-tuning
PRESETS = Path(__file__).resolve().parents[1] / "configs" / "recipe"
STAGES = ("finetune", "tapt", "ptapt", "states")
HOP = 320  # samples a frame
SHOWN_STEPS = 8
HEADER = (
    f"{'stage':<9} {'setting':<13} {'s/step':>8} {'s/epoch':>9} {'ratio':>6} {'padding':>8} {'frames/s':>9} {'GFLOP/s':>8} "
    f"{'%peak':>6} {'GiB':>7} {'test s/utt':>10} {'ratio':>6}"
)
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
    """Measurement of one stage in one setting; times in seconds."""

    step: float
    step_cpu: float  # of all threads
    epoch: float
    front_end: float  # of all training utterances, once
    test_utterance: float | None
    curve: list[float]  # loss of each step
    frames: int  # valid frames of an epoch
    padding: float  # frames computed for each valid one
    gflops: float  # of the transformer on an epoch's valid frames
    peak: int  # bytes
    peak_gpu: int  # bytes


def noise_corpus(folder: Path, training: int, test: int) -> Manifest:
    """Write a corpus of noise: fold `train` for training, fold `test` held out."""
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


def make_recipe(options: argparse.Namespace, stage: str, setting: str) -> Recipe:
    """Return the recipe of one of the settings."""
    from omegaconf import OmegaConf

    # Every pass of a fine-tuning step is padded to the longest of the whole batch; TAPT in passes would run its front end twice.
    whole = options.authors_batch if stage == "finetune" else 1 << 20
    tiny = options.backbone == "tiny"
    authors = setting == AUTHORS
    precision = Precision.float32 if authors else Precision[options.precision]
    pretraining: dict[str, Any] = {"steps": options.steps, "batch_seconds": options.batch_seconds, "precision": precision}
    recipe = Recipe(
        backbone=BackboneSettings(checkpoint=None, config=TINY_BACKBONE if tiny else BASE_BACKBONE),
        finetune=FinetuneSettings(epochs=options.epochs, batch_size=options.batch_size, precision=precision),
        tapt=TaptSettings(**pretraining),
        states=StatesSettings(
            wav2vec=Wav2vecSettings(config=TINY_WAV2VEC if tiny else BASE_WAV2VEC),
            steps=options.steps,
            batch_size=options.batch_size,
            precision=precision,
        ),
        cluster=ClusterSettings(counts=[8, 32], iterations=2),
        ptapt=PtaptSettings(**pretraining),
        execution=ExecutionSettings(
            attention=Attention.eager if authors else Attention.sdpa,
            feature_cache=FeatureCache.memory,
            micro_batch=whole if authors else options.micro_batch,
            evaluation_batch=1 if authors else 8,
            log_every=1,
        ),
    )
    for each in (recipe.finetune, recipe.states):
        each.spec_augment.feature_length = 16 if tiny else 64
    if setting in ADAPTED:
        recipe.finetune.adaptors.kinds = [Adaptor[kind] for kind in setting.split("+")]
        recipe.finetune.clip_norm = 1.0
    preset = OmegaConf.load(PRESETS / f"{PUBLISHED if setting in (AUTHORS, PUBLISHED) else PAPER}.yaml")
    chosen: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(recipe), preset))
    return chosen  # type: ignore[no-any-return]


class Bench:
    """Runs each call once, in a separate process; upstream artifacts are shared."""

    def __init__(self, corpus: Manifest, root: Path, threads: int) -> None:
        self.corpus = corpus
        self.root = root
        self.threads = threads
        self.count = 0

    def run(self, call: StageCall) -> tuple[dict[str, Any], Path]:
        """Return result and output folder of a call, computed after its upstream stages."""
        upstream = {role: str(self.run(parent)[1]) for role, parent in call.upstream.items()}
        self.count += 1
        output = self.root / f"{self.count:03d}-{call.stage}"
        request = {
            "stage": call.stage,
            "settings": dict(call.settings),
            "runtime": {**call.runtime, "threads": self.threads},
            "corpus": str(self.corpus.folder),
            "fold": call.fold,
            "seed": call.seed,
            "upstream": upstream,
            "output": str(output),
        }
        answer = self.root / f"{self.count:03d}.json"
        subprocess.run([sys.executable, __file__, "--request", json.dumps(request), "--answer", str(answer)], check=True)
        outcome: dict[str, Any] = json.loads(answer.read_text())
        return outcome, output

    def measure(self, call: StageCall, lengths: list[int], batches: list[Batch], setting: str, device: str) -> Measured:
        """Measure one stage; `batches` are those of an epoch, `samples` the lengths of the utterances."""
        outcome, output = self.run(call)
        durations = outcome["durations"]
        front_end = durations.get("front_end", 0.0)
        test = durations["test"] / outcome["metrics"]["test_utterances"] if call.stage == "finetune" else None
        # Fine-tuning shares one pass of the front end among its epochs; a pretraining's is nothing beside its 20 000 steps.
        share = front_end / EPOCHS if call.stage == "finetune" else 0.0
        frames = [[lengths[index] // HOP for index in batch] for batch in batches]
        valid = sum(map(sum, frames))
        packed = setting != AUTHORS and device == "cpu" and call.stage != "states" and not (setting == PUBLISHED and call.stage == "tapt")
        padded = valid if packed else sum(max(batch) * len(batch) for batch in frames)
        return Measured(
            step=durations["step"],
            step_cpu=outcome["step_cpu"],
            epoch=durations["step"] * len(batches) + share,
            front_end=front_end,
            test_utterance=test,
            curve=loss_curve(output),
            frames=valid,
            padding=padded / valid,
            gflops=transformer_flops(call, frames) / 1e9,
            peak=outcome["peak"],
            peak_gpu=outcome["peak_gpu"],
        )


def answer_request(request: Mapping[str, Any], answer: Path) -> None:
    """In the stage's process: run it and write its result."""
    import torch

    REGISTRY.preload()
    output = Path(request["output"])
    asked: list[float] = []  # CPU seconds whenever the stage asks whether to stop: at last before each step

    def never_stop() -> bool:
        asked.append(time.process_time())
        return False

    outcome = REGISTRY.run(
        request["stage"],
        settings=request["settings"],
        runtime=request["runtime"],
        corpus=Path(request["corpus"]),
        fold=request["fold"],
        seed=request["seed"],
        upstream={role: Path(folder) for role, folder in request["upstream"].items()},
        output=output,
        checkpoint=output / "checkpoint",
        should_stop=never_stop,
        report=lambda line: None,
        relief=0,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak_gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    begun = asked[-outcome["metrics"]["steps"] :]
    step_cpu = statistics.median(after - before for before, after in itertools.pairwise(begun)) if len(begun) > 1 else 0.0
    answer.write_text(json.dumps({**outcome, "peak": peak, "peak_gpu": peak_gpu, "step_cpu": step_cpu}))


def loss_curve(output: Path) -> list[float]:
    """Return the training loss of each step from a stage's TensorBoard file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ser_core.training.curves import FOLDER

    events = EventAccumulator(str(output / FOLDER))
    events.Reload()
    return [float(event.value) for event in events.Scalars("train/loss")]


def transformer_flops(call: StageCall, batches: list[list[int]]) -> float:
    """Multiplications and additions of the transformer, forward and backward, on the valid frames; 0 where there is none (`states`).

    Dropped layers are not taken off: with wav2vec2-base's layer drop of 0.1 a tenth of them is not computed, in both settings.
    """
    from transformers import Wav2Vec2Config

    if call.stage == "states":
        return 0.0
    config = Wav2Vec2Config(**call.runtime["backbone"]["config"])
    width, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * width * width + 2 * width * config.intermediate_size)
    weights += width * width // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    return float(sum(6 * weights * frames + 12 * layers * width * frames * frames for batch in batches for frames in batch))


def calls_of(recipe: Recipe) -> dict[str, StageCall]:
    """Return one call of each stage; the cluster stages run as upstream of `ptapt`."""
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
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batch-seconds", type=float, default=250.0)
    parser.add_argument("--micro-batch", type=int, default=0, help="utterances in a part of the presets; 0: by length")
    parser.add_argument("--authors-batch", type=int, default=8, help="utterances in a pass of the authors' fine-tuning, for want of memory")
    parser.add_argument("--settings", nargs="+", choices=(*SETTINGS, *ADAPTED), default=list(SETTINGS))
    parser.add_argument(
        "--repeat", type=int, default=1, help="measure all settings so often, in turn; shown is the repetition of the median step"
    )
    parser.add_argument("--steps", type=int, default=3, help="of the pretraining stages")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument(
        "--precision", choices=[each.name for each in Precision], default="auto", help="of the presets; the authors' is float32"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--quick", action="store_true", help="base size, fine-tuning on 8 utterances, one step: minutes")
    parser.add_argument("--output", type=Path, help="JSON for benchmarks/grid_cost.py")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        answer_request(json.loads(options.request), options.answer)
        return
    if options.quick:
        options.backbone, options.utterances, options.batch_size, options.stages = "base", 8, 8, ["finetune"]
    import torch

    from benchmarks.machine import matrix_gflops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        corpus = noise_corpus(Path(temporary) / "corpus", options.utterances, max(4, options.utterances // 4))
        lengths = [utterance.samples for utterance in corpus.training("test")]
        bench = Bench(corpus, Path(temporary), options.threads)
        peak = matrix_gflops(options.threads, device)
        print(
            f"{options.backbone} backbone, {options.utterances} utterances, mean {np.mean(lengths) / SAMPLE_RATE:.1f} s, "
            f"batch {options.batch_size} or {options.batch_seconds:g} s, presets {options.precision}, {options.threads} threads, {device}, "
            f"matrix products {peak:.0f} GFLOP/s"
        )
        print(HEADER)
        found: dict[str, dict[str, Measured]] = {}
        for stage in options.stages:
            settings = [setting for setting in options.settings if stage == "finetune" or setting not in ADAPTED]
            repeated: dict[str, list[Measured]] = {setting: [] for setting in settings}
            for setting in settings * options.repeat:
                recipe = make_recipe(options, stage, setting)
                batches = epoch_of(stage, lengths, recipe)
                repeated[setting].append(bench.measure(calls_of(recipe)[stage], lengths, batches, setting, device))
            pair = {setting: sorted(each, key=lambda found: found.step)[len(each) // 2] for setting, each in repeated.items()}
            for setting in settings:
                print(row(stage, setting, pair, peak), flush=True)
            for setting in settings if PAPER in settings else ():
                if setting in ADAPTED:
                    print(f"  step of {setting:<13} / {PAPER}: {step_ratios(repeated[setting], repeated[PAPER])}")
            for setting, measured in pair.items():
                print(f"  loss of {setting:<13} {' '.join(f'{loss:.4f}' for loss in measured.curve[:SHOWN_STEPS])}")
            found[stage] = pair
            if device == "cuda":
                print_gpu(pair[options.settings[-1]])
        if options.output:
            options.output.write_text(json.dumps(summary(found, options, device), indent=2) + "\n")


def epoch_of(stage: str, lengths: list[int], recipe: Recipe) -> list[Batch]:
    """Return the batches of an epoch."""
    if stage == "finetune":
        return shuffled_epoch(len(lengths), recipe.finetune.batch_size, 0, 0)
    if stage == "states":
        return shuffled_epoch(max(1, len(lengths) * 9 // 10), recipe.states.batch_size, 0, 0)
    tapt = recipe.tapt
    by = Bucketing(round(tapt.batch_seconds * SAMPLE_RATE), tapt.buckets, tapt.batches_per_bucket, tapt.drop_last)
    return bucketed_epoch(lengths, by, 0, 0)


def row(stage: str, setting: str, pair: Mapping[str, Measured], peak: float) -> str:
    """One line of the table; ratios are the first setting's / this."""
    base, this = next(iter(pair.values())), pair[setting]
    rate = this.gflops / this.epoch
    test = ""
    if this.test_utterance is not None and base.test_utterance is not None:
        test = f"{this.test_utterance:10.4f} {base.test_utterance / this.test_utterance:6.2f}"
    return (
        f"{stage:<9} {setting:<13} {this.step:8.2f} {this.epoch:9.2f} {base.epoch / this.epoch:6.2f} {this.padding:8.2f} "
        f"{this.frames / this.epoch:9.0f} {rate:8.1f} {100 * rate / peak:6.1f} {this.peak / 2**30:7.2f} {test}"
    )


def step_ratios(some: Sequence[Measured], others: Sequence[Measured]) -> str:
    """Median and single ratios of a step in two settings that were measured in turn, by the clock and in CPU seconds."""
    shown = []
    for name, value in (("time", attrgetter("step")), ("CPU seconds", attrgetter("step_cpu"))):
        ratios = [value(one) / value(other) for one, other in zip(some, others, strict=True) if value(other)]
        shown.append(f"{name} {statistics.median(ratios):.2f} ({' '.join(f'{ratio:.2f}' for ratio in ratios)})" if ratios else "")
    return ", ".join(filter(None, shown))


def print_gpu(measured: Measured) -> None:
    """GPU only: memory, how many such stages fit at once, and memory traffic for weights and optimiser."""
    import torch

    from benchmarks.machine import copy_bandwidth

    total = torch.cuda.get_device_properties(0).total_memory
    parameters = 95e6  # wav2vec2-base; weights read twice, gradients written and read, Adam reads three and writes three tensors
    moved = 4 * parameters * 10 / measured.step / copy_bandwidth("cuda")
    print(
        f"  peak GPU memory {measured.peak_gpu / 2**30:.1f} GiB, {int(total // max(1, measured.peak_gpu))} such stages fit at once, "
        f"weights and optimiser move {100 * moved:.1f} % of the memory bandwidth"
    )


def summary(found: Mapping[str, Mapping[str, Measured]], options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return the JSON that benchmarks/grid_cost.py reads."""
    stages: dict[str, Any] = {
        stage: {
            setting: {"step_seconds": measured.step}
            | ({"test_utterance_seconds": measured.test_utterance} if measured.test_utterance is not None else {})
            for setting, measured in pair.items()
        }
        for stage, pair in found.items()
    }
    facts = {"stages": stages, "batch_size": options.batch_size, "batch_seconds": options.batch_seconds, "device": device}
    if PAPER in found.get("finetune", {}):
        facts["front_end_utterance_seconds"] = found["finetune"][PAPER].front_end / options.utterances
    return facts


if __name__ == "__main__":
    main()
