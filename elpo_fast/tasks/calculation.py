"""Answers that a verifier evaluates may calculate and do nothing else.

Several verifiers hand the answer to Python's `eval` or to sympy's parser, which does the same. The
sandbox keeps such an answer from everything outside; this keeps it from its own verdict, which it
could otherwise forge: it shares a process with the verifier. What is evaluated must be made of
numbers, operators, lists, comparisons, words, sympy's own objects and a few functions; there is no
way from these to any other object, so no attribute, subscript or foreign name passes. Answers that
are not evaluated are not looked at.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from typing import Any

import sympy
from sympy.parsing import sympy_parser

_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop),
    *(ast.Call, ast.keyword),
)
_FUNCTIONS = (abs, round, pow, min, max, sympy.sqrt, sympy.cbrt, sympy.root, sympy.real_root)
_WORD = re.compile(r"[\w.+-]*")  # sympy evaluates strings in its turn, and prints names into code


def check(source: str, names: Mapping[str, Any]) -> None:
    """`ValueError` unless evaluating `source` with `names`, and no others, is a calculation."""
    for node in ast.walk(ast.parse(source.strip(), mode="eval")):
        match node:
            case ast.Name(id=name):
                allowed = name in names and _is_mathematical(names[name])
            case ast.Call(func=function):
                allowed = isinstance(function, ast.Name)
            case ast.keyword(arg=name, value=value):
                allowed = name is not None and isinstance(value, ast.Constant)
            case ast.Constant(value=str() as text):
                allowed = _WORD.fullmatch(text) is not None
            case _:
                allowed = isinstance(node, _NODES)
        if not allowed:
            raise ValueError("the answer is not a plain calculation")


def only_calculate() -> None:
    """From now on, for this process: sympy's parser and reasoning-gym evaluate calculations alone.
    Meant for the sandbox, where a process grades one answer and ends."""
    sympy_parser.stringify_expr = _stringify
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym."):
            vars(module)["eval"] = _evaluate


def _is_mathematical(value: Any) -> bool:
    if isinstance(value, type):
        return issubclass(value, sympy.Basic)
    return isinstance(value, sympy.Basic) or any(value is function for function in _FUNCTIONS)


_stringify_unchecked = sympy_parser.stringify_expr


def _stringify(text: str, local_dict: dict, global_dict: dict, transformations: tuple) -> str:
    """The code that sympy's parser makes of `text` and is about to evaluate."""
    code = _stringify_unchecked(text, local_dict, global_dict, transformations)
    check(code, {**global_dict, **local_dict})
    return code


def _evaluate(source: str) -> Any:
    check(source, {})
    return eval(source, {"__builtins__": {}})
