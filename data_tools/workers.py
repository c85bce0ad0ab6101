"""Work on many files at once: threads, in order, with little held at a time.

Owns how many threads there are and how far they run ahead. Knows nothing of the work.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")

AHEAD = 4
"""Items under way for each thread: enough that one slow picture doesn't stop the others."""


def ordered(function: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
    """`map` over all cores, for work that leaves Python's lock, as decoding and hashing do.

    At most eight threads, since each may hold a large picture. Items are taken as they are needed,
    so that a hundred thousand cost no more memory than ten. The first exception ends it.
    """
    threads = min(8, cores())
    pool = ThreadPoolExecutor(max_workers=threads)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            if len(waiting) == AHEAD * threads:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """The cores that this process may use; a container often grants fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
