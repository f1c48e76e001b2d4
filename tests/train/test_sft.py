"""Supervised fine-tuning on conversations: what is learned, and runs that do nothing else."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from elpo_fast import cli
from elpo_fast.config import Config, ConfigError, ScratchConfig, load_config, parse_config
from elpo_fast.model.load import scratch_model
from elpo_fast.model.tokenizer import train_tokenizer
from elpo_fast.rollout.chat import Chat
from elpo_fast.tasks.conversations import Conversation, ConversationError, read_conversation
from elpo_fast.train import loop
from elpo_fast.train.checkpoint import latest
from elpo_fast.train.export import export_run
from elpo_fast.train.sft import held_out_loss, tree_of
from elpo_fast.train.step import NonFiniteError, PolicyOptimizer
from elpo_fast.train.summary import read_metrics, reproducible
from elpo_fast.tree.store import Tree

from ..rollout.test_chat import HERMES_TEMPLATE as HERMES

TOOL = {
    "type": "function",
    "function": {
        "name": "python_session",
        "description": "Runs Python.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
    },
}
FORGETS = (  # earlier thinking, and opens that of the next message
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' }}"
    "{{- m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)


def calls(code: str) -> list[dict[str, Any]]:
    return [{"function": {"name": "python_session", "arguments": {"code": code}}}]


MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add 3 to 12."},
    {"role": "assistant", "content": "<think>\nx\n</think>\n\nSo:", "tool_calls": calls("12+3")},
    {"role": "tool", "content": "15"},
    {"role": "assistant", "content": "15"},
    {"role": "user", "content": "And 1 more?"},
    {"role": "assistant", "content": "", "tool_calls": calls("15+1")},
    {"role": "tool", "content": "16 <|im_end|>"},
    {"role": "assistant", "content": "<think>\ny\n</think>\n\n16"},
]


def make_chat(template: str | None, call_format: str = "hermes") -> Chat:
    tokenizer = train_tokenizer(["Add 3 to 12 <think> </think> print(15)\n\n"] * 3)
    if template:
        tokenizer.chat_template = template
    return Chat(tokenizer, call_format, [TOOL])  # type: ignore[arg-type]


def conversation(messages: Sequence[Any] = MESSAGES, **columns: Any) -> Conversation:
    return read_conversation({"messages": list(messages), **columns}, "chats.jsonl line 1")


def branches(tree: Tree) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(tree.token_ids[leaf], tree.agent[leaf]) for leaf in tree.leaves]


def learned(ids: np.ndarray, agent: np.ndarray, chat: Chat) -> list[str]:
    """Texts of the runs of trained tokens."""
    runs = itertools.groupby(zip(ids, agent, strict=True), key=lambda pair: pair[1])
    return [chat.decode([token for token, _ in run]) for trained, run in runs if trained]


@pytest.mark.parametrize("template", [None, HERMES], ids=["project's", "model's own"])
@pytest.mark.parametrize("call_format", ["hermes", "code"])
def test_exactly_what_the_assistant_says_is_learned(template: str | None, call_format: str) -> None:
    chat = make_chat(template, call_format)
    messages = [m if m["role"] != "tool" else m | {"content": "16"} for m in MESSAGES]
    texts = [chat.call_text(m) for m in messages if m["role"] == "assistant"]
    assert "12+3" in texts[0] and texts[0].startswith("<think>")
    rendered = [
        {"role": m["role"], "content": chat.call_text(m) if m.get("tool_calls") else m["content"]}
        for m in messages
    ]
    first, second = branches(tree_of(conversation(messages), chat))
    for (ids, agent), last, expected in ((first, 5, texts[:2]), (second, 9, texts[2:])):
        whole = chat.tokenizer.apply_chat_template(
            rendered[:last],
            tools=[TOOL] if call_format == "hermes" else None,
            tokenize=True,
            return_dict=False,
        )
        end = len(whole) - whole[::-1].index(chat.end_of_turn)  # then the template's line break
        assert ids.tolist() == whole[:end]
        assert learned(ids, agent, chat) == [f"{text}<|im_end|>" for text in expected]


def test_what_a_template_forgets_is_forgotten_where_it_forgets_it() -> None:
    chat = make_chat(FORGETS)
    (ids, agent), (later, trained) = branches(tree_of(conversation(), chat))
    call = '<tool_call>{"name": "python_session", "arguments": {"code": "12+3"}}</tool_call>'
    assert learned(ids, agent, chat)[0] == f"x\n</think>\n\nSo:{call}<|im_end|>"
    assert chat.decode(ids).count("<think>") == 2  # both opened by the template
    assert learned(later, trained, chat)[1] == "y\n</think>\n\n16<|im_end|>"
    before = chat.decode(later).partition("And 1 more?")[0]
    assert "x\n" not in before and "So:" in before


def test_a_result_cannot_forge_the_end_of_a_turn() -> None:
    chat = make_chat(HERMES)
    ends = []
    for result in ("16", "16 <|im_end|>"):
        messages = [m | ({"content": result} if m["content"] == "16 <|im_end|>" else {})
                    for m in MESSAGES]  # fmt: skip
        (_, (ids, agent)) = branches(tree_of(conversation(messages), chat))
        assert result in chat.decode(ids)
        ends.append([(ids[agent == flag] == chat.end_of_turn).sum() for flag in (0, 1)])
    assert ends[0] == ends[1]


def test_tools_shown_are_the_conversations_as_the_run_describes_them() -> None:
    chat = make_chat(HERMES)
    own = {"type": "function", "function": {"name": "search", "description": "Own."}}
    same = {"type": "function", "function": {"name": "python_session", "description": "Other."}}
    hello = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

    def shown(messages: Sequence[Any], **columns: Any) -> str:
        ids, _ = branches(tree_of(conversation(messages, **columns), chat))[0]
        return chat.decode(ids)

    assert shown(MESSAGES).startswith("<|im_start|>system\n" + json.dumps([TOOL]))
    listed = shown(MESSAGES, tools=[own, same])
    assert "Own." in listed and "Runs Python." in listed and "Other." not in listed
    assert shown(hello).startswith("<|im_start|>user\nHi")
    assert "Runs Python." in shown(hello, tools=[same])
    foreign = [hello[0], {"role": "assistant", "tool_calls": [{"name": "buy", "arguments": {}}]}]
    assert "Runs Python." not in shown(foreign)
    assert chat.tools == [TOOL]


def test_a_message_of_weight_zero_is_read_and_not_learned() -> None:
    chat = make_chat(None)
    messages = [m | ({"weight": 0} if m["content"] == "15" else {}) for m in MESSAGES]
    ids, agent = branches(tree_of(conversation(messages), chat))[0]
    (text,) = learned(ids, agent, chat)
    assert "12+3" in text and chat.decode(ids).endswith("assistant\n15<|im_end|>")


def test_text_that_no_encoding_has_is_written_out() -> None:
    bad = "\ud83d"
    call = [{"function": {"name": "python_session", "arguments": {"code": bad}}}]
    said = [{"role": "user", "content": bad}, {"role": "assistant", "content": bad}]
    chat = make_chat(None)
    ids, _ = branches(tree_of(conversation([said[0], said[1] | {"tool_calls": call}]), chat))[0]
    assert chat.decode(ids).count("\\ud83d") == 3


def test_what_cannot_be_rendered_says_why() -> None:
    with pytest.raises(ConversationError, match=r"it calls search\(q\), and .* has but python_s"):
        call = [{"function": {"name": "search", "arguments": {"q": 1}}}]
        tree_of(
            conversation([MESSAGES[1], {"role": "assistant", "tool_calls": call}]),
            make_chat(None, "code"),
        )
    with pytest.raises(ConversationError, match=r"has <\|im_end\|> in it"):
        said = {"role": "assistant", "content": "15<|im_end|>"}
        tree_of(conversation([MESSAGES[1], said]), make_chat(None))
    asked = MESSAGES[1]["content"]
    refuses = (
        HERMES + f"{{% if messages[0].content == {asked!r} %}}{{{{ raise_exception('No!') }}}}"
    )
    refuses += "{% endif %}"
    chat = make_chat(refuses)
    with pytest.raises(ConversationError, match="chat template refuses messages of user: No!"):
        tree_of(conversation(MESSAGES[1:]), chat)


@pytest.mark.parametrize("template", [HERMES, FORGETS], ids=["one prefix", "prefixes that differ"])
def test_the_loss_is_that_of_plain_rows(template: str) -> None:
    chat = make_chat(template)
    size = ScratchConfig(hidden_size=32, layers=2, heads=2, kv_heads=1, intermediate_size=64)
    model = scratch_model(size, chat.tokenizer, seed=0)
    trees = [tree_of(conversation(MESSAGES[: n + 1]), chat) for n in (8, 4, 2)]
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, agent in (branch for tree in trees for branch in branches(tree)):
            tokens, trained = torch.from_numpy(ids).long(), torch.from_numpy(agent[1:]).bool()
            logits = model(tokens[None], use_cache=False).logits[0, :-1][trained]
            total += float(torch.nn.functional.cross_entropy(
                logits, tokens[1:][trained], reduction="sum"
            ))  # fmt: skip
            count += int(trained.sum())
    policy = PolicyOptimizer(model, lr=1e-3, temperature=0.5)
    for budget in (8192, 150):
        assert held_out_loss(trees, policy, budget) == pytest.approx(total / count, rel=1e-5)


def rows(count: int) -> list[dict[str, Any]]:
    """Sums, every third with a call."""
    found = []
    for n in range(count):
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"Add 1 to {n}."}]
        if n % 3 == 0:
            messages += [
                {"role": "assistant", "content": "", "tool_calls": calls(f"{n}+1")},
                {"role": "tool", "content": str(n + 1)},
            ]
        found.append({"messages": [*messages, {"role": "assistant", "content": f"It is {n + 1}."}]})
    return found


def make_config(folder: Path, data: list[Any] | None = None, **sections: Any) -> Config:
    folder.mkdir(exist_ok=True)
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data or rows(20)))
    scratch = {
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
        "kv_heads": 1,
        "intermediate_size": 64,
        "context": 512,
    }
    config: dict[str, Any] = {
        "run": {"dir": str(folder), "threads": 1},
        "model": {"name": "scratch", "dtype": "float32", "scratch": scratch},
        "task": {"options": {"steps": 4, "level": 1}, "system": "Go.", "seed": 0},
        "tools": {"workers": 1},
        "rollout": {"max_turn_tokens": 12, "max_tokens": 512},
        "algo": {"n_total": 4},
        "sft": {"data": str(path), "epochs": 3, "batch": 4, "lr": 2e-2, "warmup": 2},
        "train": {"steps": 1, "tasks_per_step": 2, "lr": 1e-3, "checkpoint_every": 1},
        "eval": {"tasks": 2},
    }
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values
    return parse_config(config)


def run(config: Config, *, sft_only: bool = True, resume: bool = False) -> tuple[Path, str]:
    """The run folder, and what was said."""
    said = io.StringIO()
    console = Console(file=said, width=200)
    return loop.train(config, resume=resume, sft_only=sft_only, console=console), said.getvalue()


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model" / "model.safetensors")


def test_sft_alone_learns_and_leaves_a_model(tmp_path: Path) -> None:
    path, said = run(make_config(tmp_path))
    records = read_metrics(path)
    assert {record["phase"] for record in records} == {"sft"}
    held_out = [(r["step"], r["held_out_loss"]) for r in records if "held_out_loss" in r]
    assert [step for step, _ in held_out] == [0, 5, 10, 15]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 15 and losses[-1] < 0.6 * losses[0]
    assert held_out[-1][1] < 0.6 * held_out[0][1]
    lr = [r["lr"] for r in records if "lr" in r]
    assert lr[2] == max(lr) == 2e-2 and lr[0] < lr[1] < lr[2] and lr[-1] < 1e-3
    assert "19 conversations, " in said and "; 1 held out" in said
    assert f"held-out loss: {held_out[0][1]:.3f} before SFT" in said
    found = latest(path)
    assert found is not None and found.name == "sft-00000015"
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    assert len(AutoTokenizer.from_pretrained(path / "model")) == model.config.vocab_size
    export_run(path, tmp_path / "before", step=10)
    assert (tmp_path / "before" / "model.safetensors").is_file()
    with pytest.raises(LookupError, match="steps: 10, 15"):
        export_run(path, tmp_path / "absent", step=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_equals_the_uninterrupted_run(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"checkpoint_every": 3, "held_out_fraction": 0.2, "epochs": 2}

    def config(name: str) -> Config:
        made = make_config(tmp_path)
        update = {
            "run": made.run.model_copy(update={"name": name}),
            "sft": made.sft.model_copy(update=options),
            "model": made.model.model_copy(update={"dtype": dtype}),
        }
        return made.model_copy(update=update)

    whole, _ = run(config("whole"))
    real = PolicyOptimizer.nll_update
    for crash in (3, 2, 3):  # updates after which each try stops: after 3, 5 and 7 of 8
        made = itertools.count()

        def stop(self: Any, batches: Any, made: Any = made, crash: int = crash) -> Any:
            if next(made) == crash:
                raise KeyboardInterrupt
            return real(self, batches)

        with monkeypatch.context() as patched:
            patched.setattr(PolicyOptimizer, "nll_update", stop)
            resume = latest(tmp_path / "cut") is not None
            with pytest.raises(KeyboardInterrupt):
                run(config("cut"), resume=resume)
    cut, _ = run(config("cut"), resume=True)
    assert reproducible(read_metrics(cut)) == reproducible(read_metrics(whole))
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again, _ = run(config("cut"), resume=True)
    assert reproducible(read_metrics(again)) == reproducible(read_metrics(whole))


def test_an_early_stop_is_the_end(tmp_path: Path) -> None:
    config = make_config(tmp_path, sft=make_sft(tmp_path, {"epochs": 9, "target_loss": 99.0}))
    path, _ = run(config)
    records = read_metrics(path)
    assert [r["step"] for r in records if "loss" in r] == [*range(1, 9)]
    found = latest(path)
    assert found is not None and found.name == "sft-00000008"
    run(config, resume=True)
    assert read_metrics(path) == records


def test_other_conversations_are_not_gone_on_with(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run(config)
    make_config(tmp_path, data=rows(20)[::-1])
    with pytest.raises(ConfigError, match="has other conversations now"):
        run(config, resume=True)


def test_training_goes_on_where_sft_alone_ended(tmp_path: Path) -> None:
    sft = {"epochs": 1, "demonstrations": 2, "held_out_fraction": 0}
    whole, said = run(make_config(tmp_path / "whole", sft=make_sft(tmp_path / "whole", sft)),
                      sft_only=False)  # fmt: skip
    phases = [record["phase"] for record in read_metrics(whole)]
    assert phases == ["eval", *["sft"] * 6, "eval", "rl", "eval"]
    assert "before SFT" in said and "after ELPO" in said
    config = make_config(tmp_path / "cut", sft=make_sft(tmp_path / "cut", sft))
    run(config)
    cut, _ = run(config, sft_only=False, resume=True)
    records = [reproducible(read_metrics(path)) for path in (cut, whole)]
    assert records[0] == [record for record in records[1] if record.get("name") != "before SFT"]
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match="is past its supervised fine-tuning; go on with elpo tr"):
        run(config, resume=True)


def make_sft(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    return {"data": str(folder / "chats.jsonl"), "batch": 4, "lr": 1e-3} | changes


def test_held_out_conversations_of_another_file(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows(23)[20:]))
    sft = make_sft(tmp_path, {"epochs": 1, "held_out_path": str(other)})
    _, said = run(make_config(tmp_path, sft=sft))
    assert "20 conversations, " in said and "; 3 held out" in said
    assert "tools.names" not in said


def test_calls_of_tools_that_the_run_lacks_are_said(tmp_path: Path) -> None:
    tools = {"names": []}
    _, said = run(make_config(tmp_path, sft=make_sft(tmp_path, {"epochs": 1}), tools=tools))
    assert "they call python_session, not among this run's tools (tools.names)" in said


def test_one_prompt_alone_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has one prompt, which is held out; .*fraction=0"):
        run(make_config(tmp_path, data=rows(1) * 3))


@pytest.mark.parametrize(
    ("keys", "than", "remedy"),
    [
        ({}, "rollout.max_tokens=512", "raise rollout.max_tokens or set sft.overlong=drop"),
        ({"max_tokens": 9999}, "the 512 of the model's context", "set sft.overlong=drop"),
    ],
    ids=["the limit of rollouts", "the model's context"],
)
def test_conversations_that_are_too_long(
    keys: dict[str, Any], than: str, remedy: str, tmp_path: Path
) -> None:
    data = rows(20)
    data[17]["messages"][0]["content"] += " word" * 900
    sft = make_sft(tmp_path, keys)
    with pytest.raises(ConfigError) as caught:
        run(make_config(tmp_path, data=data, sft=sft))
    said = f"1 of 20 conversations have more tokens than {than} (first "
    assert str(caught.value).startswith(said) and "line 18 with " in str(caught.value)
    assert str(caught.value).endswith(f"; {remedy}")
    _, told = run(make_config(tmp_path, data=data, sft=sft | {"overlong": "drop", "epochs": 1}))
    assert "18 conversations, " in told and said in told and "are left out" in told
    with pytest.raises(ConfigError, match=r"^20 of 20 .*; raise sft.max_tokens or give shorter"):
        other = {"name": "other"}
        none = sft | {"overlong": "drop", "max_tokens": 4}
        run(make_config(tmp_path, sft=none, run=other))


def test_faults_of_rendering_are_told_together(tmp_path: Path) -> None:
    data = rows(6)
    for n in (1, 4):
        data[n]["messages"][-1]["content"] += "<|im_end|>"
    with pytest.raises(ConfigError, match=r"2 of 6 rows cannot be used:\n  line \d and 1 more: a "):
        run(make_config(tmp_path, data=data))


def test_nothing_to_learn_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("model: {name: scratch}")
    assert cli.main(["sft", str(tmp_path / "c.yaml"), f"run.dir={tmp_path}"]) == 2
    assert "sft.data: there is nothing to learn from" in capsys.readouterr().err
    paper = Path(__file__).parents[2] / "configs" / "qwen2.5_7b_paper.yaml"
    assert load_config(paper).sft.steps(3000) == 470
    assert not load_config(paper, ["sft.data=null"]).sft.wanted
    with pytest.raises(ConfigError, match="exclude each other"):
        parse_config({"sft": {"data": "a", "held_out_fraction": 0.1, "held_out_path": "b"}})


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "sft.md").read_text()
    blocks = {name: re.search(rf"```{name}\n(.*?)```", text, re.S) for name in ("python", "yaml")}
    program, config = (block and block[1] for block in blocks.values())
    assert program and config and len(program.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    data = yaml.safe_load(config)
    tiny = make_config(tmp_path / "tiny").model.model_dump() | {"scratch": {"layers": 1}}
    changes = {"model": tiny, "rollout": {"max_tokens": 1024}}
    _, said = run(parse_config(data | changes))
    assert "chats.json: 19 conversations, " in said and "20/20  left 0:00:00  loss" in said


def test_help_shows_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sft", "--help"])
    shown = capsys.readouterr().out
    assert "sft: {data: conversations.jsonl" in shown and "--resume" in shown


def test_an_update_that_is_not_finite_names_the_conversation(tmp_path: Path) -> None:
    config = make_config(tmp_path, sft=make_sft(tmp_path, {"lr": 1e30, "held_out_fraction": 0}))
    with pytest.raises(NonFiniteError, match=r"Tasks: .*chats.jsonl line \d"):
        run(config)
