"""Training in several real processes over gloo: the numbers of one process, and termination within a bounded time."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from jobs.store.failures import FailureClass, class_of_exception
from ser_core.errors import Diverged, Interrupted
from ser_core.parallel.group import process_group
from ser_core.parallel.team import Alone
from ser_core.settings.execution import Precision
from ser_core.training.checkpoints import Checkpoints
from ser_core.training.device import choose_arithmetic
from ser_core.training.loop import PartLoss, StepParts
from tests.ser_core.parallel.teams import FolderTeam, results, run_team
from tests.ser_core.training.line import CPU, Regression, accuracy_sums, line_plan, train_line, weights

SECONDS = 4.0  # that processes wait for each other in tests of ends


class Uneven(Regression):
    """Parts of 1, 2, 3, ... rows; a layer that a part randomly skips, drawn by torch as layer drop is; and an unused layer."""

    def __init__(self, parts: int = 4) -> None:
        super().__init__(parts)
        self.base, self.dropped = self.model, nn.Linear(1, 1)
        self.model = nn.ModuleList([self.base, self.dropped, nn.Linear(1, 1)])

    def plan(self, step: int) -> StepParts:
        whole = super().plan(step)
        sizes = [*range(1, self.number), 12 - sum(range(self.number))]
        parts = list(torch.split(torch.cat(list(whole.parts)), sizes))
        return StepParts(parts, sizes, 12)

    def loss(self, part: Tensor) -> PartLoss:
        out = self.base(part[:, :4])
        if torch.rand(()) < 0.3:
            out = self.dropped(out)
        error = (out[:, 0] - part[:, :4].sum(1)) ** 2
        loss = error.sum() / 12
        return PartLoss(loss, loss, (error < 1).sum(), len(part), accuracy_sums(error))


def train_in_team(
    team: FolderTeam | Alone, root: Path, name: str, changes: dict[str, Any], *, parts: int = 4, stop_at: int = 10**9, stops: int = 0
) -> dict[str, Any]:
    """A training of 20 steps; process number `stops` is asked to stop before step `stop_at` of this attempt."""
    torch.set_num_threads(1)
    objective, lines = Uneven(parts), list[str]()
    asked = iter(range(10**9))
    with process_group(team, CPU, 60.0) as group:
        try:
            trained = train_line(
                objective,
                line_plan(log_every=1, **changes),
                root / "checkpoints",
                root / f"{name}-{team.rank}",
                should_stop=lambda: next(asked) >= stop_at and team.rank == stops,
                report=lines.append,
                group=group,
            )
        except Interrupted:
            return {"stopped": True, "asked": objective.asked}
    gone = [parameter.grad is None for parameter in objective.parameters().values()]
    return {"loss": trained.loss, "weights": weights(objective), "lines": lines, "asked": objective.asked, "gone": gone}


def loss_curve(root: Path, name: str) -> list[float]:
    """The losses; the accuracy of the sums for the curves must be that of the loop."""
    found = EventAccumulator(str(root / f"{name}-0" / "tensorboard"))
    found.Reload()
    again, accuracy = ([event.value for event in found.Scalars(tag)] for tag in ("again/accuracy", "train/accuracy"))
    assert again == accuracy
    return [event.value for event in found.Scalars("train/loss")]


@pytest.mark.slow
def test_a_training_has_the_same_numbers_in_any_number_of_processes(tmp_path: Path) -> None:
    """With dropout, layer drop and parts of different sizes: the same loss curve; bit-identical weights in all processes of a team."""
    expected = train_in_team(Alone(), tmp_path / "1", "out", {})
    curve = loss_curve(tmp_path / "1", "out")
    assert len(set(curve)) == 20
    for size in (2, 4):
        root = tmp_path / str(size)
        first, *others = results(run_team(root / "team", size, train_in_team, root, "out", {}))
        assert loss_curve(root, "out") == pytest.approx(curve, rel=1e-5)
        assert first["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for mine, theirs in zip(first["weights"], expected["weights"], strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)
        for other in others:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(first["weights"], other["weights"], strict=True))
            assert other["gone"] == first["gone"] == expected["gone"]
        assert [path.name for path in root.glob("out-*")] == ["out-0"]  # the leader alone writes


def test_a_checkpoint_is_resumed_by_a_team_of_another_size(tmp_path: Path) -> None:
    """2, then 1, then 4 processes; in the first attempt only the follower is asked to stop, and both stop after the same step."""
    train_in_team(Alone(), tmp_path / "whole", "out", {})
    root = tmp_path / "parts"
    two = results(run_team(tmp_path / "two", 2, stopped, root, "two", 7, 1))
    assert two == [{"stopped": True, "asked": list(range(7))}] * 2
    assert stopped(Alone(), root, "one", 6, 0) == {"stopped": True, "asked": list(range(7, 13))}
    four = results(run_team(tmp_path / "four", 4, train_in_team, root, "four", {}))
    assert [each["asked"] for each in four] == [list(range(13, 20))] * 4
    assert loss_curve(root, "four") == pytest.approx(loss_curve(tmp_path / "whole", "out"), rel=1e-5)


def stopped(team: FolderTeam | Alone, root: Path, name: str, stop_at: int, stops: int) -> dict[str, Any]:
    return train_in_team(team, root, name, {}, stop_at=stop_at, stops=stops)


def idle(team: FolderTeam, root: Path) -> dict[str, Any]:
    arithmetic = choose_arithmetic(CPU, Precision.float16)  # the scaler of gradients has to agree
    return train_in_team(team, root, "out", {"arithmetic": arithmetic}, parts=2)


def test_idle_processes_are_reported_once(tmp_path: Path) -> None:
    """Processes without a part take every step with the others, in float16 with one scale for all; the report says what to set."""
    root = tmp_path / "idle"
    found = results(run_team(tmp_path / "team", 3, idle, root))
    told = "line: step 0 has 2 part(s) for 3 processes, some are idle: set recipe.execution.micro_batch=2 or ask for fewer processes"
    assert found[0]["lines"] == [told]
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0]["weights"], other["weights"], strict=True))
    alone = train_in_team(Alone(), tmp_path / "alone", "out", {"arithmetic": choose_arithmetic(CPU, Precision.float16)}, parts=2)
    assert found[0]["loss"] == pytest.approx(alone["loss"], rel=1e-2)


def diverging(team: FolderTeam, root: Path) -> None:
    class Exploding(Uneven):
        def loss(self, part: Tensor) -> PartLoss:
            found = super().loss(part)
            bad = len(self.asked) > 4 and len(part) == 1
            return replace(found, curve_loss=found.curve_loss * float("nan")) if bad else found

    with process_group(team, CPU, 60.0) as group:
        train_line(Exploding(), line_plan(checkpoint_seconds=0.0), root / "checkpoints", root / "out", group=group)


def test_a_nan_loss_in_one_process_raises_diverged_in_all(tmp_path: Path) -> None:
    ended = run_team(tmp_path / "team", 2, diverging, tmp_path)
    assert [(type(each.error), str(each.error)) for each in ended] == [
        (Diverged, "line: the loss is nan at step 5 (seed 1, learning rate 0.05)")
    ] * 2
    saved = Checkpoints(tmp_path / "checkpoints", "mine").load()
    assert saved is not None
    assert saved.step == 4


def failing(team: FolderTeam, root: Path, how: str) -> None:
    """Process 1 fails in step 3."""

    class Failing(Uneven):
        def loss(self, part: Tensor) -> PartLoss:
            if team.rank == 1 and len(self.asked) == 3:
                if how == "dies":
                    os._exit(9)
                if how == "hangs":
                    time.sleep(3600)
                raise MemoryError("no room")
            return super().loss(part)

    with process_group(team, CPU, SECONDS) as group:
        train_line(Failing(), line_plan(), root / "checkpoints", root / "out", group=group)


@pytest.mark.parametrize("how", ["dies", "raises", "hangs"])
def test_the_other_processes_raise_a_communication_error_in_time(how: str, tmp_path: Path) -> None:
    """If one dies, raises or hangs, the others end without being killed, and the one that raised reports its own error."""
    ended = run_team(tmp_path / "team", 3, failing, tmp_path, how, hung=1 if how == "hangs" else None)
    for each in (ended[0], ended[2]):
        assert isinstance(each.error, ConnectionError)
        assert class_of_exception(each.error) is FailureClass.communication
        assert each.exit == 0
    assert ended[1].exit == {"dies": 9, "raises": 0, "hangs": -9}[how]
    assert isinstance(ended[1].error, MemoryError) == (how == "raises")


def unlike(team: FolderTeam, root: Path) -> dict[str, Any]:
    """Process 1 uses another precision."""
    precision = Precision.float16 if team.rank else Precision.float32
    return train_in_team(team, root, "out", {"arithmetic": choose_arithmetic(CPU, precision)})


def test_processes_with_different_precision_do_not_train_together(tmp_path: Path) -> None:
    """Gradients with and without scaling must not be summed; it is a communication error, so the job is retried on other nodes."""
    ended = run_team(tmp_path / "team", 2, unlike, tmp_path)
    told = str(ended[1].error)
    assert told.startswith("process 1 of 2 has arithmetic cpu/torch.float16, process 0 has cpu/torch.float32")
    assert [class_of_exception(each.error) for each in ended if each.error] == [FailureClass.communication] * 2
