"""Operators that take records: their schema has the fields of each, one after the other.

A custom operator is given tensors and numbers one by one, and nothing else. Written down once, as
the fields of a `NamedTuple`, they are taken apart where an operator is called, `*record`, and put
together again where it begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_type_hints

from torch import Tensor, library

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
}

Part = str | Callable[..., Any]
"""Of an operator's arguments: a record's class, or schema text such as `Tensor x, int n`."""


def taking(*parts: Part) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a function of records and other arguments, as `parts` say, one of all fields; what follows
    the last record need not be named."""
    sizes = [(part, len(_fields(part))) for part in parts]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*fields: Any) -> Any:
            whole: list[Any] = []
            at = 0
            for part, size in sizes:
                some = fields[at : at + size]
                whole += some if isinstance(part, str) else [part(*some)]
                at += size
            return function(*whole, *fields[at:])

        return run

    return decorate


def operator(
    name: str, *parts: Part, returns: str, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """`elpo_kernels::name`, from a function that takes `parts`."""
    schema = f"({', '.join(field for part in parts for field in _fields(part))}) -> {returns}"

    def decorate(function: Callable[..., Any]) -> Any:
        return library.custom_op(
            f"elpo_kernels::{name}", taking(*parts)(function), mutates_args=mutates, schema=schema
        )

    return decorate


def _fields(part: Part) -> list[str]:
    if isinstance(part, str):
        return part.split(", ")
    return [f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(part).items()]
