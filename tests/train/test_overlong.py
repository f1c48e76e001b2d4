"""A prompt that leaves no room for an answer is found before a run starts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from elpo_fast.config import ConfigError, parse_config
from elpo_fast.train.parts import assembled


def sizes(folder: Path, **options: Any) -> tuple[int | None, int | None]:
    """Numbers of tasks of a run that has been put together on forty rows, the 18th too long."""
    path = folder / "tasks.jsonl"
    rows = [{"q": f"What is {n}? " + "word " * (3500 if n == 17 else 1), "a": n} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "q", "answer": "a"}
    scratch = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32}
    config = parse_config(
        {
            "run": {"dir": str(folder)},
            "model": {"name": "scratch", "scratch": scratch},
            "task": {
                "source": "file",
                "options": {"path": str(path), "columns": columns} | options,
            },
            "rollout": {"max_tokens": 512},
        }
    )

    async def main() -> tuple[int | None, int | None]:
        async with assembled(config) as parts:
            return parts.source.train_size, parts.source.held_out_size

    return asyncio.run(main())


def test_an_overlong_prompt_is_said_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^1 of 40 prompts .* line 18 with \d+ tokens.*; raise it"
    ):
        sizes(tmp_path)
    train, held_out = sizes(tmp_path, overlong="drop")
    assert train is not None and held_out is not None and train + held_out == 39
