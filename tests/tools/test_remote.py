"""The interpreter on a remote service: a stand-in that speaks SandboxFusion's API over HTTP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from elpo_fast.config import ConfigError, ToolConfig, parse_config
from elpo_fast.tools import remote
from elpo_fast.tools.remote import RemoteSandbox
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import RunError, Task, ToolCall, ToolResult

Handle = Callable[[dict[str, Any]], "dict[str, Any] | int"]


def run_code(request: dict[str, Any]) -> dict[str, Any]:
    """A `RunCodeResponse` to a `RunCodeRequest`, as the service makes them."""
    assert request["language"] == "python"
    result: dict[str, Any] = {"execution_time": 0.1, "return_code": None}
    try:
        done = subprocess.run(
            [sys.executable, "-c", request["code"]],
            capture_output=True,
            text=True,
            timeout=request["run_timeout"],
            stdin=subprocess.DEVNULL,
        )
        result |= {"status": "Finished", "return_code": done.returncode}
        result |= {"stdout": done.stdout, "stderr": done.stderr}
    except subprocess.TimeoutExpired:
        result |= {"status": "TimeLimitExceeded", "stdout": "", "stderr": ""}
    failed = result["status"] != "Finished" or result["return_code"]
    return {
        "status": "Failed" if failed else "Success",
        "message": "",
        "compile_result": None,
        "run_result": result,
        "executor_pod_name": None,
        "files": {},
    }


SANDBOX_ERROR = {"status": "SandboxError", "message": "no room", "run_result": None}


class Service(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.handle_code: Handle = run_code
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        reply = self.server.handle_code(request) if self.path == "/run_code" else 404
        body = b"" if isinstance(reply, int) else json.dumps(reply).encode()
        self.send_response(reply if isinstance(reply, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing to be told."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01))
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(service: Service, *codes: str, url: str = "", timeout_s: float = 5.0) -> list[ToolResult]:
    async def main() -> list[ToolResult]:
        config = ToolConfig(
            names=["code_interpreter"], remote_url=url or service.url, timeout_s=timeout_s
        )
        toolbox = Toolbox(config)
        state = await toolbox.open(Task("t", (), "test"))
        try:
            calls = [ToolCall("code_interpreter", {"code": code}) for code in codes]
            return list(await asyncio.gather(*(toolbox.execute(state, call) for call in calls)))
        finally:
            await toolbox.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    "code",
    [
        "2**10",
        "print('a')\n'b'",
        "import sys\nprint('bad', file=sys.stderr)\n1",
        "def f(x):\n    return 1 / x\nf(0)",
        "x = = 3",
        "for i in range(2): print(i)",
        "",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
        "import pickle\npickle.loads(pickle.dumps(P(2)))",
        "import os\nos._exit(0)",
        "import ctypes\nctypes.string_at(0)",
        "print('é{}%s', \"'''\")",
        "input()",
    ],
)
def test_results_are_those_of_the_local_sandbox(service, make_box, code: str) -> None:
    (result,) = run(service, code)
    assert result.content == make_box().run(code).text()


def test_time_limit_is_told_with_the_line_or_without(service) -> None:
    soft, hard = run(
        service,
        "print('on the way')\nwhile True: pass",
        "import itertools\nsum(itertools.repeat(0))",
        timeout_s=0.5,
    )
    assert soft.content == "on the way\nline 2: while True: pass\ntimed out after 0.5 s"
    assert hard.content == "timed out after 0.5 s" and hard.error
    assert service.requests[0]["run_timeout"] == 1.5


def test_long_output_is_cut(service) -> None:
    (result,) = run(service, "print('x' * 10**6)\nprint('last')")
    assert len(result.content) < 70_000 and result.content.endswith("last")


def test_forged_or_broken_outcomes_are_data(service) -> None:
    service.handle_code = lambda request: run_code(
        {**request, "code": request["code"].replace("json.dumps(outcome)", "'[1]'")}
    )
    assert "could not be read" in run(service, "1")[0].content


@pytest.mark.parametrize("fault", [503, 500, SANDBOX_ERROR, {"odd": 1}], ids=str)
def test_passing_faults_are_retried(service, fault) -> None:
    faults = iter([fault, fault])
    service.handle_code = lambda request: next(faults, None) or run_code(request)
    assert run(service, "1 + 1")[0].content == "2"
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (503, "it answers with HTTP status 503"),
        (404, "it answers with HTTP status 404"),
        (SANDBOX_ERROR, "it says 'no room'"),
        ({"odd": 1}, "its answer is not one of SandboxFusion's"),
    ],
    ids=str,
)
def test_lasting_faults_stop_the_run(service, fault, message: str) -> None:
    service.handle_code = lambda request: fault
    with pytest.raises(RunError, match=message) as caught:
        run(service, "1 + 1")
    assert service.url in str(caught.value) and "tools.remote_url" in str(caught.value)


def test_service_that_is_not_there_stops_the_run(service) -> None:
    with pytest.raises(RunError, match=r"http://127\.0\.0\.1:9 does not work: ConnectError"):
        run(service, "1", url="http://127.0.0.1:9")


def test_service_that_does_not_answer_stops_the_run(service, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_QUEUE_S", 0.0)
    service.handle_code = lambda request: time.sleep(3) or 503  # type: ignore[func-returns-value]
    with pytest.raises(RunError, match="does not work: ReadTimeout"):
        run(service, "1", timeout_s=0.1)


def test_code_that_alone_breaks_the_service_is_told_to_the_model(service) -> None:
    service.handle_code = lambda request: 500 if "evil" in request["code"] else run_code(request)
    evil, good = run(service, "evil = 1", "1 + 1")
    assert (evil.content, evil.error) == ("the sandbox could not run this code", True)
    assert good.content == "2"


def test_endless_answers_are_not_read_to_the_end(service, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_FLOOD_CAP", 10**5)
    (result,) = run(service, "print('x' * 10**6)")
    assert result.content == "stopped: too much output"


def test_workers_bound_the_programs_sent_at_once(service) -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def count(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        reply = run_code(request)
        with lock:
            running -= 1
        return reply

    service.handle_code = count

    async def main() -> None:
        sandbox = RemoteSandbox(service.url, timeout_s=5.0, workers=2)
        await asyncio.gather(*(sandbox.run("1") for _ in range(6)))
        await sandbox.close()

    asyncio.run(main())
    assert most == 2


def test_url_must_be_one() -> None:
    with pytest.raises(ConfigError, match=r"tools\.remote_url"):
        parse_config({"tools": {"remote_url": "localhost:8080"}})
