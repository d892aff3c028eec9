"""What Ray Tune decides: the trials that ASHA continues, the points that Optuna proposes. No Ray is started."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState as OptunaState

from jobs.experiment.sweep_section import Search, Stopping, SweepSettings
from jobs.sweeps import search
from jobs.sweeps.records import Proposal
from jobs.sweeps.search import Evaluated, propose, rungs, survivors
from jobs.sweeps.space import Space, space_of
from tests.jobs.sweeps.fake_registry import make_sweep

SETTINGS = SweepSettings()


@pytest.mark.parametrize(
    ("asked", "folds", "found"),
    [
        ({}, 5, (1, 2, 4)),
        ({}, 4, (1, 2)),
        ({"reduction": 3}, 10, (1, 3, 9)),
        ({"grace_folds": 2}, 5, (2, 4)),
        ({"grace_folds": 5}, 5, ()),
        ({"stopping": Stopping.none}, 5, ()),
    ],
)
def test_rungs_are_before_the_last_fold(asked: dict[str, int], folds: int, found: tuple[int, ...]) -> None:
    assert rungs(SweepSettings(**asked), folds) == found  # type: ignore[arg-type]


@pytest.mark.slow
def test_asha_continues_the_better_half() -> None:
    """Of two the better one; equal ones both; of many about one in `reduction`."""
    assert survivors({"a": 50.0, "b": 60.0}, [], 1, 4, SETTINGS) == {"b"}
    assert survivors({"a": 50.0, "b": 50.0}, [], 1, 4, SETTINGS) == {"a", "b"}
    assert survivors({"a": 50.0}, [], 1, 4, SETTINGS) == {"a"}
    many = {f"t{number}": float(number) for number in range(12)}
    assert survivors(many, [], 1, 4, SETTINGS) == {f"t{number}" for number in range(6, 12)}
    assert survivors(many, [], 1, 9, SweepSettings(reduction=3)) == {f"t{number}" for number in range(8, 12)}


def test_trials_of_earlier_batches_are_part_of_a_rung() -> None:
    """A batch whose trials are all worse than the former ones is stopped as a whole."""
    assert survivors({"a": 50.0, "b": 60.0}, [70.0, 71.0, 72.0], 2, 4, SETTINGS) == set()
    assert survivors({"a": 50.0, "b": 80.0}, [70.0, 71.0, 72.0], 2, 4, SETTINGS) == {"b"}


@pytest.mark.slow
@settings(deadline=None)
@given(st.dictionaries(st.text("abcdefgh", min_size=1, max_size=4), st.integers(0, 12).map(float), min_size=1, max_size=24), st.data())
def test_a_rung_depends_neither_on_the_order_nor_on_names(values: dict[str, float], data: st.DataObject) -> None:
    """Ties are decided alike, somebody continues, and nobody continues who is below one that is stopped."""
    found = survivors(values, [], 1, 4, SETTINGS)
    shuffled = dict(data.draw(st.permutations(list(values.items()))))
    assert survivors(shuffled, [], 1, 4, SETTINGS) == found
    renamed = {f"{name}'": value for name, value in values.items()}
    assert survivors(renamed, [], 1, 4, SETTINGS) == {f"{name}'" for name in found}
    assert found
    assert {values[name] for name in found}.isdisjoint({value for name, value in values.items() if name not in found})
    assert min(values[name] for name in found) >= max((value for name, value in values.items() if name not in found), default=0.0)


def _space(folder: Path, counts: Sequence[int]) -> Space:
    return space_of(make_sweep(folder, SweepSettings(counts=list(counts))).experiment)


def _all(space: Space, settings: SweepSettings) -> list[tuple[Proposal, ...]]:
    """All batches; every trial is complete, and the better the more counts it has."""
    batches: list[tuple[Proposal, ...]] = []
    while batch := propose(space, settings, batches, [[_complete(each) for each in former] for former in batches]):
        batches.append(batch)
    return batches


def _complete(proposal: Proposal) -> Evaluated:
    return Evaluated((40.0, 40.0 + len(proposal.point.counts)), complete=True)


def test_optuna_repeats_no_point_and_ends_when_none_is_left(tmp_path: Path) -> None:
    """Seven sets of three counts, each once, in batches of the size asked for."""
    space = _space(tmp_path, [16, 64, 256])
    batches = _all(space, SweepSettings(search=Search.optuna, trials=100, at_once=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert len({each.point for batch in batches for each in batch}) == 7


@pytest.mark.slow
def test_optuna_proposes_the_same_again(tmp_path: Path) -> None:
    """Whatever else has drawn random numbers meanwhile; another seed proposes something else; no Ray is started."""
    space, settings = _space(tmp_path, [16, 64, 256, 1024, 4096]), SweepSettings(search=Search.optuna, trials=12, seed=5)
    whole = _all(space, settings)
    random.seed(1)
    assert _all(space, settings) == whole
    assert sum(map(len, whole)) == 12
    assert all(each.parameters for each in whole[0])
    assert _all(space, SweepSettings(search=Search.optuna, trials=12, seed=6)) != whole
    assert not sys.modules["ray"].is_initialized()


@pytest.mark.slow
def test_optuna_learns_from_the_results(tmp_path: Path) -> None:
    """With a result that rewards few counts it proposes smaller sets than with one that rewards many."""
    space = _space(tmp_path, [8, 16, 32, 64, 128, 256, 512, 1024])

    def sizes(sign: int, seed: int) -> int:
        """Counts in the sets of the last four of eight batches."""
        settings, batches = SweepSettings(search=Search.optuna, trials=40, seed=seed), list[tuple[Proposal, ...]]()
        for _ in range(8):
            of = [[Evaluated((50.0 + sign * len(each.point.counts),), complete=True) for each in batch] for batch in batches]
            batches.append(propose(space, settings, batches, of))
        return sum(len(each.point.counts) for batch in batches[4:] for each in batch)

    assert sizes(1, 2) > sizes(-1, 2) + 4


def test_optuna_is_given_stopped_and_failed_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over fewer folds is not a value like the others: that trial counts as pruned. A failed one is left out."""
    space, settings = _space(tmp_path, [16, 64, 256, 1024]), SweepSettings(search=Search.optuna, trials=8, at_once=3)
    first = propose(space, settings, [], [])
    made: list[Any] = []
    real = search._searcher

    def kept(*arguments: Any) -> Any:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(search, "_searcher", kept)
    of = [Evaluated((55.0, 60.0), complete=True), Evaluated((70.0,), complete=False), Evaluated((), complete=False)]
    propose(space, settings, [first], [of])
    told = made[-1]._ot_study.get_trials(states=(OptunaState.COMPLETE, OptunaState.PRUNED, OptunaState.FAIL))
    assert [trial.state for trial in told[:2]] == [OptunaState.COMPLETE, OptunaState.PRUNED]
    assert told[0].value == 60.0
    assert told[1].intermediate_values == {0: 70.0}
    assert all(trial.params != first[2].parameters for trial in told)
