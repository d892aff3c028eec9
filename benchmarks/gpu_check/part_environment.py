"""Part 1: versions, and whether the device under test can compute at all."""

from __future__ import annotations

from benchmarks.gpu_check.environment import facts, python_version, version_notes
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.record import Record


def run(record: Record, plan: Plan) -> None:
    """Record the facts, and prove that a matrix product on the device is right."""
    import torch

    found = facts()
    record.row("environment", **found)
    for note in version_notes(python_version(), found):
        record.note(note)
    if plan.device == "cuda" and not found["gpus"]:
        built = f"built for CUDA {found['cuda']}" if found["cuda"] else "a build without CUDA"
        record.proof("a GPU", False, f"torch {found['torch']} ({built}) sees no GPU; `--cpu` runs the halves that need none")
        return
    exact = torch.arange(256, dtype=torch.float32).remainder(7).view(16, 16)
    computed = (exact.to(plan.device) @ exact.to(plan.device)).cpu()
    record.proof("a matrix product", bool(torch.equal(computed, exact @ exact)), f"16 x 16 integers on {plan.device}")
