"""Several fine-tunings on one GPU or on the same cores: total time and peak memory, one after another and packed.

    python benchmarks/packing.py --runs 4 --at-once 1 2 4
    python benchmarks/packing.py --backbone base --runs 8 --at-once 1 2 4 8 0 --batch-size 32       (with a GPU)

Every line is one worker, started as Slurm starts it (`python -m jobs.worker.main`), that computes the same V-FT runs on noise of
IEMOCAP-like lengths; imports, start and end included. `at once` 1 is the plain worker; with 0 measured memory decides
(jobs.worker.packing). `memory`: peak of all its processes together, shared pages counted once; `GPU`: peak reported by the driver. The
ratio of two lines, not their seconds, carries over to other machines; on busy cores there is little to gain.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.experiment.graph import Graph, build_graph, seeds_of_slots
from jobs.store.layout import Layout
from jobs.store.records import read_result
from jobs.worker.processes import die_with_parent
from jobs.worker.task import Workplace, describe, write_description
from ser_core.corpora.manifest import SAMPLE_RATE, Manifest, Utterance, write_manifest
from ser_core.registry import REGISTRY
from ser_core.settings.backbone import BackboneSettings, SpecAugmentSettings
from ser_core.settings.execution import ExecutionSettings, Precision
from ser_core.settings.finetune import FinetuneSettings
from ser_core.settings.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("angry", "happy", "neutral", "sad")
SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "conv_dim": [64] * 7,
    "num_conv_pos_embeddings": 32,
}
SAMPLE_SECONDS = 0.2  # between looks at memory


@dataclass(frozen=True)
class Measured:
    """Measurement of one worker with all runs."""

    seconds: float
    cpu_seconds: float  # of all its processes
    memory: int  # bytes of all its processes together
    gpu: int  # bytes in use on the GPU, of everybody
    beside: int  # stages that were beside another at the most
    ua: tuple[float, ...]


def make_corpus(folder: Path, utterances: int) -> Manifest:
    """A corpus of noise, mean 4.5 s: fold `train`, and a quarter as many utterances in fold `test`."""
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir(parents=True)
    found = []
    for number in range(utterances + max(4, utterances // 4)):
        samples = int(np.clip(rng.lognormal(1.35, 0.55), 0.6, 10.0) * SAMPLE_RATE)
        path, fold = f"audio/{number:05d}.flac", "train" if number < utterances else "test"
        soundfile.write(folder / path, 0.05 * rng.standard_normal(samples), SAMPLE_RATE, subtype="PCM_16")
        found.append(Utterance(f"{number:05d}", path, samples, CLASSES[number % len(CLASSES)], f"speaker of {fold}", fold))
    return write_manifest(folder, "noise", ["test", "train"], found)


def make_graph(options: argparse.Namespace, digest: str) -> Graph:
    """Return the runs: one fold, `runs` seeds."""
    small = options.backbone == "small"
    recipe = Recipe(
        backbone=BackboneSettings(checkpoint=None, config=SMALL if small else {}),
        finetune=FinetuneSettings(
            epochs=options.epochs,
            batch_size=options.batch_size,
            spec_augment=SpecAugmentSettings(feature_length=16 if small else 64),
            precision=Precision[options.precision],
        ),
        execution=ExecutionSettings(log_every=1000),
    )
    seeds = seeds_of_slots(("vft",), ("test",), seeds=options.runs, first_seed=0)
    return build_graph(REGISTRY, recipe, corpus="noise", corpus_digest=digest, methods=("vft",), folds=("test",), seeds=seeds)


def measure(folder: Path, corpus: Manifest, graph: Graph, at_once: int, threads: int) -> Measured:
    """Run all runs in one worker with its own store."""
    layout = Layout(folder / "results", "packing")
    place = Workplace(
        "ser_core.registry:REGISTRY", str(layout.root), "packing", "noise", str(corpus.folder), graph.corpus_digest, packages=("torch",)
    )
    file = folder / "tasks.json"
    write_description(file, replace(describe(place, graph, [[run.key for run in graph.runs]]), at_once=at_once))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_CPUS_PER_TASK": str(threads)}
    with (folder / "log").open("wb") as log:
        started, used, memory, gpu = time.monotonic(), cpu_seconds(), 0, 0
        command, parent = [sys.executable, "-m", "jobs.worker.main", str(file), "0"], os.getpid()
        with subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, preexec_fn=lambda: die_with_parent(parent, SIGKILL)
        ) as worker:
            while worker.poll() is None:
                memory, gpu = max(memory, proportional_bytes(worker.pid)), max(gpu, gpu_bytes())
                time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - started
    results = [read_result(layout.stage("finetune", run.key), run.key) for run in graph.runs]
    found = [result for result in results if result is not None]
    if len(found) < len(results):
        sys.stderr.write((folder / "log").read_text(encoding="utf-8", errors="replace"))
        raise SystemExit(f"{len(results) - len(found)} of {len(results)} runs have no result")
    facts = [result.provenance for result in found]
    return Measured(
        seconds=seconds,
        cpu_seconds=cpu_seconds() - used,
        memory=memory,
        gpu=gpu,
        beside=max(fact["beside"] for fact in facts),
        ua=tuple(result.metrics["ua"] for result in found),
    )


def cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def proportional_bytes(pid: int) -> int:
    """Memory (PSS) of a process and its children: a page shared by n of them counts 1/n for each."""
    total, pids = 0, [pid]
    while pids:
        each = pids.pop()
        try:
            pids += [int(child) for child in Path(f"/proc/{each}/task/{each}/children").read_text().split()]
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
    return total


def gpu_bytes() -> int:
    """Memory in use on the first GPU; 0 without a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return int(asked.stdout) << 20 if asked.returncode == 0 and asked.stdout.strip().isdigit() else 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=["small", "base"], default="small")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--utterances", type=int, default=32, help="to train on; a quarter as many are tested")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=[each.name for each in Precision], default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        corpus = make_corpus(Path(temporary) / "corpus", options.utterances)
        graph = make_graph(options, corpus.digest)
        print(f"{options.runs} runs of {options.epochs} epochs, {options.backbone} backbone, {options.threads} threads")
        print(f"{'at once':>7} {'together':>8} {'seconds':>8} {'ratio':>6} {'cpu s':>7} {'memory MiB':>10} {'ratio':>6} {'GPU MiB':>8}  UA")
        first: Measured | None = None
        for at_once in options.at_once:
            folder = Path(temporary) / f"at-once-{at_once}"
            folder.mkdir()
            found = measure(folder, corpus, graph, at_once, options.threads)
            first = first or found
            same = "same" if found.ua == first.ua else "other"
            print(
                f"{at_once:>7} {found.beside + 1:>8} {found.seconds:8.1f} {first.seconds / found.seconds:6.2f} {found.cpu_seconds:7.1f} "
                f"{found.memory >> 20:10} {found.memory / first.memory:6.2f} {found.gpu >> 20:8}  {same}",
                flush=True,
            )


if __name__ == "__main__":
    main()
