"""Stages on a real disk that is too small: a tmpfs in a mount namespace."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ser_core.registry import StageCall
from ser_core.settings.execution import FeatureCache
from ser_core.settings.recipe import Recipe
from tests.ser_core.stages.conftest import Bench, stage_calls

ROOT = Path(__file__).parents[3]
NAMESPACES = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])


def namespace(folder: Path) -> list[str]:
    """The command in front of another that lets it mount; fails the test where this machine allows none."""
    folder.mkdir()
    said = []
    for command in NAMESPACES:
        try:
            done = subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True)
        except FileNotFoundError as error:
            said.append(str(error))
            continue
        if done.returncode == 0:
            return command
        said.append(f"{' '.join(command)}: {done.stderr.strip()}")
    pytest.fail(f"no way to mount a small disk here: {'; '.join(said)}")


def run_on_disks(tmp_path: Path, cases: dict[str, Any]) -> dict[str, Any]:
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [*namespace(tmp_path / "probe"), sys.executable, "-m", "tests.ser_core.faults", "disk", str(tmp_path / "cases.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def case(call: StageCall, bench: Bench, folder: Path, size: int, *, output_on_disk: bool, minutes: float) -> dict[str, Any]:
    return {
        "disk": str(folder / "disk"),
        "elsewhere": str(folder / "elsewhere"),
        "bytes": size,
        "output_on_disk": output_on_disk,
        "corpus": str(bench.corpus),
        "upstream": {role: str(bench.run(parent)[1]) for role, parent in call.upstream.items()},
        "call": {
            "stage": call.stage,
            "settings": call.settings,
            "runtime": {**call.runtime, "threads": 1, "execution": {**call.runtime["execution"], "checkpoint_minutes": minutes}},
            "fold": call.fold,
            "seed": call.seed,
        },
    }


def used(folder: Path) -> int:
    """Bytes that a folder takes on a tmpfs, in pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def frugal(recipe: Recipe) -> Recipe:
    recipe.execution.feature_cache = FeatureCache.none
    recipe.finetune.epochs = 4
    return recipe


@pytest.mark.slow
def test_a_full_disk_ends_a_stage_and_damages_nothing(frugal: Recipe, bench: Bench, tmp_path: Path) -> None:
    """OSError with ENOSPC from every library; earlier checkpoints stay intact; with enough space the results are the same."""
    calls = {name: call for name, call in stage_calls(frugal).items() if name in ("finetune", "states")}
    expected, cases = {}, {}
    for name, call in calls.items():
        folder = tmp_path / name
        checkpoint = tmp_path / f"{name}-checkpoint"
        returned, output = bench.run(call, checkpoint=checkpoint, execution={**call.runtime["execution"], "checkpoint_minutes": 0.0})
        expected[name] = returned
        one = used(next(checkpoint.iterdir()))
        # Two checkpoints and part of a third, which a save needs before it takes the first away.
        cases[f"{name}, checkpoints"] = case(call, bench, folder / "a", one * 5 // 2, output_on_disk=False, minutes=0.0)
        if name == "states":  # no checkpoint before the last step, and no room for all of what follows it
            size = one + used(output) - 8192
            cases["states, output"] = case(call, bench, folder / "b", size, output_on_disk=True, minutes=1e3)
    found = run_on_disks(tmp_path, cases)
    for name, each in found.items():
        assert each["first"].get("error") == "OSError", (name, each["first"])
        assert each["first"]["errno"] == errno.ENOSPC
        assert "No space left on device" in each["first"]["text"]
        returned = each["second"]["returned"]
        stage = name.split(",")[0]
        assert returned["metrics"] == expected[stage]["metrics"]
        assert returned["durations"]["resumed_at_step"] == max(each["steps"])
        assert -1 not in each["steps"]
    assert [found[f"{name}, checkpoints"]["steps"] for name in calls] == [[1, 2]] * len(calls)
    assert found["states, output"]["steps"] == [frugal.states.steps]
    assert "frames.npy" in found["states, output"]["first"]["left"]  # where a memory map would have killed the process
