"""Hostile programs. Each attack is first run as a plain subprocess, where it must work: a test of a
protection that nothing needs would pass for ever."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator

import psutil
import pytest

from elpo_fast.tools.sandbox import SnapshotLostError

SECRET = "planted-b1946ac92492d234"

READ = {
    "read /etc/passwd": "open('/etc/passwd').read(4) == 'root'",
    "environment of others": (
        "import glob\n"
        "def reads(path):\n"
        "    try: return open(path, 'rb').read()\n"
        "    except OSError: return b''\n"
        "any(b'{secret}' in reads(path) for path in glob.glob('/proc/[0-9]*/environ'))"
    ),
    "own environment": "import os\n'{secret}' in os.environ.values()",
    "list /tmp of the machine": "import os\nos.path.basename('{file}') in os.listdir('{folder}')",
    "read a user's file": "open('{file}').read() == '{secret}'",
    "symlink out of /tmp": (
        "import os, tempfile\nlink = tempfile.mkdtemp() + '/link'\nos.symlink('{file}', link)\n"
        "open(link).read() == '{secret}'"
    ),
}
CONNECT = {
    "connect to 127.0.0.1": (
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).recv(5) == b'hello'"
    ),
    "connect to an abstract socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect(chr(0) + '{abstract}')\n"
        "s.recv(5) == b'hello'"
    ),
    "listen": "import socket\nsocket.create_server(('127.0.0.1', 0)).getsockname()[1] > 0",
}
TOUCH = {
    "kill another process": "import os\nos.kill({victim}, 0) is None",
    "trace another process": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "attached = libc.ptrace(16, {victim}, None, None) == 0\nos.waitpid(-1, 0x40000000)\n"
        "libc.ptrace(17, {victim}, None, None)\nattached"
    ),
    "limits of another process": (
        "import resource\nresource.prlimit({victim}, resource.RLIMIT_NOFILE)[0] > 0"
    ),
    "signal by file owner": (
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {victim}) == 0"
    ),
}
SPAWN = {
    "fork": "import os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)[0] == pid",
    "run a program": "import subprocess\nsubprocess.run(['/bin/true']).returncode == 0",
    "background process": (
        "import subprocess\nsubprocess.Popen(['sleep', '0.1'], start_new_session=True).pid > 0"
    ),
    "shell": "import os\nos.system('true') == 0",
    "leaving the process group": "import os\nos.setpgid(0, 0) is None",
    "new user namespace": "import ctypes\nctypes.CDLL(None).unshare(0x10000000) == 0",
}
FILL = {
    "memory": "len(bytearray(1 << 30)) > 0",
    "memory in a file": "import os\nos.memfd_create('x') > 0",
    "a 10 GB file": (
        "import os, tempfile\nwith tempfile.TemporaryFile() as file:\n"
        "    file.truncate(10 << 30)\n    size = file.seek(0, 2)\nsize == 10 << 30"
    ),
    "files without end": (
        "import os, tempfile\nwith tempfile.TemporaryDirectory() as folder:\n"
        "    for i in range(8): open(f'{{folder}}/{{i}}', 'wb').write(bytes(10 << 20))\n"
        "    __import__('time').sleep(0.5)\n"
        "    size = sum(os.path.getsize(f'{{folder}}/{{i}}') for i in range(8))\nsize == 80 << 20"
    ),
    "write beside the program": "open('{folder}/left', 'w').write('x') == 1",
    "descriptors": "import os\nlen([os.dup(0) for _ in range(500)]) == 500",
}
ATTACKS = READ | CONNECT | TOUCH | SPAWN | FILL


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What the attacks are after: a secret in a file and in an environment, servers, a process."""
    folder = tmp_path_factory.mktemp("victim")
    file = folder / "file"
    file.write_text(SECRET)
    os.environ["ELPO_TEST_SECRET"] = SECRET
    abstract = f"elpo-test-{os.getpid()}"
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    servers[1].bind("\0" + abstract)
    servers[1].listen()

    def serve(server: socket.socket) -> None:
        while True:
            try:
                server.accept()[0].sendall(b"hello")
            except OSError:
                return

    for server in servers:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as victim:
        yield {
            "secret": SECRET,
            "file": file,
            "folder": folder,
            "port": servers[0].getsockname()[1],
            "abstract": abstract,
            "victim": victim.pid,
        }
        victim.kill()
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    del os.environ["ELPO_TEST_SECRET"]


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails_and_would_have_worked(safe_box, unprotected, machine, name: str) -> None:
    code = ATTACKS[name].format(**machine)
    assert unprotected(code) == "True", "the attack is not one"
    execution = safe_box.run(code, timeout_s=5.0)
    assert execution.value != "True"
    refused = execution.finished or execution.error.endswith("files in its directory")
    assert refused, "it should be refused, not killed"
    assert psutil.pid_exists(machine["victim"])
    assert safe_box.run("1 + 1").value == "2"


def test_programs_run_as_an_ordinary_user_without_capabilities(safe_box) -> None:
    code = (
        "import ctypes, os\nheader = (ctypes.c_uint32 * 2)(0x20080522, 0)\n"
        "data = (ctypes.c_uint32 * 6)()\nctypes.CDLL(None).capget(header, data)\n"
        "os.getuid() != 0, os.getgid() != 0, os.getgroups(), list(data)"
    )
    value = safe_box.run(code).value
    uid, gid, groups, capabilities = eval(value)
    assert uid and gid and 0 not in groups
    if safe_box.isolation == "bubblewrap":
        assert capabilities == [0] * 6
    else:  # reading a Python below /root may need its one capability
        assert capabilities in ([0] * 6, [4, 4, 0, 0, 0, 0])


def test_fork_bomb_is_over_before_it_starts(safe_box) -> None:
    code = "import os\nmade = 0\nwhile made < 1000:\n    os.fork()\n    made += 1"
    assert "PermissionError" in safe_box.run(code).error
    if os.uname().machine == "x86_64":
        call = "import ctypes\ncall = ctypes.CDLL(None).syscall\n"
        fork_vfork_clone_clone3 = "call(57), call(58), call(56, 17, 0, 0, 0, 0), call(435, 0, 0)"
        assert safe_box.run(call + fork_vfork_clone_clone3).value == "(-1, -1, -1, -1)"


def test_threads_are_bounded(safe_box) -> None:
    code = (
        "import threading\nstarted = 0\ntry:\n    while True:\n"
        "        threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "        started += 1\nexcept (RuntimeError, MemoryError):\n    pass\nstarted"
    )
    assert 1 <= int(safe_box.run(code).value) < 5000
    assert safe_box.run("1 + 1").value == "2"


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm", "."])
def test_files_do_not_reach_the_next_call(safe_box, folder: str) -> None:
    left = f"{folder}/left-{uuid.uuid4()}"  # Landlock shows files that others made there
    written = safe_box.run(f"open('{left}', 'w').write('x')")
    its_own = safe_box.isolation == "bubblewrap" or folder == "."
    assert written.value == ("1" if its_own else None)
    assert safe_box.run(f"import os\nos.path.exists('{left}')").value == "False"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'D' + b'\\xff' * 4000)\n"
        "    except OSError: pass",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'X\\0\\0\\0\\2{}')\n"
        "    except OSError: pass",
        "import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass",
        "import json\njson.dumps = lambda *_, **__: '[1]'",
        "import os, socket\nos._exit = os.close = socket.socket.sendall = print",
        "import builtins\nbuiltins.len = builtins.repr = builtins.isinstance = None",
        "import sys\nsys.stdout = sys.stderr = None",
        "import sys\nsys.modules.clear()",
        "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, dict): thing.clear()",
    ],
    ids=[
        "garbage frames",
        "forged frames",
        "channel closed",
        "json patched",
        "os patched",
        "builtins patched",
        "streams removed",
        "modules removed",
        "everything cleared",
    ],
)
def test_breaking_its_own_interpreter_gets_an_answer_and_harms_nobody(safe_box, code) -> None:
    execution = safe_box.run(code, timeout_s=2.0)
    assert execution.text()
    assert safe_box.run("print(len(repr(1)))").stdout == "1\n"


def test_a_forged_result_is_data_not_trust(safe_box) -> None:
    """It can lie about its own result; what it sends is checked for its form."""
    frame = "b'X' + len(p).to_bytes(4, 'big') + p"
    deep = b"[" * 10**5
    for payload in (b"[]", b'{"value": 1, "error": null, "timeout": false}', b"\xff", b"{", deep):
        code = f"import os\np = {payload!r}\nfor fd in range(3, 64):\n"
        code += f"    try: os.write(fd, {frame})\n    except OSError: pass"
        execution = safe_box.run(code)
        assert execution.value is None and "could not be read" in execution.error


def test_a_step_cannot_fork(safe_box, descendants, unprotected) -> None:
    """Not even when the session is forked anyway, and however often it tries."""
    code = (
        "import os\nmade = 0\nfor _ in range({n}):\n    try:\n        if os.fork() == 0: {then}\n"
    )
    code += "        made += 1\n    except OSError: pass\nmade"
    assert unprotected(code.format(n=3, then="os._exit(0)")) == "3", "the attack is not one"

    async def main() -> None:
        sandbox = safe_box.sandbox
        root = await sandbox.open_session()
        execution, snapshot = await sandbox.step(root, code.format(n=50, then="pass"), 1)
        assert execution.value == "0"
        twice = "import os\nfork = os.fork\nos.fork = lambda: (fork(), fork())[0]"
        _, patched = await sandbox.step(snapshot, twice, 2)
        before = descendants()
        with pytest.raises(SnapshotLostError):  # its second fork is refused, and breaks it
            await sandbox.step(patched, "1", 3, timeout_s=1.0)
        assert len(descendants() - before) <= sandbox._workers
        other = await sandbox.open_session()
        endless = code.format(n=10**6, then="pass")
        execution, _ = await sandbox.step(other, endless, 1, timeout_s=5.0)
        assert not execution.finished
        assert (await sandbox.run("1")).value == "1"
        sandbox.drop([root, snapshot, patched, other])

    asyncio.run(main())


def test_session_steps_do_not_reach_other_sessions(safe_box) -> None:
    async def main() -> tuple[str, str]:
        sandbox = safe_box.sandbox
        first, second = [await sandbox.open_session() for _ in range(2)]
        code = "x = 1\ntry: open('/tmp/f', 'w').write('x')\nexcept OSError: pass"
        await sandbox.step(first, code, 1)
        seen, _ = await sandbox.step(second, "import os\n'x' in dir(), os.path.exists('/tmp/f')", 1)
        sandbox.drop([first, second])
        return seen.value

    assert asyncio.run(main()) == "(False, False)"


def test_pool_survives_a_mixed_siege(make_box, descendants) -> None:
    """Many hostile calls at once, honest ones in between: every answer right, nothing left over."""
    box = make_box(workers=4, timeout_s=0.5, memory_mb=128)
    usual = len(psutil.Process().children(recursive=True))
    hostile = [
        "while True: pass",
        "import ctypes\nctypes.string_at(0)",
        "x = bytearray(1 << 30)",
        "import os\nos.closerange(0, 999)\nwhile True: pass",
        "print('x' * 10**8)",
        "import os\nos._exit(1)",
    ]

    async def main() -> list[str | None]:
        calls = [box.sandbox.run(hostile[i % 6] if i % 2 else f"{i}") for i in range(48)]
        return [execution.value for execution in await asyncio.gather(*calls)]

    values = asyncio.run(main())
    assert values[::2] == [str(number) for number in range(0, 48, 2)]
    assert values[1::2] == [None] * 24
    time.sleep(0.3)
    assert len(psutil.Process().children(recursive=True)) <= usual + 4
