"""Attacks on the pool itself and on the next call. As in `test_attacks.py`, each is first shown to
work where nothing stops it: as a plain subprocess, or in an interpreter that is used twice."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest

from elpo_fast.tasks.gym_verifier import make_dataset, pack_entry
from elpo_fast.tools.sandbox import _LIGHT

from .conftest import wait


def plain(code: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, timeout=60, **options)  # type: ignore[call-overload]


# --- ends that are told in words -----------------------------------------------------------------


def test_endless_loop_would_never_end(safe_box) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", "while True: pass"], timeout=1)
    execution = safe_box.run("while True: pass", timeout_s=0.3)
    assert execution.error == "line 1: while True: pass\ntimed out after 0.3 s"


def test_the_end_of_a_step_is_told_though_its_origin_holds_its_channel(any_box) -> None:
    """A snapshot that has forked is stopped, perhaps before it has closed what it passed on."""
    slow = (
        "import os, time\nclose = os.close\nos.close = lambda fd: (time.sleep(0.3), close(fd))[1]"
    )

    async def main() -> list[tuple[str | None, float]]:
        root = await any_box.sandbox.open_session()
        _, origin = await any_box.sandbox.step(root, slow, 1, timeout_s=50.0)
        assert origin is not None
        ends = []
        for code in ("import os\nos._exit(0)", "1 + 1", "import os\nos._exit(0)"):
            execution, after = await any_box.sandbox.step(origin, code, 2, timeout_s=50.0)
            ends.append((execution.error, execution.seconds))
            any_box.sandbox.drop([after] if after else [])
        any_box.sandbox.drop([root, origin])
        return ends

    ends = wait(main())
    ended = "the process ended before the code was finished"
    assert [error for error, _ in ends] == [ended, None, ended]
    assert max(seconds for _, seconds in ends) < 40


def test_100_mb_of_output_would_arrive(safe_box) -> None:
    code = "for _ in range(100): print('x' * 10**6)"
    assert len(plain(code).stdout) > 10**8
    execution = safe_box.run(code, timeout_s=20.0)
    assert execution.error == "stopped: too much output" and len(execution.stdout) < 70_000


@pytest.mark.parametrize(
    "code",
    [
        "import ctypes\nctypes.string_at(0)",
        "x = iter([1])\nfor _ in range(10**6): x = map(abs, x)\nnext(x)",
    ],
    ids=["segfault through ctypes", "recursion in C"],
)
def test_crash_would_take_the_process_along(safe_box, code: str) -> None:
    assert plain(code).returncode == -signal.SIGSEGV
    execution = safe_box.run(code, timeout_s=20.0)
    assert not execution.finished
    assert safe_box.run("1 + 1").value == "2"


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("import time\ntime.sleep(9)", "timed out after 0.3 s"),
        ("import ctypes\nctypes.string_at(0)", "the interpreter crashed (SIGSEGV)"),
        ("import os\nos._exit(0)", "the process ended before the code was finished"),
        ("x = bytearray(1 << 40)", "MemoryError: memory limit reached"),
        ("while True: print('x' * 10**6)", "stopped: too much output"),
        ("open('/usr/x', 'w')", "/usr/x' (programs here write in their own folder only, "),
        (
            "import socket\nsocket.socket()",
            "Operation not permitted (programs here have no network and start no other processes)",
        ),
        ("import sys\nsys.exit('no')", "SystemExit: no"),
    ],
)
def test_every_end_is_a_sentence(safe_box, code: str, ending: str) -> None:
    error = safe_box.run(code, timeout_s=0.3).error
    assert ending in error.splitlines()[-1] and len(error) < 300


# --- the processes around ------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
subprocess.run([sys.executable, "-c", sys.argv[1]])
print("alive")
"""
KILL = {
    "the parent": "import os\nos.kill(os.getppid(), 9)",
    "the group": "import os\nos.killpg(0, 9)",
    "by a system call": "import ctypes, os\nctypes.CDLL(None).syscall(62, os.getppid(), 9)",
}


@pytest.mark.parametrize("name", KILL)
def test_killing_the_server_would_work(make_box, safe_box, name: str) -> None:
    """The parent of a confined process is the server: it must live, and lose nothing."""
    killed = subprocess.run(
        [sys.executable, "-c", PARENT, KILL[name]], capture_output=True, start_new_session=True
    )
    assert b"alive" not in killed.stdout and killed.returncode == -signal.SIGKILL

    async def main() -> list[str | None]:
        calls = [safe_box.sandbox.run(KILL[name] if i % 2 else f"{i}") for i in range(10)]
        return [execution.value for execution in await asyncio.gather(*calls)]

    link = safe_box.sandbox._link(_LIGHT)
    assert asyncio.run(main())[::2] == ["0", "2", "4", "6", "8"]
    assert safe_box.sandbox._link(_LIGHT) is link, "the server was replaced"


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGALRM])
def test_signals_to_all_reach_nobody(safe_box, number: int) -> None:
    victim = "import os, signal, time\nos.kill(os.getpid(), {n})\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", victim.format(n=int(number))]) as process:
        status = os.waitpid(process.pid, os.WUNTRACED)[1]
        assert os.WIFSTOPPED(status) or os.WIFSIGNALED(status) or os.WEXITSTATUS(status)
        process.kill()
    code = (
        "import os\nsent = []\nfor pid in (-1, 0, os.getpid(), *range(1, 50)):\n"
        f"    try: os.kill(pid, {int(number)}); sent.append(pid)\n    except OSError: pass\nsent"
    )
    assert safe_box.run(code).value == "[]"


def test_inherited_descriptors_would_be_written_to(make_box) -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    os.set_blocking(read_end, False)
    code = (
        "import os\nfor fd in range(3, 128):\n    try: os.write(fd, b'leak')\n"
        "    except OSError: pass"
    )
    plain(code, close_fds=False)
    assert os.read(read_end, 100) == b"leak"
    for isolation in ("bubblewrap", "landlock"):
        make_box(isolation).run(code)
        with pytest.raises(BlockingIOError):
            os.read(read_end, 100)
    os.close(read_end)
    os.close(write_end)


# --- the next call -------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_leftovers_would_be_found(safe_box, folder: str) -> None:
    name = f"{folder}/elpo-left-{os.getpid()}"
    write, read = f"open({name!r}, 'w').write('x')", f"print(open({name!r}).read())"
    plain(write)
    try:
        assert plain(read).stdout == b"x\n", "the attack is not one"
        assert safe_box.run(read).stdout == ""
    finally:
        Path(name).unlink()
    safe_box.run(write)
    assert safe_box.run(read).stdout == "" and not Path(name).exists()


POISON = """
import os, sys
for folder in [os.getcwd(), *sys.path, '/tmp', *filter(None, map(os.path.dirname, sys.path))]:
    for name in ('poisoned.py', 'sitecustomize.py', 'poisoned.pth', '__pycache__/poisoned.pyc'):
        try:
            with open(os.path.join(folder, name), 'w') as file:
                file.write('x = 1')
        except OSError:
            pass
"""


def test_poisoned_module_would_be_imported(safe_box, tmp_path) -> None:
    alone = "import sys\nsys.path[:] = ['']\n" + POISON
    plain(alone, cwd=tmp_path)
    look = "import importlib.util\nprint(importlib.util.find_spec('poisoned') is not None)"
    assert plain(look, cwd=tmp_path).stdout == b"True\n", "the attack is not one"
    assert safe_box.run(POISON).error is None
    assert safe_box.run(look).stdout == "False\n"
    function = safe_box.sandbox.call_function("importlib.util:find_spec", "poisoned")
    assert asyncio.run(function) is None


PATCHES = {
    "numpy": ("import numpy\nnumpy.sum = lambda *_: 7", "import numpy\nnumpy.sum([1, 1])"),
    "sympy": ("import sympy\nsympy.factorint = len", "import sympy\nsympy.factorint(9)[3]"),
    "scipy": ("import scipy.special as s\ns.erf = str", "import scipy.special as s\ns.erf(0) + 2"),
    "networkx": (
        "import networkx as n\nn.Graph.order = lambda _: 9",
        "import networkx as n\nn.path_graph(2).order()",
    ),
    "builtins": ("import builtins\nbuiltins.sum = lambda _: 9", "sum([1, 1])"),
    "import system": (
        "import sys\nsys.meta_path.clear()\nsys.modules['colorsys'] = None",
        "import colorsys\n2",
    ),
    "random": (
        "import random\nrandom.random = lambda: 9",
        "import random\n2 if random.random() < 1 else 9",
    ),
    "through memory": (
        "import ctypes\nctypes.c_long.from_address(id(1000000007) + 24).value = 5\n"
        "import math\nctypes.pythonapi.PyDict_SetItem("
        "ctypes.py_object(math.__dict__), ctypes.py_object('sqrt'), ctypes.py_object(str))",
        "import math\nmath.sqrt(4) + 0",
    ),
}
TWICE = """
import sys
exec(sys.argv[1], {})
*lines, last = sys.argv[2].splitlines()
namespace = {}
exec("\\n".join(lines), namespace)
print(float(eval(last, namespace)))
"""


@pytest.mark.parametrize("name", PATCHES)
def test_patched_library_would_last(safe_box, name: str) -> None:
    patch, use = PATCHES[name]
    used_twice = [sys.executable, "-c", TWICE, patch, use]
    assert subprocess.run(used_twice, capture_output=True).stdout != b"2.0\n", "not an attack"

    assert safe_box.run(patch).error is None
    assert float(eval(safe_box.run(use).value, {"np": __import__("numpy")})) == 2

    async def sessions() -> str | None:
        sandbox = safe_box.sandbox
        root = await sandbox.open_session()
        _, patched = await sandbox.step(root, patch, 1)
        beside, other = await sandbox.step(root, use, 1)
        sandbox.drop([root, patched, other])
        return beside.value

    assert float(eval(asyncio.run(sessions()), {"np": __import__("numpy")})) == 2


# --- graders -------------------------------------------------------------------------------------

ENTRY = make_dataset("chain_sum", {}, seed=1, size=1)[0]
PROGRAM = {"code": "", "stdin": "", "calls": [], "first": 0, "main": True, "prelude": False}
GRADERS = {
    "elpo_fast.tasks.gym_verifier:score": (
        {
            "dataset": "chain_sum",
            "config": {},
            "entry": pack_entry(ENTRY),
            "answer": ENTRY["answer"],
        },
        {"score": 1.0, "error": ""},
    ),
    "elpo_fast.tasks.math_verifier:equal": (
        {"answer": r"\frac{1}{2}", "truths": ["0.5"]},
        {"correct": True},
    ),
    "elpo_fast.tasks.code_verifier:run": (
        PROGRAM | {"code": "print(input())", "stdin": "a"},
        {"stdout": base64.b64encode(zlib.compress(b"a\n")).decode(), "error": "", "results": []},
    ),
}


@pytest.mark.parametrize("function", GRADERS)
def test_graders_run_in_the_isolation_that_code_has(safe_box, function: str) -> None:
    payload, result = GRADERS[function]
    assert asyncio.run(safe_box.sandbox.call_function(function, payload, 20.0)) == result
    links = [
        link for (modules, _), link in safe_box.sandbox._links.items() if "tasks" in modules[0]
    ]
    assert {link.ready.result()[0] for link in links} == {safe_box.isolation}


def test_module_that_does_not_start_is_told_with_its_reason(safe_box) -> None:
    safe_box.run("1")
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        asyncio.run(safe_box.sandbox.call_function("no_such_module:f", 1))


@pytest.mark.parametrize(
    "attack",
    [
        "open('/etc/passwd').read(4) == 'root'",
        "__import__('os').system('true') == 0",
        "__import__('socket').create_server(('127.0.0.1', 0)).fileno() >= 0",
        "__import__('os').kill(__import__('os').getppid(), 0) is None",
        "open('/dev/shm/elpo-grader', 'w').write('x') == 1",
    ],
)
def test_graders_that_execute_are_confined_too(safe_box, unprotected, attack: str) -> None:
    assert unprotected(attack) == "True", "the attack is not one"
    Path("/dev/shm/elpo-grader").unlink(missing_ok=True)
    payload = PROGRAM | {"code": f"print({attack})"}
    call = safe_box.sandbox.call_function
    result = asyncio.run(call("elpo_fast.tasks.code_verifier:run", payload, 5.0))
    its_own = safe_box.isolation == "bubblewrap" and "/dev/shm" in attack
    printed = zlib.decompress(base64.b64decode(result["stdout"]))
    assert (printed == b"True\n") == its_own
    assert not Path("/dev/shm/elpo-grader").exists()
    assert asyncio.run(call("math:factorial", 5, 5.0)) == 120


# Descriptors on their way through sockets count for the user, whoever sent them.
IN_FLIGHT = """
import os, socket, sys
from elpo_fast.tools import _confine
if os.getuid() == 0:
    os.setresuid(*[_confine.UID] * 3)  # whom programs run as
pairs = [socket.socketpair() for _ in range(100)]
for sender, _ in pairs:
    socket.send_fds(sender, [b'x'], [0, 0])
print('sent', flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_what_other_sandboxes_send_stops_no_new_process(make_box, isolation: str) -> None:
    box = make_box(isolation, timeout_s=20.0)
    others = subprocess.Popen(
        [sys.executable, "-c", IN_FLIGHT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert others.stdout is not None and others.stdout.read(5) == b"sent\n"
        assert [box.run("1 + 1").value for _ in range(8)] == ["2"] * 8
    finally:
        others.kill()
        others.communicate()
