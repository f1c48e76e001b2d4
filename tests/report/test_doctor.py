"""What `elpo doctor` says about the sandbox, and about rollouts on a GPU."""

from __future__ import annotations

import pytest

from elpo_fast.config import ConfigError
from elpo_fast.report import doctor
from elpo_fast.tools.sandbox import Protection


@pytest.mark.parametrize(
    ("found", "code", "lines"),
    [
        (
            Protection("landlock", ("reads little", "limits"), ("bubblewrap: no [x]",), ("tells",)),
            0,
            ["landlock", "+ reads little", "+ limits", "! tells", "- not bubblewrap: no [x]"],
        ),
        ("no safe way [here]", 1, ["no safe way [here]"]),
    ],
    ids=["safe", "unsafe"],
)
def test_protection_and_what_keeps_from_the_better_one(
    monkeypatch, capsys, found, code, lines
) -> None:
    async def sandbox() -> Protection | str:
        return found

    monkeypatch.setattr(doctor, "_sandbox", sandbox)
    assert doctor.doctor() == code
    printed = capsys.readouterr().out
    said = printed[printed.index("sandbox") :].removeprefix("sandbox").strip().splitlines()
    assert [line.strip() for line in said] == lines


def test_on_a_gpu_sglang_is_the_engine(monkeypatch) -> None:
    def missing(_: None) -> str:
        raise ConfigError("install sglang")

    monkeypatch.setattr(doctor, "find_python", lambda _: "/its/python")
    assert "rollout.engine=sglang" in doctor._rollouts()
    assert doctor._rollouts().endswith("SGLang is there (/its/python)")
    monkeypatch.setattr(doctor, "find_python", missing)
    assert doctor._rollouts().endswith("install sglang")
