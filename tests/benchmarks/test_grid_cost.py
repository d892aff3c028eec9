"""What the full grid costs: the stages of the real graph, seconds times steps, and list scheduling that no bound beats."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.grid_cost import (
    FRONT_END,
    PAPER_FRAMES,
    SIDES,
    STATES_PER_SECOND,
    Job,
    Setting,
    grid,
    grid_jobs,
    merged,
    paper_recipe,
    parse_measured,
    remaining,
    simulate,
    spread,
    synthetic_manifest,
)
from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.registry import AUDIO

ROOT = Path(__file__).resolve().parents[2]

MEASURED: dict[str, Any] = {
    "stages": {
        stage: {
            "authors": {"step_seconds": 10.0 * number, "test_utterance_seconds": 1.0},
            "published": {"step_seconds": 4.0 * number, "test_utterance_seconds": 0.25},
            "paper": {"step_seconds": float(number), "test_utterance_seconds": 0.25},
        }
        for number, stage in enumerate(("finetune", "tapt", "ptapt", "states"), start=1)
    },
    "kmeans": {"64": 60, "512": 120, "4096": 600},
    "front_end_utterance_seconds": 0.5,
}


def one_gpu(stage: str) -> int:
    return 0 if stage == "cluster" else 1


def jobs_of(setting: Setting) -> dict[str, Job]:
    recipe, seeds, methods = paper_recipe()
    manifest = synthetic_manifest()
    return grid_jobs(grid(manifest, recipe, seeds, methods), manifest, recipe, setting, one_gpu)


@pytest.fixture(scope="module")
def settings() -> dict[str, Setting]:
    return parse_measured(MEASURED, paper_recipe()[0])


def hours(jobs: dict[str, Job], stage: str) -> float:
    return sum(job.hours for job in jobs.values() if job.stage == stage)


def test_corpus_is_as_large_as_iemocap() -> None:
    """5 531 utterances of about 7 h; a fold trains on the other four sessions."""
    manifest = synthetic_manifest()
    assert Counter(utterance.fold for utterance in manifest.utterances) == {"1": 1085, "2": 1023, "3": 1151, "4": 1031, "5": 1241}
    assert sum(utterance.samples for utterance in manifest.utterances) / SAMPLE_RATE / 3600 == pytest.approx(6.9, abs=0.2)
    assert len(manifest.training("5")) == 4290


def test_stages_are_those_of_the_paper(settings: dict[str, Setting]) -> None:
    """75 runs; a pretraining, emotion states and three clusterings a fold; the front end once as published and once for each TAPT."""
    recipe, seeds, methods = paper_recipe()
    assert (seeds, methods, recipe.cluster.counts) == (5, AUDIO, [64, 512, 4096])
    stages = {"finetune": 75, "tapt": 5, "ptapt": 5, "states": 5, "cluster": 15}
    theirs, published, ours = (jobs_of(setting) for setting in settings.values())
    assert Counter(job.stage for job in theirs.values()) == stages
    assert Counter(job.stage for job in published.values()) == stages
    assert Counter(job.stage for job in ours.values()) == {**stages, FRONT_END: 6}


def test_hours_are_steps_times_seconds(settings: dict[str, Setting]) -> None:
    """By hand: 20 000 steps a pretraining; 15 epochs of whole batches of 64; every utterance tested once for each method and seed."""
    reference, published, ours = (jobs_of(setting) for setting in settings.values())
    steps = 5 * 3 * 15 * sum((5531 - held) // 64 for held in (1085, 1023, 1151, 1031, 1241))
    tested = 5 * 3 * 5531
    assert hours(reference, "finetune") == pytest.approx((steps * 10 + tested * 1.0) / 3600)
    assert hours(ours, "finetune") == pytest.approx((steps * 1 + tested * 0.25) / 3600)
    assert hours(published, "finetune") == pytest.approx((steps * 4 + tested * 0.25) / 3600)
    assert hours(reference, "tapt") == pytest.approx(5 * 20_000 * 20 / 3600)
    assert hours(ours, "ptapt") == pytest.approx(5 * 20_000 * 3 / 3600)
    assert hours(ours, "states") == pytest.approx(5 * 10_000 * 4 / 3600)
    assert hours(ours, FRONT_END) == pytest.approx(6 * 5531 * 0.5 / 3600)
    frames = STATES_PER_SECOND * 4 * sum(utterance.samples for utterance in synthetic_manifest().utterances) / SAMPLE_RATE
    assert hours(ours, "cluster") == pytest.approx((60 + 120 + 600) * frames / PAPER_FRAMES / 3600)


def test_other_batches_are_scaled_to_those_of_the_recipe() -> None:
    """A step of 8 utterances, or of 25 s, is an eighth or a tenth of the recipe's; k-means of half the frames half of it."""
    recipe, _, _ = paper_recipe()
    whole = parse_measured(MEASURED, recipe)["authors"]
    scaled = parse_measured({**MEASURED, "batch_size": 8, "batch_seconds": 25, "kmeans_frames": PAPER_FRAMES / 2}, recipe)["authors"]
    assert {stage: scaled.step[stage] / whole.step[stage] for stage in whole.step} == {"finetune": 8, "states": 8, "tapt": 10, "ptapt": 10}
    assert scaled.kmeans == {k: 2 * seconds for k, seconds in whole.kmeans.items()}


def test_files_hold_some_stages_each() -> None:
    """Each with batches of its own; what two of them say, and other devices, are refused; `without` leaves a stage out."""
    recipe, _, _ = paper_recipe()
    stages = MEASURED["stages"]
    fine = {"stages": {"finetune": stages["finetune"]}, "batch_size": 64, "front_end_utterance_seconds": 0.5, "device": "cpu"}
    pre = {"stages": {stage: stages[stage] for stage in ("tapt", "ptapt")}, "batch_size": 8, "batch_seconds": 50.0, "device": "cpu"}
    found = {**merged({"a": fine, "b": pre}, recipe), "kmeans": MEASURED["kmeans"]}
    with pytest.raises(ValueError, match=r"stages\.states\.authors\.step_seconds"):
        parse_measured(found, recipe)
    theirs, _, ours = parse_measured(found, recipe, ["states"]).values()
    assert theirs.step == {"finetune": 10.0, "tapt": 20.0 * 5, "ptapt": 30.0 * 5, "states": 0.0}
    assert (ours.step["tapt"], ours.front_end_utterance) == (10.0, 0.5)
    assert hours(jobs_of(ours), "states") == 0
    for wrong, told in (({**pre, "device": "cuda"}, "device is"), ({**pre, "stages": fine["stages"]}, r"stages\.finetune is in another")):
        with pytest.raises(ValueError, match=told):
            merged({"a": fine, "b": wrong}, recipe)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (("stages", "tapt", "paper", "step_seconds"), "stages.tapt.paper.step_seconds"),
        (("stages", "finetune", "authors", "test_utterance_seconds"), "stages.finetune.authors.test_utterance_seconds"),
        (("kmeans", "4096"), "kmeans.4096"),
    ],
)
def test_what_was_not_measured_is_named(path: tuple[str, ...], told: str) -> None:
    found = copy.deepcopy(MEASURED)
    place = found
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    with pytest.raises(ValueError, match=told):
        parse_measured(found, paper_recipe()[0])


def test_features_are_built_before_what_reads_them(settings: dict[str, Setting]) -> None:
    """V-FT and P-TAPT stages share one set, which waits for nothing; a fine-tuning after TAPT reads that of its own checkpoint."""
    jobs = jobs_of(settings["paper"])
    starts = simulate(jobs, 8).starts
    for key, job in jobs.items():
        sources = [parent for parent in job.after if jobs[parent].stage == FRONT_END]
        assert len(sources) == (1 if job.stage in ("finetune", "ptapt") else 0)
        assert all(starts[parent] + jobs[parent].hours <= starts[key] + 1e-9 for parent in job.after)
    assert sorted(len(job.after) for job in jobs.values() if job.stage == FRONT_END) == [0, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_one_gpu_does_everything_one_after_another(settings: dict[str, Setting]) -> None:
    """But k-means, which needs none: the makespan of one GPU is its work; that of more GPUs than stages the longest chain."""
    for setting in settings.values():
        jobs = jobs_of(setting)
        alone = simulate(jobs, 1)
        assert alone.makespan == pytest.approx(alone.gpu_hours)
        assert alone.gpu_hours == pytest.approx(sum(job.hours for job in jobs.values() if job.stage != "cluster"))
        plenty = simulate(jobs, 200)
        assert plenty.makespan == pytest.approx(plenty.chain)
        assert plenty.chain == pytest.approx(max(remaining(jobs).values()))


def test_a_schedule_by_hand() -> None:
    """Two GPUs: the chain a, b goes first, the two short ones share the other GPU, and the wide one waits for both."""
    jobs = {
        "short": Job("finetune", 1, 1),
        "other": Job("finetune", 1.5, 1),
        "a": Job("tapt", 2, 1),
        "b": Job("finetune", 3, 1, ("a",)),
        "wide": Job("ptapt", 0.5, 2),
    }
    found = simulate(jobs, 2)
    assert found.starts == {"a": 0, "other": 0, "short": 1.5, "b": 2, "wide": 5}
    assert (found.makespan, found.chain, found.gpu_hours, found.bound) == (5.5, 5, 8.5, 5)
    with pytest.raises(ValueError, match="wants 2 GPUs of 1"):
        simulate(jobs, 1)


def test_spreading_a_pretraining_costs_what_its_efficiency_says() -> None:
    """Four GPUs at 0.9 a doubling: 3.24 times as quick, 1 / 0.81 as many GPU hours; fine-tuning and k-means stay as they are."""
    jobs = {"p": Job("tapt", 10, 1), "f": Job("finetune", 1, 1, ("p",)), "c": Job("cluster", 2, 0)}
    wide = spread(jobs, 4, 0.9)
    assert wide["p"].hours == pytest.approx(10 / 3.24)
    assert wide["p"].hours * wide["p"].gpus == pytest.approx(10 / 0.81)
    assert (wide["f"], wide["c"]) == (jobs["f"], jobs["c"])
    assert spread(jobs, 1, 0.9) == jobs


@st.composite
def job_graphs(draw: st.DrawFn) -> dict[str, Job]:
    """Up to 25 jobs, each after some of those before it."""
    jobs: dict[str, Job] = {}
    for number in range(draw(st.integers(1, 25))):
        after = draw(st.lists(st.sampled_from(sorted(jobs)), max_size=3, unique=True)) if jobs else []
        gpus = draw(st.integers(0, 4))
        jobs[f"{number:02d}"] = Job("finetune", draw(st.integers(1, 40)) / 4, gpus, tuple(after))
    return jobs


@given(jobs=job_graphs(), gpus=st.integers(4, 9))
def test_no_schedule_breaks_a_rule_or_beats_the_bound(jobs: dict[str, Job], gpus: int) -> None:
    """Everything runs once, after what it needs, on GPUs that are there; none idles while a ready job fits (Graham: within twice the bound
    where jobs take one GPU each)."""
    found = simulate(jobs, gpus)
    assert set(found.starts) == set(jobs)
    ends = {key: found.starts[key] + job.hours for key, job in jobs.items()}
    for key, job in jobs.items():
        assert all(ends[parent] <= found.starts[key] for parent in job.after)
    for moment in found.starts.values():
        taken = sum(job.gpus for key, job in jobs.items() if found.starts[key] <= moment < ends[key])
        assert taken <= gpus
        for key, job in jobs.items():
            ready = max((ends[parent] for parent in job.after), default=0.0)
            assert not (ready <= moment < found.starts[key] and job.gpus <= gpus - taken)
    assert max(ends.values()) == found.makespan >= found.bound - 1e-9
    if all(job.gpus == 1 for job in jobs.values()):
        assert found.makespan <= 2 * found.bound
    assert math.isclose(found.gpu_hours, sum(job.hours * job.gpus for job in jobs.values()))


@pytest.mark.slow
def test_command_prints_both_tables(tmp_path: Path) -> None:
    """From a file: totals with their ratio, and a line for each number of GPUs."""
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(MEASURED), encoding="utf-8")
    command = [sys.executable, "benchmarks/grid_cost.py", "--measured", str(path), "--spread", "1", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    [total] = [row for row in rows if row[0] == "total"]
    assert float(total[5]) == pytest.approx(float(total[2]) / float(total[4]), abs=0.01)
    assert float(total[5]) > 5
    assert float(total[4]) < float(total[3]) < float(total[2])
    several = [("8", "published"), ("8", "paper")]
    assert [row[:3] for row in rows if row[2] in SIDES] == [
        [gpus, width, side]
        for gpus in ("1", "8", "64")
        for width, side in (*(("1", side) for side in SIDES), *(several if gpus != "1" else ()))
    ]
    refused = subprocess.run(command[:2], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--measured" in refused.stderr
