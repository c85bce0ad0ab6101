"""Work on many files at once: threads or processes, in order, with little held at a time.

Owns how many there are, how far they run ahead, and that none outlives us. Knows nothing of the
work.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import get_all_start_methods, get_context, parent_process
from threading import Thread
from typing import TypeVar

from train.errors import MachineError

A = TypeVar("A")
R = TypeVar("R")

AHEAD = 4
"""Items (of processes: chunks) under way for each: one slow picture doesn't stop the others."""
CHUNK = 16
"""Items sent to a process at once: one by one, sending them costs as much as a tenth of a look."""


def ordered(function: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
    """`map` over all cores, for work that leaves Python's lock, as decoding and hashing do.

    At most eight threads, since each may hold a large picture. Items are taken as they are needed,
    so that a hundred thousand cost no more memory than ten. The first exception ends it.
    """
    return _ordered(ThreadPoolExecutor(_count()), function, items)


def ordered_in_processes(function: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
    """`ordered`, for work that holds Python's lock for a good part of its time.

    function, items and results are pickled: `function` must be a module's. The start takes half a
    second, so it isn't for a few items. Raises MachineError if a process is killed.
    """
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    context = get_context(method)
    if method == "forkserver":  # what the work imports is then imported once
        context.set_forkserver_preload([function.__module__])
    pool = ProcessPoolExecutor(_count(), mp_context=context, initializer=_begin)
    items = iter(items)
    chunks = iter(lambda: list(islice(items, CHUNK)), [])
    try:
        for results in _ordered(pool, partial(_each, function), chunks):
            yield from results
    except BrokenProcessPool:
        reason = "most likely because memory ran out; close other programs and start it again"
        raise MachineError(
            f"a process at work on the files was ended from outside, {reason}"
        ) from None


def cores() -> int:
    """The cores that this process may use; a container often grants fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count() -> int:
    return min(8, cores())


def _ordered(pool: Executor, function: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            if len(waiting) == AHEAD * _count():
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _each(function: Callable[[A], R], items: list[A]) -> list[R]:
    return [function(item) for item in items]


def _begin() -> None:
    """In a new process: Ctrl-C is its parent's, and it ends when that does, even if killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()
