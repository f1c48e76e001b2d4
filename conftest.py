"""Which tests share a worker process when the suite runs in several (`pytest -n 2`).

Files stay together, for their fixtures, and so does everything that starts SGLang, which looks for
what it leaves in shared memory. What takes longest begins first.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

_LONGEST = ("test_tiny", "sglang", "test_aot")


def _group(path: str) -> str:
    name = Path(path).stem
    return "sglang" if name.startswith(("test_sglang", "test_engine")) else name


@pytest.fixture(scope="session", autouse=True)
def landlock_is_accepted_where_bubblewrap_does_not_work() -> None:
    """The tests' programs are the tests' own."""
    try:
        subprocess.run(["bwrap", "--ro-bind", "/", "/", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        from elpo_fast.tools import sandbox

        sandbox.AUTO = ("landlock",)


def pytest_configure() -> None:
    # Shells start what runs in the background deaf to Ctrl-C, which tests send to their children.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: index for index, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(_group(item.nodeid.split("::")[0]), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            group = _group(path)
            return group if group in _LONGEST else path

    return Groups(config, log)
