"""Chat templates as model families ship them, as skeletons: what a trajectory assembles is what the
template renders, and where it cannot be, that is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from elpo_fast.config import ConfigError
from elpo_fast.model.tokenizer import CHATML, train_tokenizer
from elpo_fast.rollout.chat import Chat
from elpo_fast.rollout.template import description

from .test_chat import TOOL

FAMILIES = {
    kind["family"]: kind
    for kind in yaml.safe_load(
        (Path(__file__).parents[1] / "data" / "chat_templates.yaml").read_text(encoding="utf-8")
    )
}
THOUGHT = re.compile(r"(<think>.*?)?</think>", re.DOTALL)
RESPONSES = ("15", "two\n\n words, “quoted”")
SYSTEM, QUESTION = "Be brief.", "add 3 to 12"


def tokenizer_of(kind: dict[str, Any]) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer([f"{SYSTEM} {QUESTION} python_session code assistant user"] * 3)
    named = {f"{name}_token": kind[name] for name in ("bos", "eos") if name in kind}
    more = ["<|im_start|>", *kind.get("special", [])]
    tokenizer.add_special_tokens({**named, "additional_special_tokens": more})
    tokenizer.chat_template = kind["template"]
    return tokenizer


def chat_of(family: str, call_format: str) -> Chat:
    kind = FAMILIES[family]
    kwargs = kind.get("kwargs", {})
    return Chat(tokenizer_of(kind), call_format, [TOOL], (), kwargs)


def called(chat: Chat, thinking: bool) -> str:
    call = {"function": {"name": "python_session", "arguments": {"code": "x+=3;x"}}}
    text = chat.call_text({"role": "assistant", "content": "", "tool_calls": [call]})
    return f"<think>\nAdd.\n</think>\n\n{text}" if thinking else text


def given(system: str | None) -> list[dict[str, str]]:
    """What a task shows first."""
    told = [{"role": "system", "content": system}] if system else []
    return [*told, {"role": "user", "content": QUESTION}]


def assembled(chat: Chat, kind: dict[str, Any], system: str | None) -> list[int]:
    """A trajectory of two calls: the first one's end of turn is generated, the second stops."""
    text = kind.get("lead", "") + called(chat, "thinking" in kind)
    ids = chat.prompt(given(system)).tolist()
    for response, ended in zip(RESPONSES, (True, False), strict=True):
        generated = chat.encode(text)
        if ended:
            end = chat.decode([chat.end_of_turn])
            generated = chat.encode(text + kind.get("tail", "") + end)
        ids += [*generated.tolist(), *chat.response_glue(generated, response).tolist()]
    return ids


def rendered(
    chat: Chat, kind: dict[str, Any], system: str | None, call_format: str, *, whole: bool
) -> list[int]:
    """The same by `apply_chat_template`, or what is shown first."""
    own = call_format in kind.get("own", ())
    tools = [TOOL] if call_format == "hermes" else None
    messages = given(system)
    if whole:
        for response in RESPONSES:
            messages.append({"role": "assistant", "content": called(chat, "thinking" in kind)})
            if own:
                extra = {"tool_call_id": "call00001", "name": "python_session"}
                messages.append({"role": "tool", "content": response, **extra})
            else:
                wrapped = f"<tool_response>\n{response}\n</tool_response>"
                messages.append({"role": "user", "content": wrapped})
    if tools and not own:
        told = [messages.pop(0)["content"]] if system else []
        content = "\n\n".join([*told, description(tools, chat.call_text)])
        messages.insert(0, {"role": "system", "content": content})
    if kind.get("system") == "first" and messages[0]["role"] == "system":
        told_first = messages.pop(0)["content"]
        messages[0] = {"role": "user", "content": f"{told_first}\n\n{messages[0]['content']}"}
    text = chat.tokenizer.apply_chat_template(
        messages,
        tools=tools if own else None,
        tokenize=False,
        add_generation_prompt=True,
        **kind.get("kwargs", {}),
    )
    return chat.encode(text + kind.get("opening", "")).tolist()


@pytest.mark.parametrize("system", [None, SYSTEM], ids=["no system", "system"])
@pytest.mark.parametrize("call_format", ["hermes", "code"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trajectory_of_two_calls_equals_the_template(
    family: str, call_format: str, system: str | None
) -> None:
    kind, chat = FAMILIES[family], chat_of(family, call_format)
    assert chat.template.own_way == (call_format in kind.get("own", ()))
    first = rendered(chat, kind, system, call_format, whole=False)
    assert chat.prompt(given(system)).tolist() == first
    assert ("python_session" in chat.decode(first)) == (call_format == "hermes")
    actual = assembled(chat, kind, system)
    expected = rendered(chat, kind, system, call_format, whole=True)
    said = " ".join(chat.template.notes)
    if kind.get("thinking") == "lost":
        assert "the thinking of earlier messages" in said and "model.chat_template" in said
        without = [THOUGHT.sub("", chat.decode(ids)).split() for ids in (actual, expected)]
        assert "".join(without[0]) == "".join(without[1])
    else:
        assert actual == expected
        assert "leaves out" not in said


def test_a_template_without_tool_role_is_kept_and_the_tokenizer_untouched() -> None:
    chat = chat_of("one's own", "hermes")
    assert chat.tokenizer.chat_template == FAMILIES["one's own"]["template"]
    text = chat.shown(given(None))
    assert "MYFORMAT system: You can call tools." in text and "MYFORMAT user: " in text
    assert "<tool_response> tags" in text and "begin with 'MYFORMAT assistant: '" in text


def test_responses_in_a_row_share_a_user_message() -> None:
    chat = chat_of("gemma 2", "hermes")
    call = {"function": {"name": "python_session", "arguments": '{"code": "1"}'}}
    text = chat.template.render(
        [
            *given(SYSTEM),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ]
    )
    both = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert f"<start_of_turn>user\n{both}<end_of_turn>" in text
    assert '<tool_call>{"name": "python_session", "arguments": {"code": "1"}}</tool_call>' in text


@pytest.mark.parametrize("family", ["llama 3.1", "gemma 3", "phi 4 mini", "qwen2.5"])
def test_a_response_is_escaped_and_trimmed_as_the_template_does(family: str) -> None:
    kind, chat = FAMILIES[family], chat_of(family, "code")
    own = chat.template.own_way
    for response in ('say "hi"\n', " \n7", "", "é☃"):
        role = "tool" if own else "user"
        content = response if own else f"<tool_response>\n{response}\n</tool_response>"
        messages = [
            *given(None),
            {"role": "assistant", "content": "<code>1</code>"},
            {"role": role, "content": content},
        ]
        expected = chat.tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
            **kind.get("kwargs", {}),
        )
        generated = chat.encode("<code>1</code>")
        glue = chat.response_glue(generated, response)
        assert [*chat.prompt(given(None)), *generated, *glue] == list(expected)


def test_a_template_that_changes_earlier_messages_says_so() -> None:
    tokenizer = train_tokenizer(["x"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.revindex }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant 0\n"
    )
    notes = Chat(tokenizer, "code", [TOOL]).template.notes
    assert any("changes earlier messages" in note for note in notes)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.content", "refuses messages of user"),
        ("{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}-", "one only"),
        ("<|im_start|>{{ messages[0].content }}<|im_end|>", "loses an assistant's message"),
        (
            "{% for m in messages[:2] %}{{ m.content }}<|im_end|>{% endfor %}",
            "loses a tool's response",
        ),
        ("{% for m in messages %}{{ m.content }}<end>{% endfor %}", "with a special token"),
    ],
    ids=["none", "syntax", "one message", "answers lost", "responses lost", "no end of turn"],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_key(
    template: str | None, said: str
) -> None:
    tokenizer = train_tokenizer(["x"])
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=said) as refused:
        Chat(tokenizer, "code", [TOOL])
    assert "model.chat_template" in str(refused.value) and "\n" not in str(refused.value)


def test_a_prompt_that_the_template_refuses_is_one_sentence() -> None:
    chat = chat_of("gemma 2", "code")
    with pytest.raises(ConfigError, match=r"user, user: roles must alternate"):
        chat.prompt([*given(None), *given(None)])


def test_chatml_has_a_tool_role_and_refuses_others() -> None:
    tokenizer = train_tokenizer(["x"])
    assert tokenizer.chat_template == CHATML
    chat = Chat(tokenizer, "hermes", [TOOL])
    assert chat.template.own_way and "<|im_start|>tool\n" in chat.template.before
    with pytest.raises(ConfigError, match="there is no role judge"):
        chat.prompt([{"role": "judge", "content": "x"}])
