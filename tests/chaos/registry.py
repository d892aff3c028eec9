"""Stages for the chaos run: chains of hashes that sleep between steps, so that an exact resume is seen in the last digit.

The state of a stage is a digest; each step hashes it once more, every few steps it is written down as a checkpoint. What comes out
depends on settings, fold, seed and upstream digests alone. Some seeds end as outliers, some diverge: drawn from the digest, so always
the same ones. Every execution leaves a line per step in the corpus folder's `trace/KEY`, with the time of the boot-time clock and the node,
from which overlapping executions can be told.
This file is copied into a source tree of its own as `ser_core/registry.py`, where jobs find it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

if TYPE_CHECKING:
    from jobs.experiment.registry import StageArguments

METHODS = ("vft", "tapt", "ptapt")
CLASSES = ("angry", "happy", "neutral", "sad")
COLLAPSED = 26  # of 256 seeds end at chance
DIVERGED = 8  # of 256 seeds are not finite


@dataclass
class Recipe:
    """How long stages take; only `steps` affects their results."""

    steps: int = 20
    step_seconds: float = 0.5
    save_every: int = 4


@dataclass(frozen=True)
class Call:
    """One stage; satisfies jobs.experiment.registry.StageCall."""

    stage: str
    settings: Mapping[str, Any]
    runtime: Mapping[str, Any]
    fold: str
    seed: int
    upstream: Mapping[str, Call] = field(default_factory=dict)
    version: int = 1


class Stopped(Exception):  # noqa: N818 - an ending, not an error
    """Asked to stop, and a checkpoint was written; or superseded."""

    interrupted = True


class Diverged(Exception):  # noqa: N818
    """Training with this seed gives NaN."""

    diverged = True


class ChaosRegistry:
    """Satisfies jobs.experiment.registry.Registry."""

    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS

    @property
    def measurements(self) -> tuple[str, ...]:
        return ()

    @property
    def teams(self) -> tuple[str, ...]:
        return ()

    def calls(self, method: str, recipe: Recipe) -> Callable[[str, int], Call]:
        settings = {"steps": recipe.steps}
        runtime = {"step_seconds": recipe.step_seconds, "save_every": recipe.save_every}

        def last(fold: str, seed: int) -> Call:
            def stage(name: str, number: int, **upstream: Call) -> Call:
                return Call(name, settings, runtime, fold, number, upstream)

            if method == "vft":
                return stage("finetune", seed)
            if method == "tapt":
                return stage("finetune", seed, backbone=stage("tapt", 0))
            return stage("finetune", seed, backbone=stage("ptapt", 0, labels=stage("cluster", 0, states=stage("states", 0))))

        return last

    def run(self, stage: str, **arguments: Unpack[StageArguments]) -> Mapping[str, Any]:
        """Hash step by step; see the module."""
        settings, runtime, corpus, checkpoint = arguments["settings"], arguments["runtime"], arguments["corpus"], arguments["checkpoint"]
        output, report = arguments["output"], arguments["report"]
        trace = corpus / "trace" / output.parents[2].name
        trace.parent.mkdir(parents=True, exist_ok=True)
        digests = {
            role: json.loads((folder / "digest.json").read_text())["digest"] for role, folder in sorted(arguments["upstream"].items())
        }
        first = hashlib.sha256(json.dumps([stage, dict(settings), arguments["fold"], arguments["seed"], digests]).encode()).hexdigest()
        step, digest = _restored(checkpoint, first)

        def save() -> None:
            if arguments.get("superseded", lambda: False)():
                raise Stopped("a later attempt has begun and owns the checkpoints")
            _save(checkpoint, {"identity": first, "step": step, "digest": digest}, arguments.get("attempt", 0))

        report(f"begins at step {step}")
        while step < settings["steps"]:
            if arguments["should_stop"]():
                save()
                raise Stopped(f"stopped at step {step}")
            time.sleep(runtime["step_seconds"])
            digest = hashlib.sha256(digest.encode()).hexdigest()
            step += 1
            _append(trace, output.parents[0].name, step)
            if step % runtime["save_every"] == 0:
                save()
        luck = bytes.fromhex(digest)
        if stage == "finetune" and luck[0] < DIVERGED:
            raise Diverged(f"the loss is nan at step {step}")
        (output / "digest.json").write_text(json.dumps({"digest": digest}))
        if stage != "finetune":
            return {"metrics": {"digest": digest}}
        right = 25 if luck[1] < COLLAPSED else 60 + luck[2] % 8
        confusion = [[right if row == column else (100 - right) // 3 for column in range(4)] for row in range(4)]
        return {"metrics": {"digest": digest}, "confusion": confusion, "classes": list(CLASSES)}


REGISTRY = ChaosRegistry()


def read_digest(folder: Path) -> str:
    """Digest of the corpus: the text of its one file."""
    return (folder / "digest").read_text()


def _restored(folder: Path, identity: str) -> tuple[int, str]:
    try:
        value = json.loads((folder / "state.json").read_text())
        return (int(value["step"]), str(value["digest"])) if value["identity"] == identity else (0, identity)
    except (FileNotFoundError, ValueError, KeyError):
        return 0, identity


def _save(folder: Path, value: Mapping[str, Any], attempt: int) -> None:
    temporary = folder / f".state.{attempt}.{os.getpid()}"
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "state.json")


def _append(trace: Path, attempt: str, step: int) -> None:
    job = os.environ.get("SLURM_JOB_ID", "-")
    line = f"{attempt} {step} {time.clock_gettime(time.CLOCK_BOOTTIME):.3f} {socket.gethostname()} {job}\n"
    descriptor = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
