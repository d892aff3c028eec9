"""Every gradient stage by one, two and four real processes: one set of numbers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ser_core.errors import Interrupted
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings.execution import FeatureCache
from ser_core.settings.recipe import Recipe
from ser_core.training.pooled import POOLED
from tests.ser_core.parallel.teams import FolderTeam, results, run_team
from tests.ser_core.stages.conftest import Bench, artifacts, curves, stage_calls
from tests.ser_core.stages.test_stages import stop_after

TRAINED = ("finetune", "states", "tapt", "ptapt")
RELATIVE = 1e-5  # of float32 sums in another order, after some steps


def compute(team: FolderTeam, call: StageCall, folders: Mapping[str, Any], stop_at: int) -> Any:
    """One process of a stage; process 1 is asked to stop before step `stop_at`. What it returns, and the lines it reported."""
    lines: list[str] = []
    never = stop_after(10**9)
    try:
        outcome = REGISTRY.run(
            call.stage,
            settings=call.settings,
            runtime={**call.runtime, "threads": 1},
            fold=call.fold,
            seed=call.seed,
            relief=0,
            should_stop=stop_after(stop_at) if team.rank == 1 else never,
            report=lines.append,
            team=team,
            **folders,
        )
    except Interrupted:
        return "interrupted", lines
    return outcome, lines


class Teams:
    """Runs a stage by one process and by several, with dropout, layer drop and noise on, in parts of one or two utterances."""

    def __init__(self, bench: Bench, root: Path, call: StageCall) -> None:
        self.bench, self.root, self.call = bench, root, call
        self.upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
        self.runs = 0

    def by(self, size: int, checkpoint: str = "", stop_at: int = 10**9) -> tuple[Any, Path]:
        """What the leader returned, and the folder of all its artifacts."""
        self.runs += 1
        output = self.root / f"team-{self.runs}" / "output"
        folders = {
            "corpus": self.bench.corpus,
            "upstream": self.upstream,
            "output": output,
            "checkpoint": self.root / (checkpoint or f"team-{self.runs}-checkpoint"),
        }
        found = results(run_team(self.root / f"team-{self.runs}", size, compute, self.call, folders, stop_at))
        assert all(lines == [] for _, lines in found[1:])
        return found[0][0], output

    def alone(self) -> tuple[dict[str, Any], Path]:
        return self.bench.run(self.call, upstream=self.upstream)


@pytest.fixture
def chancy(recipe: Recipe) -> Recipe:
    recipe.backbone.config |= {"layerdrop": 0.3, "hidden_dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2}
    recipe.execution.log_every = 1
    recipe.execution.micro_batch = 1
    return recipe


def close(found: Mapping[Any, float], expected: Mapping[Any, float]) -> None:
    assert found == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINED)
def test_a_stage_has_the_same_numbers_in_any_number_of_processes(stage: str, chancy: Recipe, bench: Bench, tmp_path: Path) -> None:
    """Loss curves, metrics and artifacts of one, two and four processes; the last step of many has fewer parts than there are processes."""
    teams = Teams(bench, tmp_path, stage_calls(chancy)[stage])
    expected, one = teams.alone()
    reference = curves(one)
    assert len({value for _, value in reference["train/loss"]}) == expected["metrics"]["steps"]
    for size in (2, 4):
        found, output = teams.by(size)
        close(found["metrics"], expected["metrics"])
        assert found.get("confusion") == expected.get("confusion")
        assert artifacts(output).keys() == artifacts(one).keys()
        for name, points in curves(output).items():
            close(dict(points), dict(reference[name]))
        if stage == "states":
            assert (output / "frames.json").read_bytes() == (one / "frames.json").read_bytes()
            assert np.allclose(np.load(output / "frames.npy"), np.load(one / "frames.npy"), rtol=1e-4, atol=1e-6)
        if stage == "finetune":
            assert predictions(output) == pytest.approx(predictions(one), abs=2e-6)
            for name, vectors in load_file(one / POOLED).items():
                assert np.allclose(load_file(output / POOLED)[name], vectors, rtol=1e-4, atol=1e-5)


def predictions(folder: Path) -> list[float]:
    with (folder / "predictions.csv").open() as file:
        return [float(row["p_sad"]) for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["states", "tapt"])
def test_a_stage_is_resumed_by_a_team_of_another_size(stage: str, chancy: Recipe, bench: Bench, tmp_path: Path) -> None:
    """Two processes, of which the follower is asked to stop; then one, to the end."""
    chancy.execution.feature_cache = FeatureCache.none
    teams = Teams(bench, tmp_path, stage_calls(chancy)[stage])
    expected, one = teams.alone()
    stopped, _ = teams.by(2, "resumable", stop_at=2)
    assert stopped == "interrupted"
    found, output = bench.run(teams.call, upstream=teams.upstream, checkpoint=tmp_path / "resumable")
    assert found["durations"]["resumed_at_step"] == 2
    close(found["metrics"], expected["metrics"])
    close(dict(curves(output)["train/loss"]), dict(curves(one)["train/loss"]))
