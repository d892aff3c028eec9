from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_core.settings.pretraining import TaptSettings
from ser_core.training.batches import Bucketing, StepPlan, bucket_count, bucketed_epoch, length_parts, longest_first, shares, shuffled_epoch

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=80)
SECOND = 16_000


def by(budget: int, buckets: int = 50, batches_per_bucket: float = 1.5, *, drop_last: bool = False) -> Bucketing:
    return Bucketing(budget, buckets, batches_per_bucket, drop_last)


def corpus_lengths(count: int, mean: float, spread: float, shortest: float, longest: float) -> list[int]:
    """Samples of log-normal lengths (`mean` and limits in seconds), cut to the 10 s of a crop."""
    rng = np.random.default_rng(0)
    seconds = np.clip(rng.lognormal(np.log(mean) - spread**2 / 2, spread, count), shortest, longest)
    return [int(each) for each in np.minimum(seconds, 10) * SECOND]


IEMOCAP = corpus_lengths(4_290, 4.6, 0.62, 0.585, 34.14)  # training utterances of session 5's fold: 5.4 h
SAVEE = corpus_lengths(360, 3.8, 0.25, 1.6, 7.1)  # three speakers: 23 min


@given(count=st.integers(1, 200), size=st.integers(1, 70), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_a_fine_tuning_epoch_has_whole_batches_of_different_utterances(count: int, size: int, seed: int, epoch: int) -> None:
    """No utterance twice; only the last incomplete batch is missing; fewer utterances than a batch are one batch."""
    batches = shuffled_epoch(count, size, seed, epoch)
    seen = [index for batch in batches for index in batch]
    assert len(set(seen)) == len(seen)
    if count < size:
        assert sorted(seen) == list(range(count))
    else:
        assert [len(batch) for batch in batches] == [size] * (count // size)


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(shuffled_epoch(50, 50, seed, epoch)[0]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(lengths=LENGTHS, budget=st.integers(1, 2000), buckets=st.integers(1, 50), epoch=st.integers(0, 3))
def test_equal_batches_have_every_utterance_once_and_the_same_share_of_the_audio(
    lengths: list[int], budget: int, buckets: int, epoch: int
) -> None:
    """As many batches as the budget goes into the audio; each has its share, up to an utterance at either end."""
    batches = bucketed_epoch(lengths, by(budget, buckets), 0, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    count = max(1, min(len(lengths), round(sum(lengths) / budget)))
    assert len(batches) <= count
    sums = [sum(lengths[index] for index in batch) for batch in batches]
    assert all(abs(each - sum(lengths) / count) <= max(lengths) for each in sums)


@given(lengths=LENGTHS, budget=st.integers(1, 2000), buckets=st.integers(1, 50), epoch=st.integers(0, 3))
def test_with_drop_last_every_batch_is_complete(lengths: list[int], budget: int, buckets: int, epoch: int) -> None:
    """A batch ends with the utterance that fills the budget; less than a budget is left out, of the longest bucket or the last batch."""
    batches = bucketed_epoch(lengths, by(budget, buckets, 0, drop_last=True), 0, epoch)
    used = [index for batch in batches for index in batch]
    assert len(set(used)) == len(used)
    if sum(lengths) < budget:
        assert sorted(used) == list(range(len(lengths)))
        return
    for batch in batches:
        total = sum(lengths[index] for index in batch)
        assert total >= budget
        assert any(total - lengths[index] < budget for index in batch)
    assert sum(lengths) - sum(lengths[index] for index in used) < budget


@pytest.mark.parametrize(("lengths", "batches", "buckets"), [(IEMOCAP, range(70, 85), 50), (SAVEE, range(5, 7), 3)])
def test_no_batch_of_the_default_recipe_is_below_half_its_budget(lengths: list[int], batches: range, buckets: int) -> None:
    """On corpora of IEMOCAP's and of SAVEE's size every batch has at least half of its 250 s, and nothing is dropped."""
    budget = round(TaptSettings().batch_seconds) * SECOND
    assert bucket_count(lengths, by(budget)) == buckets
    for epoch in range(20):
        found = bucketed_epoch(lengths, by(budget), 0, epoch)
        sizes = [sum(lengths[index] for index in batch) / budget for batch in found]
        assert len(found) in batches
        assert min(sizes) > 0.75
        assert max(sizes) < 1.25
        assert sum(map(len, found)) == len(lengths)


def test_drop_last_leaves_out_the_longest() -> None:
    """As in the authors' code: with 50 buckets of SAVEE's lengths, what is dropped are utterances of the longest buckets."""
    budget = 250 * SECOND
    for epoch in range(20):
        found = bucketed_epoch(SAVEE, by(budget, batches_per_bucket=0, drop_last=True), 0, epoch)
        dropped = set(range(len(SAVEE))) - {index for batch in found for index in batch}
        assert dropped
        assert min(SAVEE[index] for index in dropped) > np.quantile(SAVEE, 0.7)


def test_buckets_keep_padding_small() -> None:
    """With 50 buckets of IEMOCAP-like lengths there is little padding; with one bucket there is much."""

    def padded(buckets: int) -> float:
        batches = bucketed_epoch(IEMOCAP, by(250 * SECOND, buckets), 0, 0)
        return float(sum(max(IEMOCAP[index] for index in batch) * len(batch) for batch in batches) / sum(IEMOCAP))

    assert padded(50) < 1.1
    assert padded(1) > 1.5


def test_a_small_corpus_has_few_buckets() -> None:
    """A bucket holds more than a batch, so that batches differ between epochs; the paper's corpus gets the paper's number of buckets."""
    assert bucket_count([100] * 30, by(1000)) == 2
    assert bucket_count([4_500] * 4_300, by(250_000)) == 50
    assert bucket_count([100], by(1000)) == 1
    assert bucket_count([100] * 10_000, by(1000)) == 50
    assert bucket_count([100] * 30, by(1000, batches_per_bucket=0)) == 50
    first, second = (sorted(map(sorted, bucketed_epoch([100] * 30, by(1000), 0, epoch))) for epoch in (0, 1))
    assert first != second


@given(lengths=LENGTHS, size=st.integers(1, 100), relief=st.integers(0, 9))
def test_parts_are_the_batch_in_pieces_of_similar_length(lengths: list[int], size: int, relief: int) -> None:
    """Every row once, longest first; each out-of-memory error halves the size, down to one."""
    batch = list(range(len(lengths)))
    ordered = longest_first(batch, lengths)
    parts = [ordered[rows] for rows in length_parts([lengths[each] for each in ordered], size=size, relief=relief)]
    assert sorted(index for part in parts for index in part) == batch
    assert [lengths[index] for part in parts for index in part] == sorted(lengths, reverse=True)
    assert max(len(part) for part in parts) == max(1, math.ceil(min(size, len(batch)) / 2**relief))


@given(lengths=LENGTHS, budget=st.integers(1, 2000), relief=st.integers(0, 9))
def test_parts_by_length_stay_within_the_budget(lengths: list[int], budget: int, relief: int) -> None:
    """In any order: each padded part is within the budget or a single row, no two consecutive parts could be merged, relief halves each."""
    parts = [lengths[rows] for rows in length_parts(lengths, budget=budget)]
    assert [length for part in parts for length in part] == lengths
    assert all(len(part) == 1 or max(part) * len(part) <= budget for part in parts)
    assert all(max(*one, other[0]) * (len(one) + 1) > budget for one, other in itertools.pairwise(parts))
    halved = [lengths[rows] for rows in length_parts(lengths, budget=budget, relief=relief)]
    assert [length for part in halved for length in part] == lengths
    assert max(map(len, halved)) == max(1, math.ceil(max(map(len, parts)) / 2**relief))


@given(costs=st.lists(st.integers(1, 1000), max_size=60), processes=st.integers(1, 9))
def test_shares_are_balanced(costs: list[int], processes: int) -> None:
    """Every part has one process; the most loaded has at most the mean plus one part; no process is idle if there are enough parts."""
    taken = shares(costs, processes)
    assert sorted(number for share in taken for number in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in taken)
    loads = [sum(costs[number] for number in share) for share in taken]
    assert max(loads) <= sum(costs) / processes + max(costs, default=0)
    assert all(taken) == (len(costs) >= processes)
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_a_plan_gives_the_same_batch_whichever_step_is_asked_first() -> None:
    """Epochs of different lengths: random access, as after a restart, gives the same batches as sequential access."""

    def epoch_batches(epoch: int) -> list[list[int]]:
        return [[epoch, number] for number in range(2 + epoch % 3)]

    plan = StepPlan(epoch_batches)
    walked = [plan.batch(step) for step in range(30)]
    assert [StepPlan(epoch_batches).batch(step) for step in range(30)] == walked
    assert [plan.batch(step) for step in (29, 3, 17, 0)] == [walked[step] for step in (29, 3, 17, 0)]
    assert walked[:6] == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0]]
