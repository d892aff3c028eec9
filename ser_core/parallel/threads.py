"""A thread pool whose results do not depend on the number of threads: each item is computed by one thread with one BLAS thread.

A matrix product that BLAS splits over several threads may round otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
Item = TypeVar("Item")


class DeterministicPool:
    """`threads` threads with one BLAS thread each. A context manager: leaving it ends the threads."""

    def __init__(self, threads: int) -> None:
        self._ahead = 2 * threads
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, "deterministic", torch.set_num_threads, (1,))

    def __enter__(self) -> DeterministicPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._torch_threads)  # torch's setting in one thread is the default of new threads

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results in the order of the items; at most twice as many as threads are computed ahead."""
        waiting: deque[Future[Result]] = deque()
        for item in items:
            if len(waiting) == self._ahead:
                yield waiting.popleft().result()
            waiting.append(self._pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
