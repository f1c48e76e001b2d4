"""What the documentation says is there: keys, commands, files, and every key has a word."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from elpo_fast import cli
from elpo_fast.config import Config, load_config, parse_config
from elpo_fast.tasks import make_source
from elpo_fast.types import Task

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "kernels/README.md", *ROOT.glob("docs/*.md")])
SECTIONS = "|".join(Config.model_fields)
KEY = re.compile(rf"`({SECTIONS})((?:\.[a-z_0-9]+)+)(?:[=:][^`]*)?`")
COMMAND = re.compile(r"^(?:torchrun .*? -m elpo_fast\.cli|elpo) (.*)$", re.MULTILINE)
OTHERS = {
    "sft.yaml",
    "train.yaml",
    *(f"task.{field.name}" for field in fields(Task)),
}  # no keys, all the same
FREE = ("task.options", "algo.options", "tools.options", "tools.functions", "rollout.sglang.args")


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def known(key: str) -> bool:
    """Whether a dotted key is one of the configuration's."""
    if key.startswith(FREE):
        return True
    kind: object = Config
    for name in key.split("."):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return False
        if name not in kind.model_fields:
            return False
        field = kind.model_fields[name].annotation
        inner = [field, *getattr(field, "__args__", ())]
        kind = next((k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return True


def test_keys_exist(page: Path) -> None:
    found = {"".join(match) for match in KEY.findall(page.read_text())}
    assert not [key for key in sorted(found - OTHERS) if not known(key)]


def test_known_keys_are_told_from_others() -> None:
    assert known("train.lr") and known("model.lora.rank") and known("task.options.path")
    assert not known("train.learning_rate") and not known("train.lr.peak")


def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    ours = [link for link in links if "://" not in link]
    assert not [link for link in ours if not (page.parent / link).exists()]


def commands(page: Path) -> list[list[str]]:
    """Commands of code blocks, without those whose arguments are placeholders or comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    said = "\n".join(blocks).replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in COMMAND.findall(said)]
    return [words for words in found if not any(re.search(r"\[|[A-Z]{2}|\|", w) for w in words)]


def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        parsed, left = cli._parser().parse_known_args(words)
        assert all(map(cli._is_override, left)), words
        if parsed.run == cli._train and Path(parsed.config).is_file():
            load_config(parsed.config, [*parsed.overrides, *left], parsed.over)


def test_recipes_are_configurations() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        parse_config(yaml.safe_load(block))


def test_there_are_commands_to_understand() -> None:
    assert len([words for page in PAGES for words in commands(page)]) >= 20


def test_every_key_has_a_word_and_pages_that_are_made_are_new() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = generate.page()
    assert not re.findall(r"^\| `([a-z_.0-9]+)` .*\|  \|$", text, re.MULTILINE)
    made = {generate.PAGE: text, generate.REFERENCE: generate.reference()}
    for page, now in made.items():
        assert page.read_text() == now, f"{page.name}: run python docs/generate.py"


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.html")}
    assert {page.stem for page in ROOT.glob("docs/*.md")} - {"index"} <= pages


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_a_reward_of_verl_goes_on_judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/migrating.md").read_text()
    [text] = re.findall(r"^```python\n(# scores.py\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "scores.py").write_text(text)
    (tmp_path / "my_rewards.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    told = (data_source, ground_truth, extra_info)\n"
        "    assert told == ('sums', '42', {'split': 'train'})\n"
        "    return {'score': float(solution_str == ground_truth)}\n"
    )
    row = {
        "data_source": "sums",
        "reward_model": {"ground_truth": "42", "style": "rule"},
        "extra_info": {"split": "train"},
    }
    questions = ([{"role": "user", "content": f"{n} x 7?"}] for n in range(9))
    rows = (json.dumps(row | {"prompt": question}) + "\n" for question in questions)
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    task = {
        "source": "file",
        "reward": "scores:score",
        "options": {"preset": "verl", "path": "rows.jsonl", "held_out_fraction": 0.5},
    }
    source = make_source(parse_config({"task": task}).task, 0, None)
    for said, reward in (("42", 1.0), ("41", 0.0)):
        messages = [*source.train(0).messages, {"role": "assistant", "content": said}]
        verdict = asyncio.run(source.grade(source.train(0), messages, "answer"))
        assert verdict.reward == reward
