"""Sandboxes for the tests, one a kind of isolation; what this machine refuses is skipped, aloud."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from elpo_fast.tools.sandbox import Execution, Sandbox

SAFE = ("bubblewrap", "landlock")


class Box:
    """A sandbox with blocking calls. It survives from one event loop to the next."""

    def __init__(self, isolation: str, **settings: Any) -> None:
        self.sandbox = Sandbox(isolation=isolation, **settings)  # type: ignore[arg-type]
        self.isolation = isolation

    def start(self) -> Box:
        try:
            wait(self.sandbox.start())
        except RuntimeError as problem:
            if not str(problem).startswith("no safe way"):
                raise
            pytest.skip(str(problem))
        return self

    def run(self, code: str, **options: Any) -> Execution:
        return wait(self.sandbox.run(code, **options))

    def close(self) -> None:
        wait(self.sandbox.close())


def wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Also from within a running event loop: a thread of its own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


@pytest.fixture(scope="module", params=SAFE)
def isolation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", params=[*SAFE, "none"])
def any_box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A shared sandbox; tests must leave it usable."""
    box = Box(request.param, timeout_s=10.0, memory_mb=256).start()
    yield box
    box.close()


@pytest.fixture(scope="session", params=SAFE)
def safe_box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A shared sandbox with real isolation."""
    box = Box(request.param, timeout_s=10.0, memory_mb=256).start()
    yield box
    box.close()


@pytest.fixture
def make_box() -> Iterator[Callable[..., Box]]:
    """A sandbox of one's own, by default the best this machine allows."""
    boxes: list[Box] = []

    def make(isolation: str = "auto", **settings: Any) -> Box:
        boxes.append(Box(isolation, **settings).start())
        return boxes[-1]

    yield make
    for box in boxes:
        box.close()


@pytest.fixture
def unprotected() -> Callable[[str], str]:
    """Runs code as a plain subprocess: proof that an attack works where nothing stops it."""

    def run(code: str) -> str:
        *lines, last = code.strip().splitlines()
        program = "\n".join([*lines, f"print(repr({last}))"])
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()

    return run


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], bool]:
    """Does it become true within a few seconds?"""

    def check(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    return check


@pytest.fixture
def descendants() -> Callable[[], set[int]]:
    """Living processes that this test process started, directly or not."""

    def find(pid: int | None = None) -> set[int]:
        return {child.pid for child in psutil.Process(pid).children(recursive=True) if alive(child)}

    return find


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
