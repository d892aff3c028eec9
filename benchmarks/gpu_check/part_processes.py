"""Part 6: NCCL in a group of one process, then two processes that compute one stage, over NCCL where that works, else over gloo.

NCCL refuses two processes on the same GPU ("Duplicate GPU detected"); with two GPUs each process has its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import compare
from benchmarks.gpu_check.corpora import tones
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.recipes import STAGES, calls_of, small_recipe
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.stage_runs import Bench, comparable, on
from benchmarks.gpu_check.team import Ended, FileTeam, run_team
from ser_core.parallel import group
from ser_core.parallel.team import Alone
from ser_core.registry import StageCall
from ser_core.settings.execution import Precision

STEPS = 8
NCCL_SECONDS, TEAM_SECONDS = 30.0, 60.0
COMMUNICATION_MINUTES = {"cuda": 0.25, "cpu": 5.0}  # NCCL may hang; gloo on a busy machine is only slow
GLOO = "cpu:gloo,cuda:gloo"


def run(record: Record, plan: Plan) -> None:
    """Collectives in a group of one; then every stage in two processes, with the losses of one process."""
    backend = group.CUDA_BACKEND if plan.device == "cuda" else GLOO
    alone = run_team(_fresh(plan), 1, collectives, [plan.device, backend], _limit(record, plan, NCCL_SECONDS))[0]
    record.proof(f"collectives in a group of one, {backend}", alone.error == "", alone.error or str(alone.returned))
    corpus = tones(plan.folder)
    bench = Bench(corpus.folder, plan.folder / "processes", threads=1)
    calls = calls_of(small_recipe(Precision.float32, steps=STEPS))
    execution = {**on(plan.device), "communication_minutes": COMMUNICATION_MINUTES[plan.device]}
    chosen = _backend(record, plan, bench, calls["finetune"], execution)
    for stage in STAGES[:1] if plan.small else STAGES:
        call = calls[stage]
        with comparable():
            upstream = {role: bench.run(parent, execution).output for role, parent in call.upstream.items()}
            expected = bench.run(call, execution, upstream=upstream)
        ended = run_team(_fresh(plan), 2, train, [chosen, bench.corpus, call, execution, upstream], _limit(record, plan, TEAM_SECONDS))
        _compare(record, f"{stage} in two processes, {chosen}", expected.losses, ended)


def _backend(record: Record, plan: Plan, bench: Bench, call: StageCall, execution: Mapping[str, Any]) -> str:
    """Return NCCL if two processes can use it here, else gloo."""
    if plan.device != "cuda":
        return GLOO
    limit = min(NCCL_SECONDS, record.left() / 3)
    ended = run_team(_fresh(plan), 2, train, [group.CUDA_BACKEND, bench.corpus, call, execution, {}], limit)
    errors = [each.error for each in ended if each.error]
    if not errors:
        record.note(f"two processes on {torch.cuda.device_count()} GPU(s) over {group.CUDA_BACKEND}: works")
        return group.CUDA_BACKEND
    if torch.cuda.device_count() > 1:
        record.proof("NCCL between two GPUs", False, "; ".join(errors))
    else:
        record.note(f"two processes on one GPU over NCCL: refused, {errors[0]}")
    return GLOO


def _limit(record: Record, plan: Plan, seconds: float) -> float:
    """Seconds after which a team is killed: without a GPU only shortly before the part itself is."""
    left = record.left() - 1
    return min(seconds, left) if plan.device == "cuda" else left


def _compare(record: Record, name: str, expected: list[float], ended: list[Ended]) -> None:
    errors = [f"process {rank}: {each.error}" for rank, each in enumerate(ended) if each.error]
    if errors:
        record.proof(name, False, "; ".join(errors))
        return
    record.proof(name, *compare.same_losses(expected, ended[0].returned, compare.TOLERANCES["float32"]))


def collectives(team: FileTeam, device: str, backend: str) -> str:
    """In a process of its own: the collectives of `DistributedGroup` with tensors on the device."""
    del team
    import torch.distributed as dist

    with tempfile.NamedTemporaryFile() as file:
        store = dist.FileStore(file.name, 1)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=NCCL_SECONDS))
        made = group.DistributedGroup(Alone(), NCCL_SECONDS)
        tensors = [torch.arange(1_000.0, device=device), torch.full((3, 5), 2.0, dtype=torch.bfloat16, device=device)]
        before = [each.clone() for each in tensors]
        made.all_reduce_(tensors)
        made.broadcast_(tensors)
        made.barrier()
        same = all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
        if device == "cuda":
            torch.cuda.synchronize()
        group.abort()
    if not same:
        raise ValueError("a sum over one process has changed a tensor")
    return f"all_reduce_, broadcast_, barrier and abort on {device}"


def train(
    team: FileTeam, backend: str, corpus: Path, call: StageCall, execution: Mapping[str, Any], upstream: Mapping[str, Path]
) -> list[float]:
    """In each process of the team: compute the stage; return its losses (the leader's are those of the whole team)."""
    group.CUDA_BACKEND = backend
    bench = Bench(corpus, team.folder / f"rank-{team.rank}", threads=1)
    with comparable():
        return bench.run(call, execution, upstream=upstream, team=team).losses


def _fresh(plan: Plan) -> Path:
    """A folder for a team, which must not exist yet."""
    return Path(tempfile.mkdtemp(dir=plan.folder, prefix="team-")) / "team"
