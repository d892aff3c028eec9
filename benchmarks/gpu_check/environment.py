"""What the check needs of its environment, and the facts about it that belong to every figure. `missing_packages` imports nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

# Module -> distribution. fairseq, Ray, submitit, pytest and TensorBoard are not needed.
NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "soundfile": "soundfile",
    "safetensors": "safetensors",
    "omegaconf": "omegaconf",
}
PYTHONS = ((3, 11), (3, 12))
TESTED = {"torch": ((2, 11), (2, 13)), "transformers": ((5, 17), (5, 23))}  # first and last version, both included


def missing_packages(needed: Sequence[str] = tuple(NEEDED)) -> list[str]:
    """Return the distributions of the modules in `needed` that cannot be imported here."""
    return [NEEDED.get(module, module) for module in needed if importlib.util.find_spec(module) is None]


def version_notes(python: tuple[int, int], versions: dict[str, str]) -> list[str]:
    """Return one line for each version outside the range that the check was written for."""
    notes = []
    if python not in PYTHONS:
        notes.append(f"Python {python[0]}.{python[1]}: written for 3.11 and 3.12")
    for name, (first, last) in TESTED.items():
        major, minor = (int(part) for part in versions[name].split(".")[:2])
        if not first <= (major, minor) <= last:
            notes.append(f"{name} {versions[name]}: written for {first[0]}.{first[1]} to {last[0]}.{last[1]}")
    return notes


def facts() -> dict[str, Any]:
    """Return versions, CPU and GPU as JSON values. Imports torch and starts CUDA where there is a GPU."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        **{module: importlib.metadata.version(distribution) for module, distribution in NEEDED.items()},
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "flash_attn": _version("flash-attn"),
        "triton": _version("triton"),
    }
    if found["gpus"]:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": card.name,
            "gpu_memory_gib": card.total_memory / 2**30,
            "compute_capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nccl": _nccl_version(),
        }
    return found


def _nccl_version() -> str | None:
    import torch.distributed

    if not torch.distributed.is_nccl_available():
        return None
    version: Any = getattr(torch.cuda.nccl, "version")  # noqa: B009 - untyped
    return ".".join(map(str, version()))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_version() -> tuple[int, int]:
    """Return the version of this Python, major and minor."""
    return sys.version_info[0], sys.version_info[1]
