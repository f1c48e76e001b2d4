"""One's own things in place of built-in ones, by name: see `docs/own.md`.

A name is `module:attribute`, importable as for `python -m` (from the working directory, too), or
that of an entry point in the group `elpo_fast.KIND` of an installed package. What it stands for is
called with what is offered there, by the names of its parameters; the parameters that are left are
its options. A class that names a pydantic model as `Options` gets one of these as `options`.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, isawaitable, signature
from operator import attrgetter
from types import ModuleType
from typing import Any

from pydantic import BaseModel, create_model

from elpo_fast.config import ConfigError, Section, parse_section


def target(kind: str, name: str) -> str:
    """The `module:attribute` that a name of this kind stands for; others are returned as they
    are."""
    points = () if ":" in name else entry_points(group=f"elpo_fast.{kind}", name=name)
    return next((point.value for point in points), name)


def load(path: str) -> Any:
    """What `module:attribute` stands for. Raises what its import does, or `AttributeError`."""
    module, _, attribute = path.partition(":")
    return attrgetter(attribute)(_imported(module))


def find(kind: str, name: str, key: str) -> Any:
    """What `name`, the value of configuration key `key`, stands for: something to call.

    Raises `ConfigError` for what cannot be imported, is not there or cannot be called.
    """
    path = target(kind, name)
    module, _, attribute = path.partition(":")
    if not (module and attribute):
        raise ConfigError(f"{key}: {path} is not of the form module:attribute")
    try:
        there = _imported(module)
    except Exception as error:  # whatever a module does when it is imported
        raise ConfigError(
            f"{key}: {path} cannot be imported ({_said(error)}); name it as module:attribute, in "
            f"a module that is installed or lies in the working directory, {os.getcwd()}"
        ) from error
    try:
        found = attrgetter(attribute)(there)
    except AttributeError:
        near = difflib.get_close_matches(attribute, vars(there), n=1)
        hint = f"did you mean {module}:{near[0]}?" if near else "name a function or class in it"
        raise ConfigError(f"{key}: {module} has no {attribute!r}; {hint}") from None
    if not callable(found):
        raise ConfigError(f"{key}: {path} is a {type(found).__name__}; name a function or class")
    return found


def bound(
    thing: Callable[..., Any], offers: tuple[str, ...], options: Mapping[str, Any], key: str
) -> Callable[..., Any]:
    """`thing` with its options, to be called with all of `offers` by name; it gets those that it
    has parameters for. Raises `ConfigError` for options that are not as it wants them, `key` being
    where they stand."""
    parameters = _parameters(thing)
    model = getattr(thing, "Options", None)
    if isinstance(model, type) and issubclass(model, BaseModel):
        given: dict[str, Any] = {"options": parse_section(model, dict(options), f"{key}.")}
    else:
        fields: dict[str, Any] = {
            name: (
                Any if parameter.annotation is Parameter.empty else parameter.annotation,
                ... if parameter.default is Parameter.empty else parameter.default,
            )
            for name, parameter in parameters.items()
            if name not in offers
        }
        made = create_model("Options", __base__=Section, __module__=thing.__module__, **fields)
        given = dict(parse_section(made, dict(options), f"{key}."))

    def call(**offered: Any) -> Any:
        taken = {name: value for name, value in offered.items() if name in parameters}
        return thing(**taken, **given)

    return call


def takes(thing: Callable[..., Any], name: str) -> bool:
    """Whether `thing` has a parameter of this name."""
    return name in _parameters(thing)


def complete(thing: Any, protocol: type, name: str) -> None:
    """`ConfigError` where `thing`, called `name`, lacks something that `protocol` has."""
    wanted = {**getattr(protocol, "__annotations__", {}), **vars(protocol)}
    lacks = [each for each in wanted if not each.startswith("_") and not hasattr(thing, each)]
    if lacks:
        raise ConfigError(
            f"{name} has no {', '.join(lacks)}; a {protocol.__name__} needs them "
            f"(subclass elpo_fast.{protocol.__name__})"
        )


async def awaited(found: Any) -> Any:
    """The value of what a function gave that may be a coroutine function or not."""
    return await found if isawaitable(found) else found


def _parameters(thing: Callable[..., Any]) -> dict[str, Parameter]:
    various = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {n: p for n, p in signature(thing).parameters.items() if p.kind not in various}


def _imported(module: str) -> ModuleType:
    here, package = os.getcwd(), __name__.partition(".")[0]
    found = sys.flags.safe_path or {"", here} & set(sys.path)
    if not found and module.partition(".")[0] != package:
        sys.path.insert(0, here)
    return import_module(module)


def _said(error: BaseException) -> str:
    """An exception on one line, with the place in the user's file."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    where = traceback.extract_tb(error.__traceback__)[-1]
    if where.filename == __file__ or "importlib" in where.filename:
        return text
    return f"{text}, {where.filename} line {where.lineno}"
