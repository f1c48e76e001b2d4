"""Pages of one file: they open from disk, load nothing and run no code but their own."""

from __future__ import annotations

import base64
import gzip
import html
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from elpo_fast.tree.io import TEMPORARY

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def asset(name: str) -> str:
    """The text of a file that comes with the package."""
    return (resources.files("elpo_fast.report") / "viewer" / name).read_text(encoding="utf-8")


def page(title: str, style: str, body: str) -> str:
    """A whole HTML page; `style` is CSS and `body` HTML."""
    return _PAGE.format(title=html.escape(title), style=style, body=body)


def data(name: str, text: str) -> str:
    """An element that a script reads `text`, JSON or base 64, from."""
    safe = text.replace("<", "\\u003c")  # the same to JSON
    return f'<script type="text/plain" id="{name}">{safe}</script>'


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def packed(text: str) -> str:
    """Compressed, as letters and digits of base 64."""
    raw = text.encode(errors="replace")  # lone surrogates
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode()


def write(path: Path, text: str) -> None:
    """Write a page, so that there is never half of one; `LookupError` where that cannot be."""
    write_bytes(path, text.encode(errors="replace"))


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LookupError(f"cannot write {path}: {error.strerror}; name another by --out") from None
