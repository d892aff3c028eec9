"""Trainings that are killed, or whose disk is full, at chosen moments; a program, because what it kills is itself.

    python -m tests.ser_core.faults kill FOLDER      a small training for every moment of a save, each in a process of its own
    python -m tests.ser_core.faults disk CASES       stages on a disk of a given size, mounted here: needs the right to mount

Prints one JSON value: what became of each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ser_core.errors import Interrupted
from ser_core.registry import REGISTRY
from ser_core.training import checkpoints
from ser_core.training.checkpoints import Checkpoints
from tests.ser_core.training.line import Regression, line_plan, train_line, weights

SAVE = 7  # the save that is met by the fault: one is made after every step

# Moments of a save in their order, and the step that the next attempt goes on from.
KILLS: Mapping[str, int] = {
    "the temporary folder is made": SAVE - 1,
    "half of the first file is written": SAVE - 1,
    "the first file is written": SAVE - 1,
    "all is written and nothing renamed": SAVE - 1,
    "the folder is renamed": SAVE,
    "an earlier checkpoint is half removed": SAVE,
}
PREEMPTION = "the signal to stop comes between two files"
INTERRUPTED = 42  # exit status of a training that left after a checkpoint


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Have this process meet its fault at a moment of save number `SAVE`."""
    saves = 0
    rename, rmtree = Path.rename, shutil.rmtree

    def saving(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal saves
        first = path.name == "model.safetensors"
        saves += first
        if saves == SAVE and first and moment == "the temporary folder is made":
            kill()
        save_file(tensors, path)
        if saves == SAVE and first and moment == "half of the first file is written":
            os.truncate(path, path.stat().st_size // 2)
            kill()
        if saves == SAVE and first and moment == "the first file is written":
            kill()
        if saves == SAVE and first and moment == PREEMPTION:
            os.kill(os.getpid(), signal.SIGUSR1)

    def renaming(self: Path, target: Path) -> Path:
        if saves == SAVE and moment == "all is written and nothing renamed":
            kill()
        renamed = rename(self, target)
        if saves == SAVE and moment == "the folder is renamed":
            kill()
        return renamed

    def removing(path: Path, **options: Any) -> None:
        if saves == SAVE and path.name.startswith(checkpoints.PREFIX) and moment == "an earlier checkpoint is half removed":
            (path / checkpoints.STATE).unlink()
            kill()
        rmtree(path, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(checkpoints, "save_file", saving)
    patch.setattr(Path, "rename", renaming)
    patch.setattr(shutil, "rmtree", removing)


def forked(work: Callable[[], int]) -> int:
    """Wait status of a child that does `work`, whose value is its exit status."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def hit(moment: str, folder: Path) -> int:
    """Train until the fault; with the signal to stop, until the checkpoint that answers it."""
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    arm(moment)
    try:
        train_line(
            Regression(), line_plan(checkpoint_seconds=0.0), folder / "checkpoint", folder / "first", should_stop=lambda: bool(asked)
        )
    except Interrupted:
        return INTERRUPTED
    return 0


def killed(folder: Path) -> dict[str, Any]:
    """Moment -> how the training ended there, what it left, and how the next attempt ended."""
    whole = Regression()
    expected = train_line(whole, line_plan(), folder / "whole" / "checkpoint", folder / "whole" / "out")
    found: dict[str, Any] = {}
    for number, moment in enumerate((*KILLS, PREEMPTION)):
        own = folder / f"{number}"
        status = forked(lambda moment=moment, own=own: hit(moment, own))  # type: ignore[misc]
        left = sorted(path.name for path in (own / "checkpoint").iterdir())
        again = Regression()
        trained = train_line(again, line_plan(save_last=True), own / "checkpoint", own / "second")
        found[moment] = {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "left": left,
            "resumed_at": trained.resumed_at,
            "same_weights": all(torch.equal(one, other) for one, other in zip(weights(again), weights(whole), strict=True)),
            "same_means": (trained.loss, trained.accuracy) == (expected.loss, expected.accuracy),
            "kept": sorted(path.name for path in (own / "checkpoint").iterdir()),
        }
    return found


def full_disks(cases: Path) -> dict[str, Any]:
    """Name -> what a stage raised on a disk too small for it, and what it returned on the same disk with more room."""
    found: dict[str, Any] = {}
    for name, case in json.loads(cases.read_text(encoding="utf-8")).items():
        disk = Path(case["disk"])
        disk.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={case['bytes']}", "tmpfs", disk], check=True)
        try:
            found[name] = {"first": _on_disk(case, 1), "steps": _readable(disk / "checkpoint")}
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            found[name]["second"] = _on_disk(case, 2)
        finally:
            subprocess.run(["umount", disk], check=True)
    return found


def _on_disk(case: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What a stage returned, or the exception that it ended with."""
    output = Path(case["disk"] if case["output_on_disk"] else case["elsewhere"]) / f"output{number}"
    try:
        returned = REGISTRY.run(
            **case["call"],
            corpus=Path(case["corpus"]),
            upstream={role: Path(folder) for role, folder in case["upstream"].items()},
            output=output,
            checkpoint=Path(case["disk"]) / "checkpoint",
            relief=0,
            should_stop=lambda: False,
            report=lambda line: None,
        )
    except Exception as error:
        return {
            "error": type(error).__name__,
            "errno": getattr(error, "errno", None),
            "text": str(error),
            "left": sorted(os.listdir(output)),
        }
    return {"returned": returned}


def _readable(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder that can be read; a checkpoint that is there and cannot counts as -1."""
    steps = []
    for path in sorted(folder.glob("*")):
        state = path / checkpoints.STATE
        identity = json.loads(state.read_text(encoding="utf-8"))["identity"] if state.is_file() else ""
        saved = Checkpoints(folder, identity)._read(path)
        steps.append(-1 if saved is None else saved.step)
    return steps


def main() -> None:
    torch.set_num_threads(1)
    what, path = sys.argv[1], Path(sys.argv[2])
    sys.stdout.write(json.dumps(killed(path) if what == "kill" else full_disks(path)))


if __name__ == "__main__":
    main()
