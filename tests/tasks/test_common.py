"""Reading answers and splitting by content."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from elpo_fast.tasks.common import digest, is_held_out, last_boxed, last_tagged, shown


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}} and {more}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x \left\{ 1 }", r"x \left\{ 1"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"} \boxed{1}", "1"),
        (r"{ \boxed{1}", "1"),
        (r"\boxed{2 \boxed{3}}", "3"),
        (r"\boxed 1", None),
        ("", None),
    ],
)
def test_last_boxed_is_the_last_complete_one(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<answer>1</answer>", "1"),
        ("<answer>1</answer><answer> 2\n</answer> end", "2"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1", None),
        ("</answer>1<answer>", None),
        ("", None),
    ],
)
def test_last_tagged_is_the_last_complete_one(text, content):
    assert last_tagged(text) == content


@pytest.mark.parametrize("read", [last_boxed, last_tagged], ids=["boxed", "tagged"])
@pytest.mark.parametrize("part", [r"\boxed{", "<answer>", "{", "}", "</answer>"])
def test_reading_hostile_text_takes_linear_time(read, part):
    start = time.perf_counter()
    read(part * 100_000)
    assert time.perf_counter() - start < 2


def test_is_held_out_takes_the_wanted_share_by_content_alone():
    digests = [digest(str(number)) for number in range(4000)]
    for fraction in (0.05, 0.5):
        share = sum(is_held_out(content, fraction) for content in digests) / 4000
        assert share == pytest.approx(fraction, abs=0.03)
    assert {c for c in digests if is_held_out(c, 0.05)} < {
        c for c in digests if is_held_out(c, 0.5)
    }


def test_digest_does_not_depend_on_the_process():
    code = "from elpo_fast.tasks.common import digest; print(digest('x'))"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, text=True).strip() == digest("x")


def test_shown_is_one_short_line():
    assert shown("a\n b") == "a b"
    assert len(shown("9" * 1000)) == 60


def test_the_package_imports_nothing_heavy():
    # Verifiers import it inside the sandbox.
    heavy = "('numpy', 'pydantic', 'torch', 'reasoning_gym', 'math_verify')"
    code = f"import sys, elpo_fast.tasks; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
