"""Nothing that a reply says raises here: not its text, its numbers, its sizes or its form."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

import pytest

from elpo_fast.config import ToolConfig
from elpo_fast.tools import _link, remote
from elpo_fast.tools.sandbox import read_outcome
from elpo_fast.tools.toolbox import Toolbox
from elpo_fast.types import Task, ToolCall, ToolResult, Verdict

BROKEN = "the result could not be read: the program broke its interpreter"
KILOBYTES = """
import sys
for module in list(sys.modules.values()):
    if hasattr(module, '_peak_kb'):
        module._peak_kb = lambda: {value}
"""
PROGRAMS = {
    "lone surrogate in an exception": "raise ValueError('\\ud83d')",
    "lone surrogate in a repr": "class A:\n    def __repr__(self): return '\\udcff'\nA()",
    "lone surrogate printed": "print('\\ud83d')",
    "bytes that are no text": "import os\nos.write(1, b'\\x80\\xff'), os.write(2, b'\\xc3')",
    "huge number of kilobytes": KILOBYTES.format(value="10**4000"),
    "infinite number of kilobytes": KILOBYTES.format(value="float('inf')"),
    "no number of kilobytes": KILOBYTES.format(value="'x'"),
    "outcome of another form": (
        "import json\njson.dumps = lambda *_, **__: '[' * 100000 + ']' * 100000"
    ),
    "outcome of other types": (
        'import json\njson.dumps = lambda *_, **__: \'{"value": 1, "error": [], "timeout": 3}\''
    ),
    "outcome with NaN": (
        'import json\njson.dumps = lambda *_, **__: \'{"value": NaN, "error": 1e999}\''
    ),
    "outcome without end": "import json\njson.dumps = lambda *_, **__: 'x' * (3 << 20)",
}


@pytest.mark.parametrize("tool", ["code_interpreter", "python_session"])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_are_answered_with_text(any_box, tool: str, program: str) -> None:
    async def main() -> list[ToolResult]:
        toolbox = Toolbox(ToolConfig(names=[tool]), any_box.sandbox)
        state = await toolbox.open(Task("t", (), "test"))
        hostile = await toolbox.execute(state, ToolCall(tool, {"code": program}))
        after = await toolbox.execute(hostile.state, ToolCall(tool, {"code": "1 + 1"}))
        beside = await toolbox.execute(state, ToolCall(tool, {"code": "1 + 1"}))
        await toolbox.release([state, hostile.state, after.state, beside.state])
        return [hostile, after, beside]

    hostile, after, beside = asyncio.run(main())
    for result in (hostile, after, beside):
        assert result.content.encode() and 0 <= result.seconds < 3600
    assert beside.content == "2"


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"value": "\\ud83d", "error": null, "timeout": false}', ("\\ud83d", None, True)),
        (b'{"value": null, "error": "\\udc00", "timeout": false}', (None, "\\udc00", True)),
        (b'{"value": "\\ud83d\\ude00", "error": null, "timeout": 0}', ("\U0001f600", None, True)),
        (b'{"value": 1, "error": null, "timeout": false}', (None, BROKEN, False)),
        (b'{"value": null}', (None, BROKEN, False)),
        (b"[" * 10**5, (None, BROKEN, False)),
        (b"1" * 10**5, (None, BROKEN, False)),
        (b"\xff", (None, BROKEN, False)),
        (b"", (None, BROKEN, False)),
    ],
    ids=range(9),
)
def test_outcomes_are_text_or_broken(payload: bytes, expected: Any) -> None:
    assert read_outcome(payload, 5.0) == expected


GOOD: dict[str, Any] = {"id": 1, "how": "done", "signal": 0, "lengths": [1, 0, 2]}


@pytest.mark.parametrize(
    ("header", "good"),
    [
        (GOOD, True),
        ({**GOOD, "id": -1}, False),
        ({**GOOD, "id": "1"}, False),
        ({**GOOD, "id": True}, False),
        ({**GOOD, "how": 3}, False),
        ({**GOOD, "signal": 10**30}, False),
        ({**GOOD, "signal": 1.5}, False),
        ({**GOOD, "snapshot": [1]}, False),
        ({**GOOD, "lengths": [1, 0, 1 << 40]}, False),
        ({**GOOD, "lengths": [-1, 2, 2]}, False),
        ({**GOOD, "lengths": [1, 0, 1, 1]}, False),
        ({**GOOD, "lengths": 3}, False),
        ({"how": "done", "lengths": []}, False),
        ([], False),
        (b"\xff", False),
        (b"[" * 3000, False),
        (b" " * 5000, False),
    ],
    ids=range(17),
)
def test_replies_of_another_form_are_refused(header: Any, good: bool) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("!I", len(text)) + text + b"abc")
        theirs.close()
        replies = _link._read(ours, lambda: None)
        if not good:
            with pytest.raises(ValueError):
                next(replies)
            return
        reply = next(replies)
        assert reply.parts == (b"a", b"", b"bc") and reply.header["id"] == 1
        assert next(replies, None) is None


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_reply_that_breaks_off_is_none(sent: int) -> None:
    """The server was killed while it wrote: another answers the call."""
    text = json.dumps(GOOD).encode()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("!I", len(text)) + text + b"abc"[:sent])
        theirs.close()
        assert next(_link._read(ours, lambda: None), None) is None


RESULT = {"status": "Finished", "stdout": "x", "stderr": None, "return_code": 0}


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"stdout": "\ud83d", "stderr": "\udcff", "return_code": 10**4000}, True),
        ({"stdout": ["x"]}, False),
        ({"stderr": 3}, False),
        ({"return_code": "0"}, False),
        ({"return_code": 1e300}, False),
        ({"status": None}, False),
    ],
    ids=["plain", "strange", "stdout", "stderr", "text code", "float code", "status"],
)
def test_results_of_a_service_are_text_and_numbers(change: dict[str, Any], good: bool) -> None:
    body = json.dumps({"status": "Success", "run_result": {**RESULT, **change}}).encode()
    if not good:
        with pytest.raises(remote._FailedError, match="not one of SandboxFusion's"):
            remote._read(body)
        return
    box = remote.RemoteSandbox("http://localhost", timeout_s=1.0, workers=1)
    execution = box._execution(remote._read(body), "mark", 0.0)
    assert execution.text().encode()


@pytest.mark.parametrize("body", [b"[" * 10**5, b"\xff", b"3", b"null", b"1" * 10**5, b'{"a": 1}'])
def test_what_is_no_result_of_a_service_is_refused(body: bytes) -> None:
    with pytest.raises(remote._FailedError, match="not one of SandboxFusion's"):
        remote._read(body)


def test_records_hold_valid_text_and_finite_rewards() -> None:
    assert ToolResult("a\ud83d").content == "a\\ud83d"
    assert Verdict(True, 1, "\udcff") == Verdict(True, 1.0, "\\udcff")
    for reward in (float("nan"), float("inf"), 10**400, None, "1"):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            Verdict(True, reward, "")  # type: ignore[arg-type]
