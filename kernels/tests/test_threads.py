"""Work spread over threads that compute alone."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from elpo_kernels._threads import spread

pytestmark = pytest.mark.usefixtures("threads")


def test_results_come_in_the_order_of_the_items() -> None:
    assert spread(lambda n: n * n, range(100)) == [n * n for n in range(100)]
    assert spread(lambda n: n, []) == []


def test_threads_share_the_work_and_each_computes_alone(threads: int) -> None:
    def work(_: int) -> int:
        time.sleep(0.01)  # long enough for all of them to come
        return torch.get_num_threads()

    assert spread(work, range(30)) == [1] * 30
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as pool:  # nor is a new thread's number changed
        assert pool.submit(torch.get_num_threads).result() == threads
    began = time.perf_counter()
    spread(lambda _: time.sleep(0.5), range(threads))
    assert time.perf_counter() - began < 1.2  # one after the other: 1.5


def test_nothing_is_recorded_for_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not any(part.requires_grad for part in spread(lambda n: n * weight, range(5)))


def test_an_error_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        spread(lambda n: 1 // (3 - n), range(9))
    assert spread(lambda n: n, range(3)) == [0, 1, 2]


def test_work_may_be_spread_within_and_by_several_callers_at_once() -> None:
    def inner(n: int) -> int:
        return sum(spread(lambda m: n * m, range(10)))

    expected = [45 * n for n in range(20)]
    with ThreadPoolExecutor(4) as callers:
        calls = [callers.submit(spread, inner, range(20)) for _ in range(8)]
        assert all(call.result() == expected for call in calls)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    spread(lambda n: n, range(9))
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(spread(lambda n: n, range(9))))
    child.start()
    assert receive.poll(60), "the forked process hangs"
    assert receive.recv() == list(range(9))
    child.join()
