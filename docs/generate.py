"""Writes docs/configuration.md from the typed configuration, and docs/api.md from docstrings:
python docs/generate.py

What a key means is the comment beside it or above it in `elpo_fast/config/sections.py`.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import textwrap
import tokenize
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from elpo_fast import config

PAGE = Path(__file__).with_name("configuration.md")
REFERENCE = Path(__file__).with_name("api.md")
HEAD = """\
# Every key

A configuration is a YAML file with these sections. Each key has a default, and any may be set on
the command line as `section.key=value`; `elpo config FILE` prints what a file comes to. Unknown
keys and values out of range are refused before anything is loaded.

This page is made by `python docs/generate.py`.
"""

REFERENCE_HEAD = """\
# Reference

What `elpo_fast` and `elpo_kernels` offer to a program; everything else may change without notice.
How it goes together: [one's own things](own.md), and the `examples/` of the repository.

This page is made by `python docs/generate.py`.
"""
LIBRARIES = ("elpo_fast", "elpo_kernels")
WIDE = 96  # columns of a signature
SELF = ("self", "cls")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def comments(kind: type[BaseModel]) -> dict[str, str]:
    """The comment of each field of a section."""
    source = inspect.getsource(kind)
    found: dict[int, tuple[bool, str]] = {}  # by line: whether it stands alone
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = alone, token.string.removeprefix("#").strip()
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    said = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while found.get(first - 1, (False, ""))[0]:
                first -= 1
            lines = range(first, (node.end_lineno or node.lineno) + 1)
            said[node.target.id] = " ".join(found[line][1] for line in lines if line in found)
    return said


def values(annotation: Any, limits: list[Any]) -> str:
    """What a key may be, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(values(each, limits if each is not type(None) else []) for each in inner)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(each)}`".replace('"', "") for each in inner)
    if hasattr(annotation, "__metadata__"):
        return values(inner[0], [*limits, *annotation.__metadata__])
    if origin is list:
        return f"list of {values(inner[0], [])}"
    if origin is tuple:
        return "list of " + ", ".join(values(each, []) for each in inner)
    if origin is dict or annotation is dict:
        return "mapping"
    if annotation is type(None):
        return "`null`"
    name = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}[annotation]
    for limit in limits:
        for part in getattr(limit, "metadata", [limit]):
            match part:
                case AfterValidator(func=check):
                    known = inspect.getclosurevars(check).nonlocals["known"]
                    name = ", ".join(f"`{each}`" for each in (*known, "module:attribute"))
                case annotated_types.Ge(ge=bound):
                    name += f" ≥ {bound:g}"
                case annotated_types.Gt(gt=bound):
                    name += f" > {bound:g}"
                case annotated_types.Le(le=bound):
                    name += f" ≤ {bound:g}"
                case annotated_types.Lt(lt=bound):
                    name += f" < {bound:g}"
    return name


def rows(kind: type[BaseModel], prefix: str) -> list[str]:
    """A table's rows, of the sections below as well."""
    said, found = comments(kind), []
    for name, field in kind.model_fields.items():
        key, below = f"{prefix}{name}", section(field)
        if below is not None and isinstance(field.default, BaseModel):
            found += rows(below, f"{key}.")
            continue
        default = json.dumps(field.default, default=lambda value: value.model_dump())
        may = "a section" if below else values(field.annotation, field.metadata)
        text = said[name].replace("|", "\\|")
        found.append(f"| `{key}` | `{default}` | {may.replace('|', '/')} | {text} |")
        if below is not None:
            found += rows(below, f"{key}.")
    return found


def section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, or may be."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def page() -> str:
    parts = [HEAD]
    for name, field in config.Config.model_fields.items():
        kind = section(field)
        assert kind is not None
        said = inspect.getdoc(kind) if kind.__doc__ else None
        parts.append(f"## {name}\n" + (f"\n{said}\n" if said else ""))
        parts.append("| key | default | values | |\n|---|---|---|---|")
        parts.append("\n".join(rows(kind, f"{name}.")) + "\n")
    return "\n".join(parts)


def reference() -> str:
    """The page of the libraries' public names."""
    parts = [REFERENCE_HEAD]
    for library in map(import_module, LIBRARIES):
        parts.append(f"## {library.__name__}\n")
        for name in sorted(library.__all__, key=str.lower):
            parts += told(name, getattr(library, name))
    return "\n".join(parts)


def told(name: str, thing: Any) -> Iterator[str]:
    """A class, with what is public in it, or a function."""
    source = textwrap.dedent(inspect.getsource(thing))
    (node,) = ast.parse(source).body
    yield f"### {name}\n"
    if isinstance(node, Function):
        yield from function(node, name)
        return
    assert isinstance(node, ast.ClassDef)
    if said := ast.get_docstring(node):
        yield f"{said}\n"
    if fields := textwrap.dedent("\n".join(fields_of(node, source.splitlines()))):
        yield f"```python\n{fields}\n```\n"
    for each in node.body:
        if isinstance(each, Function):
            called = name if each.name == "__init__" else f"{name}.{each.name}"
            if not each.name.startswith("_") or called == name:
                yield from function(each, called)


def fields_of(node: ast.ClassDef, lines: list[str]) -> Iterator[str]:
    """Lines of a class that say what it holds, with their comments."""
    for each in node.body:
        named = isinstance(each, (ast.Assign, ast.AnnAssign))
        if named and not ast.unparse(each).startswith(("_", "model_config")):
            first = each.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            yield from lines[first : each.end_lineno]


def function(node: Function, name: str) -> Iterator[str]:
    """Its signature and what it says of itself."""
    kinds = {ast.unparse(each) for each in node.decorator_list}
    given = [part.replace(" ", "\0") for part in parameters(node.args)]
    signature = name
    if not kinds & {"property", "cached_property"}:
        signature += f"({', '.join(given)})"
    if node.returns is not None and node.name != "__init__":
        signature += f" -> {ast.unparse(node.returns)}".replace(" ", "\0")
    if isinstance(node, ast.AsyncFunctionDef):
        signature = ("async with " if "asynccontextmanager" in kinds else "await ") + signature
    wrapped = textwrap.wrap(signature, WIDE, subsequent_indent="    ", break_long_words=False)
    yield "```python\n" + "\n".join(wrapped).replace("\0", " ") + "\n```\n"
    if said := ast.get_docstring(node):
        yield f"{said}\n"


def parameters(given: ast.arguments) -> list[str]:
    """Each as it stands in a signature, without the one that a method is called on."""
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + [*given.defaults]
    pairs = zip(plain, defaults, strict=True)
    found = [parameter(*pair) for pair in pairs if pair[0].arg not in SELF]
    if given.vararg is not None or given.kwonlyargs:
        found.append("*" + (ast.unparse(given.vararg) if given.vararg is not None else ""))
    found += map(parameter, given.kwonlyargs, given.kw_defaults)
    return found + ([f"**{ast.unparse(given.kwarg)}"] if given.kwarg is not None else [])


def parameter(name: ast.arg, default: ast.expr | None) -> str:
    said = ast.unparse(name)
    return said if default is None else f"{said} = {ast.unparse(default)}"


if __name__ == "__main__":
    PAGE.write_text(page())
    REFERENCE.write_text(reference())
