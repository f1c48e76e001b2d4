"""A run whose model writes attacks and nothing else ends by itself and leaves nothing behind.

As a program, this file is that run: `elpo train` with a local engine that answers with `ATTACKS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from elpo_fast import cli
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.tools import _confine
from elpo_fast.train.summary import read_metrics
from elpo_fast.tree import io
from elpo_fast.types import Completion, End, Sampling

ROOT = Path(__file__).parents[2]
MARK = "left-by-an-attack"
PATCHED = (
    "import sys\nfor module in list(sys.modules.values()):\n"
    "    if hasattr(module, {name!r}): module.{name} = {value}\n1"
)
ATTACKS = [
    # text, numbers and forms
    "raise ValueError('\\ud83d')",
    "class A:\n    def __repr__(self): return '\\udcff'\nA()",
    "import os\nos.write(1, bytes(range(256)) * 300), os.write(2, b'\\xff')",
    PATCHED.format(name="_peak_kb", value="lambda: 10**4000"),
    PATCHED.format(name="dumps", value="lambda *_, **__: '[' * 10**5"),
    PATCHED.format(name="run_code", value="lambda *_: {'value': 1, 'error': [], 'timeout': 'x'}"),
    PATCHED.format(name="loads", value="lambda *_: {}"),
    "print('x' * 10**7)",
    # the server and its other children
    "import ctypes, time\nctypes.CDLL(None).prctl(15, b'caf\\xe9', 0, 0, 0)\ntime.sleep(0.2)",
    "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'D' + b'\\xff' * 4000)\n"
    "    except OSError: pass",
    "import os\nos.closerange(0, 100)",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "import os\nos.kill(0, 9)",
    # what stays
    "import os\nif os.fork() == 0:\n    while True: pass",
    "import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True)",
    "import threading, time\n[threading.Thread(target=time.sleep, args=(600,)).start()\n"
    " for _ in range(40)]",
    f"import os\nfor place in ('/tmp', '/dev/shm', '.'):\n"
    f"    try: open(place + '/{MARK}', 'w').write('x')\n    except OSError: pass",
    f"import os\nos.mkfifo('{MARK}')\nopen('{MARK}').read()",
    f"import os\nos.mkdir('{MARK}')\nos.chmod('{MARK}', 0)",
    f"import os\nos.mkdir('{MARK}')\nos.chdir('{MARK}')\nos.rmdir('../{MARK}')",
    f"import multiprocessing.shared_memory as s\ns.SharedMemory('{MARK}', create=True, size=9).buf",
    # time and memory
    "while True: pass",
    "import itertools\nsum(itertools.repeat(0))",
    "import signal\nsignal.alarm(0), signal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass",
    "x = bytearray(1 << 40)",
    "x = [bytearray(1 << 20) for _ in range(4000)]",
    "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "import mmap\nm = mmap.mmap(-1, 1 << 20)\nm.write(b'x' * (1 << 20))",
    # the interpreter
    "import ctypes\nctypes.string_at(0)",
    "import os\nos._exit(0)",
    "import sys\nsys.modules.clear()",
    "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, dict): thing.clear()",
]
CALLS = [
    json.dumps({"name": name, "arguments": {"code": code}})
    for code in ATTACKS
    for name in ("python_session", "code_interpreter")
] + [
    "[" * 700,
    "9" * 5000,
    '{"name": "python_session", "arguments": {"code": "\\ud83d"}}',
    '{"name": "\\udcff", "arguments": {}}',
    '{"name": "python_session", "arguments": {"code": ' + "[" * 300 + "]" * 300 + "}}",
    '{"name": "python_session", "arguments": {"code": NaN, "code": Infinity}}',
]


def attack(folder: str, isolation: str) -> None:
    """Train on the attacks; print the processes that are left."""

    async def generate(
        self: LocalEngine, prefix_ids: Any, n: int, sampling: Sampling
    ) -> list[Completion]:
        rng = np.random.default_rng(sampling.seed)
        completions = []
        for _ in range(n):
            text = f"<tool_call>{CALLS[rng.integers(len(CALLS))]}</tool_call>"
            ids = self._tokenizer(text, add_special_tokens=False).input_ids[: sampling.max_tokens]
            finish = "stop_string" if len(ids) < sampling.max_tokens else "length"
            some = np.full(len(ids), -1, np.float32)
            ids = np.array(ids, np.int32)
            completions.append(
                Completion(ids, some, -some, finish, weight_version=self.weight_version)
            )
        return completions

    LocalEngine.generate = generate  # type: ignore[method-assign]
    _confine.adopt_orphans()
    settings = {
        "run.dir": folder,
        "tools.names": "[python_session, code_interpreter]",
        "tools.isolation": isolation,
        "tools.timeout_s": 0.5,
        "tools.output_tokens": 64,
        "rollout.call_format": "hermes",
        "rollout.max_turn_tokens": 1500,
        "rollout.max_tokens": 4000,
        "model.scratch": "{hidden_size: 32, layers: 1, context: 4096}",
        "sft.demonstrations": 0,
        "train.steps": 2,
        "train.tasks_per_step": 2,
        "train.updates_per_step": 2,
        "eval.tasks": 4,
    }
    pairs = [f"{name}={value}" for name, value in settings.items()]
    status = cli.main(["train", str(ROOT / "configs/tiny.yaml"), *pairs])
    left = [each for each in psutil.Process().children(recursive=True) if each.is_running()]
    print("left:", [each.cmdline() for each in left if each.status() != psutil.STATUS_ZOMBIE])
    sys.exit(status)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_a_run_of_attacks_ends_with_a_verdict_for_each(isolation: str, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    places = [Path("/tmp"), Path("/dev/shm"), temporary, Path.cwd()]
    for place in places:
        assert not (place / MARK).exists()
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), isolation],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    if "no safe way to run model-written code here" in done.stderr + done.stdout:
        pytest.skip(done.stderr[-500:])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "left: []"
    run = tmp_path / "tiny"
    steps = [record for record in read_metrics(run) if record["phase"] == "rl"]
    assert [step["trajectories"] for step in steps] == [2 * 12] * 2
    assert all(step["faults"] == 0 for step in steps), "attacks are answered"
    assert sum(step["tool_errors"] for step in steps) > 50
    for path in sorted((run / "trees").glob("*.npz")):
        forest = io.load(path)
        assert len(forest.ends) == len(forest.reasons) == len(forest.leaf_node)
        assert set(forest.ends) <= {End.TURN_LIMIT, End.LENGTH} and all(forest.reasons)
        assert (forest.reward[forest.leaf_node] == -1).all()
    assert not list(temporary.iterdir())
    for place in places:
        assert not (place / MARK).exists()


if __name__ == "__main__":
    attack(*sys.argv[1:])
