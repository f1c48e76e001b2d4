"""`model.chat_template` and its variables through a run: said, saved, exported, evaluated."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from elpo_fast.config import Config, ConfigError, load_config, parse_config
from elpo_fast.train.export import export_run, run_subject
from elpo_fast.train.loop import train
from elpo_fast.train.parts import settled

MINE = (
    "{% for m in messages %}MY {{ m.role }}{{ mood }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}MY assistant{{ mood }}: {% endif %}"
)


def make_config(folder: Path, **model: Any) -> Config:
    small = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 64}
    return parse_config(
        {
            "run": {"dir": str(folder), "threads": 1},
            "model": {"name": "scratch", "dtype": "float32", "scratch": small, **model},
            "task": {"options": {"steps": 4, "level": 1}, "system": "Go.", "seed": 0},
            "tools": {"workers": 1},
            "rollout": {"call_format": "code", "max_turn_tokens": 4, "max_tokens": 300},
            "algo": {"n_total": 2},
            "train": {"steps": 0},
            "eval": {"tasks": 1},
        }
    )


def test_a_template_of_ones_own_is_said_saved_and_exported(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(MINE, encoding="utf-8")
    config = make_config(tmp_path, chat_template=str(file), chat_template_kwargs={"mood": "!"})
    shown = io.StringIO()
    run = train(config, console=Console(file=shown))
    assert "responses go into it as user messages in <tool_response> tags" in shown.getvalue()
    chat = (run / "chat.txt").read_text(encoding="utf-8")
    assert "MY system!: Go.<|im_end|>MY user!: " in chat
    file.unlink()  # the run has all it needs
    saved = load_config(run / "config.yaml").model
    assert saved.chat_template == MINE
    export_run(run, tmp_path / "exported")
    for folder in (run / "model", tmp_path / "exported"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == MINE
    plain, other = (make_config(tmp_path, **more) for more in ({}, {"chat_template": "chatml"}))
    subject = run_subject(run, settled(plain))
    assert subject.config.model.chat_template == MINE
    assert subject.config.model.chat_template_kwargs == {"mood": "!"}
    assert run_subject(run, settled(other)).config.model.chat_template == "chatml"


@pytest.mark.parametrize("given", ["none.jinja", "nul\0", "."])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, given: str) -> None:
    with pytest.raises(ConfigError, match="give a Jinja file, the text of a template, or chatml"):
        settled(make_config(tmp_path, chat_template=given))


def test_variables_that_a_run_sets_itself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tools is set by the run itself"):
        make_config(tmp_path, chat_template_kwargs={"tools": []})
