"""Threads that compute one thing each, so that no number depends on how many there are: a matrix product on several may round otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
Item = TypeVar("Item")


class DeterministicPool:
    """Threads that compute alone, with one BLAS thread each. A context: leaving it ends them."""

    def __init__(self, threads: int) -> None:
        self._ahead = 2 * threads
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, "pool", torch.set_num_threads, (1,))

    def __enter__(self) -> DeterministicPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._torch_threads)  # the setting of a thread is also that of threads to come

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items; only a few are made ahead of the one that is taken."""
        waiting: deque[Future[Result]] = deque()
        for item in items:
            if len(waiting) == self._ahead:
                yield waiting.popleft().result()
            waiting.append(self._pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
