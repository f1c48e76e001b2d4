"""What programs see: values, output, errors, limits; what protects, and what can be imported."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

import pytest

from elpo_fast.config import ConfigError
from elpo_fast.tools import _link
from elpo_fast.tools import sandbox as sandbox_module
from elpo_fast.tools.sandbox import (
    _LIGHT,
    Sandbox,
    SandboxError,
)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("2**10", "1024"),
        ("x = 3\nx", "3"),
        ("x = 3", "(no output)"),
        ("", "(no output)"),
        ("# only a comment", "(no output)"),
        ("None", "(no output)"),
        ("'a'", "'a'"),
        ("print('a')", "a"),
        ("print('a')\n'b'", "a\nOut: 'b'"),
        ("for i in range(2):\n    print(i)  # last line is a loop", "0\n1"),
        ("import sys\nprint('bad', file=sys.stderr)\n1", "[stderr]\nbad\nOut: 1"),
        ("if True:\n    5", "(no output)"),
        ("print('é', chr(0xd800))", "é \\ud800"),
        ("import numpy\nnumpy.arange(3)", "array([0, 1, 2])"),
        ("import sympy\nsympy.factorint(91)", "{7: 1, 13: 1}"),
        ("import os\nos.write(1, b'raw')", "raw\nOut: 3"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
            "import copy, pickle\npickle.loads(pickle.dumps(P(2)))",
            "P(x=2)",
        ),
    ],
)
def test_output_is_what_a_notebook_shows(any_box, code: str, text: str) -> None:
    execution = any_box.run(code)
    assert execution.text() == text
    assert execution.error is None and execution.finished


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1/0", "line 1: 1/0\nZeroDivisionError: division by zero"),
        ("x = = 3", "line 1: x = = 3\nSyntaxError: invalid syntax"),
        ("def f():\n    return y\nf()", None),
        ("import json\njson.loads('{')", None),
        ("raise SystemExit(3)", "line 1: raise SystemExit(3)\nSystemExit: 3"),
        ("input()", "line 1: input()\nEOFError: EOF when reading a line"),
        (
            "class E(Exception):\n    def __str__(self): return 1/0\nraise E",
            "line 3: raise E\nE: (its message could not be shown: ZeroDivisionError)",
        ),
        ("raise ValueError('x' * 5000)", None),
        ("def f(n): f(n + 1)\nf(0)", None),
    ],
)
def test_errors_are_short_and_end_with_the_exception(any_box, code: str, error: str | None) -> None:
    shown = any_box.run(code).error
    assert shown is not None
    if error is not None:
        assert shown == error
    assert len(shown.splitlines()) <= 6 and len(shown) < 1000
    assert "elpo_fast" not in shown and "site-packages" not in shown


def test_traceback_shows_the_programs_own_frames_and_their_source(any_box) -> None:
    error = any_box.run("import json\ndef f(x):\n    return json.loads(x)\nf('{')").error
    assert error.splitlines()[:2] == ["line 4: f('{')", "line 3, in f: return json.loads(x)"]
    assert error.splitlines()[2].startswith("JSONDecodeError: ")


def test_output_before_an_error_is_kept(any_box) -> None:
    assert any_box.run("print('before')\n1/0").text().startswith("before\nline 2: 1/0\n")


def test_timeout_says_so_and_where(any_box) -> None:
    execution = any_box.run("print('on the way')\nwhile True: pass", timeout_s=0.3)
    assert execution.text() == "on the way\nline 2: while True: pass\ntimed out after 0.3 s"
    assert not execution.finished


@pytest.mark.parametrize(
    "code",
    [
        "import itertools\nsum(itertools.repeat(0))",  # never returns to the interpreter
        "import signal\nsignal.alarm(0)\nsignal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass",
        "import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass",
    ],
    ids=["in C", "timer switched off", "exception swallowed"],
)
def test_timeout_of_code_that_resists(any_box, code: str) -> None:
    started = time.monotonic()
    execution = any_box.run(code, timeout_s=0.3)
    assert execution.error == "timed out after 0.3 s" and not execution.finished
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import ctypes\nctypes.string_at(0)", "the interpreter crashed (SIGSEGV)"),
        ("import os\nos._exit(0)", "the process ended before the code was finished"),
        (
            "x = bytearray(1 << 30)",
            "line 1: x = bytearray(1 << 30)\nMemoryError: memory limit reached",
        ),
        ("import os\nos.closerange(0, 999)", "the process ended before the code was finished"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", None),
    ],
    ids=["segfault", "exit", "memory", "descriptors closed", "deep recursion"],
)
def test_death_is_told_in_words_and_harms_nobody(any_box, code: str, error: str | None) -> None:
    execution = any_box.run(code, timeout_s=2.0)
    assert execution.error is not None
    if error is not None:
        assert execution.error == error
    assert any_box.run("1+1").value == "2"


def test_flood_is_capped_and_keeps_head_and_tail(any_box) -> None:
    execution = any_box.run("print('first')\nprint('x' * 10**6)\nprint('last')")
    assert execution.error is None and len(execution.stdout) < 70_000
    assert execution.stdout.startswith("first\n") and execution.stdout.endswith("last\n")
    assert "[output cut]" in execution.stdout


def test_endless_output_is_stopped(any_box) -> None:
    execution = any_box.run("while True: print('x' * 10**6)")
    assert execution.error == "stopped: too much output" and len(execution.stdout) < 70_000


def test_long_value_and_hostile_repr(any_box) -> None:
    assert len(any_box.run("'x' * 10**7").value) < 50_000
    error = any_box.run("class R:\n    def __repr__(self): return 1/0\nR()").error
    assert error.endswith("ZeroDivisionError: division by zero")


def test_standard_input_for_graders(any_box) -> None:
    execution = any_box.run("import sys\nprint(input())\nprint(sys.stdin.read())", stdin="a\nb\nc")
    assert execution.stdout == "a\nb\nc\n"


def test_runs_repeat_exactly(any_box) -> None:
    code = "import random, numpy\nrandom.random(), numpy.random.rand(), hash('x'), list({'a', 'b'})"
    assert any_box.run(code).value == any_box.run(code).value


def test_calls_share_nothing(any_box) -> None:
    patched = any_box.run("import math, sys\nmath.sqrt = len\nsys.modules['json'] = None\nx = 1")
    assert patched.error is None
    assert any_box.run("import json, math\nmath.sqrt(4), 'x' in dir()").value == "(2.0, False)"


def test_threads_work_within_a_call(any_box) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
    )
    assert any_box.run(code + "    r = list(pool.map(abs, [-1, 2]))\nr").value == "[1, 2]"


SCIENCE = {
    "scipy": "import scipy\nround(scipy.optimize.brentq(lambda x: x * x - 2, 0, 2), 6)",
    "scipy.integrate": "from scipy.integrate import quad\nround(quad(abs, -1, 1)[0], 6)",
    "networkx": "import networkx as nx\nnx.shortest_path_length(nx.path_graph(5), 0, 4)",
}


@pytest.mark.parametrize("name", SCIENCE)
def test_libraries_are_there_before_the_code(any_box, name: str) -> None:
    assert any_box.run(SCIENCE[name]).value in ("1.414214", "1.0", "4")
    loaded = any_box.run(f"import sys  # {name}\n{name!r} in sys.modules")
    assert loaded.value == "True"
    other = any_box.run("import sys\n[m in sys.modules for m in ('sympy', 'numpy', 'net' 'workx')]")
    assert other.value == "[True, True, False]"


def test_many_concurrent_calls_each_get_their_own_answer(any_box) -> None:
    async def all_of_them() -> list[str | None]:
        calls = (any_box.sandbox.run(f"{number} * 2") for number in range(100))
        return [execution.value for execution in await asyncio.gather(*calls)]

    assert asyncio.run(all_of_them()) == [str(2 * number) for number in range(100)]


# --- functions -----------------------------------------------------------------------------------


def test_functions_are_called_by_name_with_json(any_box) -> None:
    call = any_box.sandbox.call_function
    assert asyncio.run(call("math:factorial", 5)) == 120
    assert asyncio.run(call("json:dumps", {"a": [1, None]})) == '{"a": [1, null]}'


@pytest.mark.parametrize(
    ("target", "payload", "message"),
    [
        ("json:loads", "{", "JSONDecodeError"),
        ("json:nothing", 1, "AttributeError"),
        ("time:sleep", 30, "timed out after 0.3 s"),
        ("os:_exit", 1, "the process ended before"),
        ("builtins:iter", [1], "TypeError"),
    ],
)
def test_failing_functions_raise_and_say_why(any_box, target, payload, message) -> None:
    with pytest.raises(SandboxError, match=message) as caught:
        asyncio.run(any_box.sandbox.call_function(target, payload, timeout_s=0.3))
    assert target in str(caught.value)


def test_module_that_cannot_be_imported_is_named(any_box) -> None:
    with pytest.raises(RuntimeError, match="no_such_module"):
        asyncio.run(any_box.sandbox.call_function("no_such_module:f", 1))


def test_own_modules_are_importable_from_given_paths(make_box, tmp_path) -> None:
    (tmp_path / "my_grader.py").write_text("def grade(x):\n    return {'double': 2 * x}\n")
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent != tmp_path.parents[-1]:
            parent.chmod(parent.stat().st_mode | 0o055)
    box = make_box(paths=[str(tmp_path)])
    assert asyncio.run(box.sandbox.call_function("my_grader:grade", 4)) == {"double": 8}


# --- life ----------------------------------------------------------------------------------------


def test_auto_picks_a_safe_isolation_and_describes_it(make_box) -> None:
    protection = asyncio.run(make_box().sandbox.describe())
    assert protection.isolation in ("bubblewrap", "landlock")
    assert "seccomp" in str(protection)
    assert bool(protection.gaps) == (protection.isolation != "bubblewrap")


def test_missing_bubblewrap_is_reported_and_landlock_must_be_accepted(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sandbox_module, "AUTO", ("bubblewrap",))
    sandbox = Sandbox()
    told = (
        r"bwrap is not installed.*accept by tools\.isolation=landlock that Landlock does not stop"
    )
    with pytest.raises(RuntimeError, match=told):
        asyncio.run(sandbox.start())
    asyncio.run(sandbox.close())


def test_kernel_settings_that_forbid_namespaces_are_named(make_box, monkeypatch, tmp_path) -> None:
    bwrap = tmp_path / "bin" / "bwrap"
    setting = tmp_path / "sys" / "user" / "max_user_namespaces"
    for file, text in (
        (bwrap, "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"),
        (setting, "0\n"),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bwrap.parent}:/usr/bin:/bin")
    monkeypatch.setattr(_link, "_SETTINGS", tmp_path / "sys")
    monkeypatch.setattr(sandbox_module, "AUTO", ("bubblewrap", "landlock"))
    protection = asyncio.run(make_box().sandbox.describe())
    assert protection.isolation == "landlock"
    assert protection.why_not_better == (
        "bubblewrap: bwrap: No permissions to create new namespace "
        "(user namespaces are restricted: user.max_user_namespaces=0)",
    )


def test_replaced_server_is_not_less_confined(make_box, monkeypatch) -> None:
    box = make_box("auto")
    before = asyncio.run(box.sandbox.describe())
    if before.isolation != "bubblewrap":
        pytest.skip(str(before))
    box.sandbox._link(_LIGHT)._process.kill()
    box.sandbox._link(_LIGHT)._thread.join()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match=r"bwrap is not installed"):
        box.run("1")
    monkeypatch.undo()
    assert box.run("1").value == "1"
    assert asyncio.run(box.sandbox.describe()) == before


def test_nothing_safe_refuses_to_run(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    sandbox = Sandbox(isolation="bubblewrap")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"bwrap is not installed.*tools\.isolation=none"):
            asyncio.run(sandbox.run("1"))
    asyncio.run(sandbox.close())


def test_failed_confinement_is_told() -> None:
    """A step of the confinement that fails inside the child reaches the user as the reason."""
    sandbox = Sandbox(isolation="landlock", memory_mb=1 << 70)
    with pytest.raises(RuntimeError, match="landlock: cannot confine a process: "):
        asyncio.run(sandbox.start())


def test_isolation_none_warns_every_time(caplog) -> None:
    for _ in range(2):
        caplog.clear()
        Sandbox(isolation="none")
        assert "code written by the model runs with your rights" in caplog.text


@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_modules_below_tmp_can_be_imported_by_graders_and_not_by_programs(
    make_box, isolation: str
) -> None:
    """A checkout there, say; everyone's own /tmp must not hide it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        Path(folder, "lying_below_tmp.py").write_text("def f(x):\n    return x + 5")
        box = make_box(isolation, paths=(folder,))
        assert asyncio.run(box.sandbox.call_function("lying_below_tmp:f", 1)) == 6
        assert "No module named" in box.run("import lying_below_tmp").error


@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_programs_import_the_packages_that_are_asked_for(make_box, isolation: str) -> None:
    code = (
        "import importlib\ndef there(name):\n    try: return bool(importlib.import_module(name))\n"
        "    except ImportError: return False\n"
    )
    names = "list(map(there, ['sympy', 'mpmath', 'networkx', 'yaml']))"
    assert make_box(isolation).run(code + names).value == "[True, True, True, False]"
    box = make_box(isolation, packages=["sympy", "PyYAML"])  # mpmath is required by sympy
    assert box.run(code + names).value == "[True, True, False, True]"
    assert box.run(code + names + "  # scipy").value == "[True, True, False, True]"
    metadata = "from importlib.metadata import version\nversion('pyyaml') == version('PyYAML')"
    assert box.run(metadata).value == "True"
    assert box.run("from importlib.metadata import version\nversion('networkx')").error
    assert make_box(isolation, packages=[]).run("1 + 1").value == "2"
    with pytest.raises(ConfigError, match=r"^tools.packages: 'nowhere' is not installed"):
        make_box(packages=["nowhere"])
