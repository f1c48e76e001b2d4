"""Work spread over threads that each compute alone.

PyTorch gives every operation to all of its threads, which wake, share it, and wait for each other.
Where a matrix product is followed by operations on its result, a thread that does all of them for a
part of its own finds the part in its cache, and waits for nobody.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of every item, in their order, on as many threads as PyTorch uses in this one.
    Nothing is recorded for gradients."""
    given = list(items)
    threads = min(torch.get_num_threads(), len(given))
    left = iter(range(len(given)))  # shared: whoever is free takes the next
    results: dict[int, Result] = {}

    @torch.no_grad()
    def share() -> None:
        for i in left:
            results[i] = work(given[i])

    if threads <= 1:
        share()
    else:
        pool = _pool(os.getpid(), torch.get_num_threads())
        for call in [pool.submit(share) for _ in range(threads)]:
            call.result()
    return [results[i] for i in range(len(given))]


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork: each process has its own."""
    started = threading.Barrier(threads + 1)

    def alone() -> None:
        torch.get_num_threads()  # at its first use a thread takes over what the process has
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="elpo-kernels", initializer=alone)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # what was set last holds for threads that begin later
    return pool
