"""Which utterances each step sees, and in which parts: epochs, dynamic batches by length. Pure, and the same after a restart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ser_core.training.randomness import generator

Batch = list[int]  # positions in the training split


def shuffled_epoch(count: int, batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """Every utterance at most once in an order of this epoch, in whole batches: the last short batch is dropped (section 4.2).

    A training set smaller than one batch is one batch of everything, or it would train on nothing.
    """
    order = generator(seed, "order", epoch).permutation(count).tolist()
    if count < batch_size:
        return [order]
    return [order[start : start + batch_size] for start in range(0, count - batch_size + 1, batch_size)]


def bucket_count(lengths: Sequence[int], budget: int, buckets: int) -> int:
    """How many buckets a corpus bears: as asked, but each with one and a half batches in it, or the same utterances would always meet.

    IEMOCAP's training folds (5.4 h) just bear the 50 of the code.
    """
    return max(1, min(buckets, len(lengths), 2 * sum(lengths) // (3 * max(1, budget))))


def bucketed_epoch(lengths: Sequence[int], budget: int, buckets: int, seed: int, epoch: int) -> list[Batch]:
    """Every utterance once, in batches of similar length whose padded size stays within `budget` samples (section 3.2: about 250 s).

    `lengths` are what a step reads of each utterance (cropped), in samples. Utterances are shuffled inside buckets of equal count; what a
    bucket leaves over shares a batch with the next one; batches come in random order. An utterance longer than the budget is a batch alone.
    """
    by_length = np.argsort(np.asarray(lengths), kind="stable")
    order: list[int] = []
    for number, bucket in enumerate(np.array_split(by_length, bucket_count(lengths, budget, buckets))):
        order.extend(generator(seed, "bucket", epoch, number).permutation(bucket).tolist())
    batches: list[Batch] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index]) if batches else lengths[index]
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return [batches[position] for position in generator(seed, "batch order", epoch).permutation(len(batches))]


def longest_first(batch: Batch, lengths: Sequence[int]) -> Batch:
    """A batch by length, so that its parts pad little and memory runs out at once or never."""
    return sorted(batch, key=lambda index: (-lengths[index], index))


def halved(size: int, relief: int) -> int:
    """`size` rows halved `relief` times, rounded up: never less than one."""
    return max(1, -(-size // (1 << relief)))


def length_parts(lengths: Sequence[int], *, size: int = 0, budget: int = 0, relief: int = 0) -> list[slice]:
    """The rows of a step, of such lengths, in parts: of `size` rows, or (0) as many as fit padded into `budget`, halved `relief` times.

    A row longer than the budget is a part alone. Parts are the unit in which torch draws (dropout, layer drop, noise), so they depend on
    nothing but this: not on how many processes share them.
    """
    if size > 0:
        size = min(size, len(lengths))
        whole = [size] * -(-len(lengths) // size)
    else:
        whole = []
        longest = 0
        for length in lengths:
            longest = max(longest, length)
            if not whole or longest * (whole[-1] + 1) > budget:
                whole.append(0)
                longest = length
            whole[-1] += 1
    parts = []
    start = 0
    for rows in whole:
        end = min(start + rows, len(lengths))
        step = halved(rows, relief)
        parts += [slice(first, min(first + step, end)) for first in range(start, end, step)]
        start = end
    return parts


def shares(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Positions of the costs that each process takes: the dearest first, each to the one with the least so far, the first of equals.

    No process has more than the mean and one position; the shares hold their positions in order.
    """
    load = [0.0] * processes
    taken: list[list[int]] = [[] for _ in range(processes)]
    for position in sorted(range(len(costs)), key=lambda position: (-costs[position], position)):
        process = min(range(processes), key=lambda number: (load[number], number))
        load[process] += costs[position]
        taken[process].append(position)
    return [sorted(each) for each in taken]


class StepPlan:
    """The batch of every step of a stage, from a pure function of the epoch; epochs may differ in their number of batches."""

    def __init__(self, epoch_batches: Callable[[int], list[Batch]]) -> None:
        self._epoch_batches = epoch_batches
        self._epoch = 0
        self._first = 0  # step at which the epoch begins
        self._batches = epoch_batches(0)

    def batch(self, step: int) -> Batch:
        """Positions in the training split that `step` sees."""
        self._seek(step)
        return self._batches[step - self._first]

    def _seek(self, step: int) -> None:
        if step < self._first:
            self._epoch, self._first, self._batches = 0, 0, self._epoch_batches(0)
        while step >= self._first + len(self._batches):
            self._first += len(self._batches)
            self._epoch += 1
            self._batches = self._epoch_batches(self._epoch)
