"""What a tool call's arguments must be, and how the model is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from elpo_fast.tools._cell import shorten


def validator(schema: Mapping[str, Any]) -> Draft202012Validator:
    """Of the arguments of an OpenAI function schema."""
    return Draft202012Validator(schema["function"]["parameters"])


def refusal(valid: Draft202012Validator, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with arguments. Patterns in a schema may take for ever to tell."""
    try:
        fault = best_match(valid.iter_errors(arguments))
    except RecursionError:
        return "arguments: nested too deeply"
    if fault is None:
        return None
    place = "".join(f"[{key!r}]" for key in fault.absolute_path)
    return f"arguments{place}: {shorten(fault.message, 200)}"


def expected(problem: str, schema: Mapping[str, Any]) -> str:
    """The refusal of a call, with what was expected."""
    return f"{problem}; expected:\n{shown(schema)}"


def shown(schema: Mapping[str, Any]) -> str:
    """An OpenAI function schema for the model."""
    return json.dumps(schema["function"], ensure_ascii=False)
