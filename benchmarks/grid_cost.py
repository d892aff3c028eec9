"""Compute of the full IEMOCAP grid (5 folds x 5 seeds x 3 methods): both presets beside the authors' scripts, from measured step times.

    python benchmarks/training.py --backbone base --output measured.json ...
    python benchmarks/grid_cost.py --measured measured.json other.json --kmeans kmeans.json
    python benchmarks/grid_cost.py --step finetune=165,60,18 tapt=200,90,60 ptapt=200,90,45 states=30,20,20 --test 0.9,0.5,0.5

Nothing is trained here. The stages are those of the experiment's graph (configs/experiment/iemocap.yaml, the real registry) for utterances
of IEMOCAP's number and lengths; their steps are the recipe's. Hours are those of the device on which the step times were measured; for a
CPU read ratios only, and a GPU has other ratios.

authors: the same stages, because the authors too repeat only fine-tuning per seed. Front end computed at every step, batches padded to
their longest utterance, test in batches of one, as measured by benchmarks/training.py (float32, unless measured with their fp16 flag).
k-means takes as long as ours unless `kmeans_authors` is given; both on CPUs.
published: the same recipe in this project; the front end is computed at every step too.
paper: the frozen front end runs once for the published checkpoint (V-FT and P-TAPT) and once for each fold's TAPT checkpoint.

Makespan: list scheduling of the graph, longest chain first, one GPU per stage, k-means on unlimited CPUs. Bound: max(longest chain, GPU
hours / GPUs). One pretraining of 20 000 steps bounds 64 GPUs, so pretraining on several GPUs is shown too, with `--efficiency` for each
doubling. Times measured with other batch sizes (`batch_size`, `batch_seconds` in the file) are scaled to the recipe's, including the part
of a step that does not depend on the batch (the optimiser), on all sides: for small batches the ratio is underestimated. Several files may
hold some stages each, measured on the same kind of device; a stage missing in all of them is an error unless `--without` omits it on all
sides. Not counted for `paper`: the few utterances whose features are stored both whole and cut; for all: start-up, checkpoints, copies.

The file: {"stages": {STAGE: {"authors": {"step_seconds": s, "test_utterance_seconds": s}, "published": {...}, "paper": {...}}},
"kmeans": {K: s}, "front_end_utterance_seconds": s}; optional: "batch_size", "batch_seconds", "kmeans_frames", "kmeans_authors", "device".
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.control.plan import critical_minutes
from jobs.experiment.graph import Graph, Node, build_graph
from ser_core.corpora.manifest import SAMPLE_RATE, Manifest, Utterance
from ser_core.registry import AUDIO, REGISTRY
from ser_core.settings.backbone import BackboneSettings, Wav2vecSettings
from ser_core.settings.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = ROOT / "configs" / "experiment" / "iemocap.yaml"
SESSIONS = (1085, 1023, 1151, 1031, 1241)  # utterances of four classes
MEAN_SECONDS, SPREAD, SHORTEST_SECONDS, LONGEST_SECONDS = 4.5, 0.55, 0.585, 34.14
STATES_PER_SECOND = 50
GRADIENT_STAGES = ("states", "tapt", "ptapt", "finetune")
SPREADABLE = ("states", "tapt", "ptapt")
FRONT_END = "front end"
AUTHORS, PUBLISHED, PAPER = SIDES = ("authors", "published", "paper")
PAPER_FRAMES = 1_200_000
STAND_IN = {"stand_in": True}  # in place of a checkpoint's identity; this graph is not run


@dataclass(frozen=True)
class Setting:
    """Measured seconds of one side on one device: per step with the recipe's batch, of k-means on the paper's frames."""

    step: Mapping[str, float]  # stage ->
    test_utterance: float
    kmeans: Mapping[int, float]  # k ->
    front_end_utterance: float  # 0: it is computed within the steps


@dataclass(frozen=True)
class Job:
    """One stage to schedule: hours on `gpus` GPUs (0: CPUs), after other jobs."""

    stage: str
    hours: float
    gpus: int
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Makespan of list scheduling and the lower bound of any schedule, in hours."""

    makespan: float
    bound: float
    chain: float
    gpu_hours: float
    starts: Mapping[str, float] = field(default_factory=dict)


def synthetic_manifest(sessions: Sequence[int] = SESSIONS) -> Manifest:
    """IEMOCAP's number of utterances per session, with log-normal lengths and no audio."""
    rng = np.random.default_rng(0)
    utterances = []
    for number, count in enumerate(sessions, start=1):
        seconds = np.clip(rng.lognormal(math.log(MEAN_SECONDS) - SPREAD**2 / 2, SPREAD, count), SHORTEST_SECONDS, LONGEST_SECONDS)
        for place, length in enumerate(seconds):
            name = f"Ses{number:02d}_{place:04d}"
            utterances.append(Utterance(name, f"{name}.flac", int(length * SAMPLE_RATE), "neutral", f"{number}", str(number)))
    folds = tuple(str(number) for number in range(1, len(sessions) + 1))
    return Manifest("iemocap", "synthetic", ("angry", "happy", "neutral", "sad"), folds, tuple(utterances), Path("/nowhere"))


def paper_recipe(path: Path = EXPERIMENT) -> tuple[Recipe, int, tuple[str, ...]]:
    """Recipe, seeds and methods of an experiment without checkpoints, which only the keys would need."""
    from omegaconf import OmegaConf

    chosen: Any = OmegaConf.load(path)
    recipe: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), chosen.get("recipe", {})))
    states = replace(recipe.states, wav2vec=Wav2vecSettings(config=STAND_IN))
    return (
        replace(recipe, backbone=BackboneSettings(checkpoint=None, config=STAND_IN), states=states),
        int(chosen.seeds),
        tuple(chosen.methods),
    )


def grid(manifest: Manifest, recipe: Recipe, seeds: int, methods: Sequence[str] = AUDIO) -> Graph:
    """Return the stages of the whole experiment."""
    slots = {(method, fold, seed): (seed,) for method in methods for fold in manifest.folds for seed in range(seeds)}
    return build_graph(
        REGISTRY, recipe, corpus=manifest.corpus, corpus_digest=manifest.digest, methods=methods, folds=manifest.folds, seeds=slots
    )


def merged(files: Mapping[str, Mapping[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """One file of several, name -> content, every step scaled to the recipe's batch. Raises ValueError where two say the same, or devices
    differ."""
    whole: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    for name, found in files.items():
        rest = {key: value for key, value in found.items() if key not in ("stages", "batch_size", "batch_seconds")}
        for key, value in rest.items():
            if whole.setdefault(key, value) != value:
                raise ValueError(f"{name}: {key} is {value!r} here and {whole[key]!r} in another file")
        for stage, ways in found.get("stages", {}).items():
            if stage in stages:
                raise ValueError(f"{name}: stages.{stage} is in another file too")
            stages[stage] = {way: _scaled(seconds, _scale(stage, found, recipe)) for way, seconds in ways.items()}
    return {**whole, "stages": stages}


def _scaled(seconds: Mapping[str, Any], by: float) -> dict[str, Any]:
    step = seconds.get("step_seconds")
    return {**seconds, "step_seconds": step * by} if isinstance(step, (int, float)) else dict(seconds)


def _scale(stage: str, found: Mapping[str, Any], recipe: Recipe) -> float:
    """Ratio of the recipe's batch to that of a file."""
    key, own = {
        "finetune": ("batch_size", recipe.finetune.batch_size),
        "states": ("batch_size", recipe.states.batch_size),
        "tapt": ("batch_seconds", recipe.tapt.batch_seconds),
        "ptapt": ("batch_seconds", recipe.ptapt.batch_seconds),
    }.get(stage, ("", 1))
    measured = float(found.get(key, own))
    if not measured > 0:
        raise ValueError(f"{key}: not more than 0 ({measured:g})")
    return own / measured


def stage_seconds(node: Node, manifest: Manifest, recipe: Recipe, setting: Setting) -> float:
    """Seconds of one stage, steps and test, without the features of a frozen front end."""
    training = manifest.training(node.fold)
    if node.stage == "finetune":
        steps = recipe.finetune.epochs * max(1, len(training) // recipe.finetune.batch_size)
        return steps * setting.step["finetune"] + len(manifest.test(node.fold)) * setting.test_utterance
    if node.stage == "cluster":
        frames = STATES_PER_SECOND * sum(utterance.samples for utterance in training) / SAMPLE_RATE
        return setting.kmeans[int(node.settings["k"])] * frames / PAPER_FRAMES
    steps = {"states": recipe.states.steps, "tapt": recipe.tapt.steps, "ptapt": recipe.ptapt.steps}[node.stage]
    return steps * setting.step[node.stage]


def grid_jobs(graph: Graph, manifest: Manifest, recipe: Recipe, setting: Setting, gpus: Callable[[str], int]) -> dict[str, Job]:
    """Return key -> job, upstream first. If features are stored, computing them is a separate job for each front end."""
    jobs: dict[str, Job] = {}
    for key, node in graph.nodes.items():
        after = tuple(node.upstream.values())
        weights = next((parent for parent in after if graph.nodes[parent].stage == "tapt"), "")
        if setting.front_end_utterance and node.stage in ("finetune", "ptapt"):  # TAPT trains its front end
            name = f"{FRONT_END} {weights or 'as published'}"
            if name not in jobs:
                hours = len(manifest.utterances) * setting.front_end_utterance / 3600
                jobs[name] = Job(FRONT_END, hours, gpus("finetune"), (weights,) if weights else ())
            after = (*after, name)
        jobs[key] = Job(node.stage, stage_seconds(node, manifest, recipe, setting) / 3600, gpus(node.stage), after)
    return jobs


def spread(jobs: Mapping[str, Job], over: int, efficiency: float) -> dict[str, Job]:
    """Return the same jobs with every pretraining on `gpus` GPUs; `efficiency` is the parallel efficiency of each doubling."""
    pace = over * efficiency ** math.log2(over)
    return {
        key: replace(job, hours=job.hours / pace, gpus=job.gpus * over) if job.stage in SPREADABLE and job.gpus else job
        for key, job in jobs.items()
    }


def remaining(jobs: Mapping[str, Job]) -> dict[str, float]:
    """Return key -> hours of the longest chain of jobs that starts with it."""
    children: dict[str, list[str]] = {key: [] for key in jobs}
    nodes = {}
    for key, job in jobs.items():
        nodes[key] = Node(key, key, 1, {}, {}, {parent: parent for parent in job.after}, "", 0, "")  # every job a stage of its own
        for parent in job.after:
            children[parent].append(key)
    graph = Graph(nodes, (), "", "", {key: tuple(found) for key, found in children.items()})
    return critical_minutes(graph, lambda key: jobs[key].hours)


def simulate(jobs: Mapping[str, Job], gpus: int) -> Schedule:
    """List scheduling on so many GPUs: whenever some are free, the job with the longest chain to come that fits them.

    Raises ValueError where a job wants more GPUs than there are.
    """
    for key, job in jobs.items():
        if job.gpus > gpus:
            raise ValueError(f"{job.stage} ({key}): wants {job.gpus} GPUs of {gpus}")
    priority = remaining(jobs)
    missing = {key: len(job.after) for key, job in jobs.items()}
    children: dict[str, list[str]] = {key: [] for key in jobs}
    for key, job in jobs.items():
        for parent in job.after:
            children[parent].append(key)
    ready = [key for key, count in missing.items() if not count]
    running: list[tuple[float, int, str]] = []
    starts: dict[str, float] = {}
    now, free = 0.0, gpus
    while ready or running:
        for key in sorted(ready, key=lambda key: -priority[key]):
            if jobs[key].gpus <= free:
                free -= jobs[key].gpus
                starts[key] = now
                heapq.heappush(running, (now + jobs[key].hours, len(starts), key))
                ready.remove(key)
        now, _, ended = heapq.heappop(running)
        free += jobs[ended].gpus
        for child in children[ended]:
            missing[child] -= 1
            if not missing[child]:
                ready.append(child)
    chain = max(priority.values(), default=0.0)
    gpu_hours = sum(job.hours * job.gpus for job in jobs.values())
    return Schedule(now, max(chain, gpu_hours / gpus), chain, gpu_hours, starts)


def parse_measured(found: Mapping[str, Any], recipe: Recipe, without: Sequence[str] = ()) -> dict[str, Setting]:
    """Side -> its seconds in a file of measurements, at the recipe's batch; 0 for the stages `without`.

    Raises ValueError that names what is missing.
    """
    found = merged({"the file": found}, recipe)

    def seconds(stage: str, way: str, what: str) -> float:
        value = found.get("stages", {}).get(stage, {}).get(way, {}).get(what)
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"stages.{stage}.{way}.{what}: missing, or not a number of seconds ({value!r})")
        return float(value)

    frames = PAPER_FRAMES / float(found.get("kmeans_frames", PAPER_FRAMES))
    ours = {int(k): float(value) * frames for k, value in found.get("kmeans", {}).items()}
    theirs = {int(k): float(value) * frames for k, value in found.get("kmeans_authors", {}).items()}
    for k in recipe.cluster.counts:
        if k not in ours:
            raise ValueError(f"kmeans.{k}: missing; benchmarks/kmeans.py --output measures it")
    return {
        side: Setting(
            {stage: 0.0 if stage in without else seconds(stage, side, "step_seconds") for stage in GRADIENT_STAGES},
            seconds("finetune", side, "test_utterance_seconds"),
            {**ours, **theirs} if side == AUTHORS else ours,
            float(found.get("front_end_utterance_seconds", 0.0)) if side == PAPER else 0.0,
        )
        for side in SIDES
    }


def stage_table(sides: Mapping[str, Mapping[str, Job]]) -> list[str]:
    """Markdown: how many of each stage, and hours for each side; the ratio is that of the authors and `paper`."""
    names = [*GRADIENT_STAGES[:1], "cluster", *GRADIENT_STAGES[1:], FRONT_END]
    headings = " | ".join(f"{side}, hours" for side in sides)
    lines = [f"| stage | times | {headings} | ratio |", "|---|---|" + "---|" * len(sides) + "---|"]
    totals = dict.fromkeys(sides, 0.0)
    for name in names:
        counts = [sum(job.stage == name for job in jobs.values()) for jobs in sides.values()]
        hours = [sum(job.hours for job in jobs.values() if job.stage == name) for jobs in sides.values()]
        for side, value in zip(totals, hours, strict=True):
            totals[side] += value
        if max(hours):  # what was left out is no row
            ratio = f"{hours[0] / hours[-1]:.2f}" if min(hours) > 0 else "–"
            lines.append(f"| {name} | {max(counts)} | {' | '.join(f'{each:.2f}' for each in hours)} | {ratio} |")
    whole = list(totals.values())
    return [*lines, f"| total | | {' | '.join(f'{each:.2f}' for each in whole)} | {whole[0] / whole[-1]:.2f} |"]


def makespan_table(sides: Mapping[str, Mapping[str, Job]], gpus: Sequence[int], over: Sequence[int], efficiency: float) -> list[str]:
    """Markdown: makespan and bound for each side on so many GPUs, pretrainings on one and on more."""
    lines = [
        "| GPUs | a pretraining on | side | makespan, hours | bound, hours | makespan / bound | bounded by |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in gpus:
        for width in [each for each in over if each <= count]:
            for side, jobs in sides.items():
                if side == AUTHORS and width > 1:  # their scripts use one
                    continue
                found = simulate(spread(jobs, width, efficiency), count)
                by = "longest chain" if found.chain > found.gpu_hours / count else "work"
                ratio = found.makespan / found.bound
                lines.append(f"| {count} | {width} | {side} | {found.makespan:.2f} | {found.bound:.2f} | {ratio:.3f} | {by} |")
    return lines


def from_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Parse command-line pairs to the structure of a file. Raises ValueError for an invalid pair."""

    def sides(text: str) -> dict[str, float]:
        return dict(zip(SIDES, map(float, text.split(",")), strict=True))

    stages: dict[str, dict[str, dict[str, float]]] = {}
    for each in options.step:
        stage, _, values = each.partition("=")
        stages[stage] = {side: {"step_seconds": value} for side, value in sides(values).items()}
    for side, value in sides(options.test).items():
        stages.setdefault("finetune", {}).setdefault(side, {})["test_utterance_seconds"] = value
    return {"stages": stages, "front_end_utterance_seconds": options.front_end, "device": "given by flags"}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, nargs="+", help="JSON of benchmarks/training.py; of several, each with other stages")
    parser.add_argument("--kmeans", type=Path, nargs="+", default=[], help="JSON of benchmarks/kmeans.py, where the others have none")
    parser.add_argument("--without", nargs="+", default=[], choices=SPREADABLE, help="stages not measured: left out on all sides")
    parser.add_argument("--step", nargs="+", metavar="STAGE=AUTHORS,PUBLISHED,PAPER", help="seconds of a step, where there is no file")
    parser.add_argument("--test", default="0,0,0", metavar="AUTHORS,PUBLISHED,PAPER", help="seconds of a tested utterance")
    parser.add_argument("--front-end", type=float, default=0.0, help="seconds of an utterance's features")
    parser.add_argument("--kmeans-seconds", nargs="+", default=[], metavar="K=SECONDS", help="of k-means on the paper's 1.2 million frames")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--spread", type=int, nargs="+", default=[1, 4, 8], help="GPUs of a pretraining")
    parser.add_argument("--efficiency", type=float, default=0.9, help="kept at each doubling of them; an assumption until it is measured")
    options = parser.parse_args()
    if not options.measured and not options.step:
        parser.error("no step times: give --measured FILE, or --step and --test")
    recipe, seeds, methods = paper_recipe()
    extrapolated: set[str] = set()
    try:
        files = {str(path): json.loads(path.read_text(encoding="utf-8")) for path in options.measured or ()}
        found = merged(files or {"flags": from_flags(options)}, recipe)
        for path in options.kmeans:
            other = json.loads(path.read_text(encoding="utf-8"))
            frames = PAPER_FRAMES / float(found.get("kmeans_frames", PAPER_FRAMES))
            own = {k: value * PAPER_FRAMES / other["frames"] / frames for k, value in other["kmeans"].items()}
            found["kmeans"] = {**found.get("kmeans", {}), **own}
            extrapolated |= {str(row["k"]) for row in other.get("rows", ()) if row["variant"] == "ours" and row["extrapolated"]}
        found.setdefault("kmeans", {}).update({k: float(value) for k, _, value in (each.partition("=") for each in options.kmeans_seconds)})
        settings = parse_measured(found, recipe, options.without)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(str(error) if isinstance(error, (OSError, ValueError)) else f"not a file of measurements: {error!r}")
    manifest = synthetic_manifest()
    graph = grid(manifest, recipe, seeds, methods)

    def gpus(stage: str) -> int:
        return 0 if stage == "cluster" else 1

    sides = {side: grid_jobs(graph, manifest, recipe, setting, gpus) for side, setting in settings.items()}
    hours = sum(utterance.samples for utterance in manifest.utterances) / SAMPLE_RATE / 3600
    print(
        f"{len(manifest.utterances)} utterances, {hours:.1f} h of audio; {len(graph.runs)} runs, {len(graph.nodes)} stages. "
        f"Hours of the measured device: {found.get('device', 'not named; step times of a CPU unless the file says otherwise')}.\n"
    )
    if options.without:
        print(f"Left out, on all sides and in all that follows: {', '.join(options.without)} (not measured).\n")
    if extrapolated:
        print(f"k-means with {', '.join(sorted(extrapolated, key=int))} clusters: extrapolated from its first iterations.\n")
    if not settings[PAPER].front_end_utterance:
        print("Features of a frozen front end: not measured apart; `paper` counts them where the steps hold them, if they do.\n")
    print("\n".join(stage_table(sides)))
    print(f"\nGPUs as quick as that device, {options.efficiency:g} of the pace kept at each doubling:\n")
    print("\n".join(makespan_table(sides, options.gpus, options.spread, options.efficiency)))


if __name__ == "__main__":
    main()
