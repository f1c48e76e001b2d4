"""Rows of data sets as people have them: `.jsonl`, `.json` and `.csv` (also with `.gz`) and
`.parquet` files, folders of these, and data sets of the Hugging Face Hub by `hf:org/name`, or
`hf:org/name:configuration`, through the `datasets` library with its cache; or what a function of
one's own gives, by `module:function`.

Faults are collected, not raised one by one: who mends a file wants to see them together.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from elpo_fast import own
from elpo_fast.config import ConfigError
from elpo_fast.tasks.common import shown

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
HUB = "hf:"
_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")  # module:function
SHOWN = 10  # faults in a message
Record = Mapping[str, Any]


class Faults:
    """What is wrong with the rows of one data set."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._places: dict[str, list[str]] = {}  # of each fault

    def add(self, place: str, fault: str) -> None:
        self._places.setdefault(fault, []).append(place)

    def __len__(self) -> int:
        """Number of rows with a fault."""
        return len({place for places in self._places.values() for place in places})

    def check(self, rows: int, expected: str) -> None:
        """`ConfigError` with all of them, if there are any; `rows`: how many were read."""
        if not self._places:
            return
        lines = [f"{self._name}: {len(self)} of {rows} rows cannot be used:"]
        for fault, places in list(self._places.items())[:SHOWN]:
            others = f" and {len(places) - 1} more" if len(places) > 1 else ""
            lines.append(f"  {places[0]}{others}{'' if fault[:6] == 'column' else ':'} {fault}")
        if len(self._places) > SHOWN:
            lines.append(f"  ... and {len(self._places) - SHOWN} other faults")
        raise ConfigError("\n".join([*lines, expected]))


def read(
    path: str,
    split: str | None,
    faults: Faults,
    arguments: Mapping[str, Any] | None = None,
    section: str = "task.options",
) -> Iterator[tuple[str, Record]]:
    """Rows, each with the words to name it by. `split`: of a folder (files or folders that are
    named after it), of a data set of the Hub, or a parameter of a function, beside `arguments`.
    `section`: of the configuration, where these stand. `ConfigError` for what cannot be read."""
    here = Path(path)
    if path.startswith(HUB):
        yield from _hub(path, split, section)
        return
    if _FUNCTION.fullmatch(path) and not here.exists():
        given = dict(arguments or {}) | ({} if split is None else {"split": split})
        yield from _checked(_function(path, given, section), "", faults)
        return
    if here.is_dir():
        files = _files(here, split)
    elif split is not None:
        raise ConfigError(
            f"{path} is one file; {section}.split={split} is for folders and {HUB}org/name"
        )
    else:
        files = [here]
    for file in files:
        name = f"{file.relative_to(here)} " if file != here else ""
        yield from _checked(_file(file), name, faults)


def _checked(
    rows: Iterable[tuple[str, Any]], name: str, faults: Faults
) -> Iterator[tuple[str, Record]]:
    for place, record in rows:
        if isinstance(record, Mapping):
            yield f"{name}{place}", record
        elif isinstance(record, ValueError):
            faults.add(f"{name}{place}", f"is not JSON: {record}")
        else:
            faults.add(f"{name}{place}", f"must be an object, not {kind(record)}")


def _function(path: str, arguments: Mapping[str, Any], section: str) -> Iterator[tuple[str, Any]]:
    function = own.find("rows", path, f"{section}.path")
    rows = own.bound(function, (), arguments, f"{section}.arguments")()
    if not isinstance(rows, Iterable) or isinstance(rows, (str, Mapping)):
        raise ConfigError(f"{path} must give rows, one mapping each, not {kind(rows)}")
    yield from ((f"row {number}", record) for number, record in enumerate(rows))


def _files(folder: Path, split: str | None) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.name.endswith(SUFFIXES))
    if not found:
        raise ConfigError(f"{folder} has no data files; use {', '.join(SUFFIXES)}")
    wanted = [file for file in found if split is None or _of_split(file.relative_to(folder), split)]
    if not wanted:
        names = shown(", ".join(str(file.relative_to(folder)) for file in found), 200)
        raise ConfigError(f"{folder} has no files of split {split}; it has {names}")
    return wanted


def _of_split(file: Path, split: str) -> bool:
    """`test.jsonl`, `test-00000-of-00002.parquet`, `test/a.jsonl`."""
    stem = file.name.partition(".")[0]
    return split in file.parts or stem == split or stem.startswith((f"{split}-", f"{split}_"))


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows as they stand; a `ValueError` in place of one that is not JSON."""
    if not path.is_file():
        raise ConfigError(f"data file {path} does not exist")
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"data file {path} ends in {path.suffix!r}; use {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            records = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"{path} is not readable Parquet: {shown(str(error))}") from None
        yield from ((f"row {number}", record) for number, record in enumerate(records))
        return
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "csv":
            rows = csv.DictReader(io.StringIO(text, newline=""))
            yield from ((f"row {number}", record) for number, record in enumerate(rows))
        case "json":
            yield from _json(text)
        case _:
            yield from _json_lines(text)


def _json(text: str) -> Iterator[tuple[str, Any]]:
    """One list of rows; or lines, which many files of this name hold."""
    try:
        whole = json.loads(text)
    except ValueError:
        yield from _json_lines(text)
        return
    rows = whole if isinstance(whole, list) else [whole]
    yield from ((f"row {number}", record) for number, record in enumerate(rows))


def _json_lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                yield f"line {number}", error


def _hub(path: str, split: str | None, section: str) -> Iterator[tuple[str, Record]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ConfigError(
            f"{path} needs the datasets library: pip install 'elpo-fast[datasets]'"
        ) from None
    name, _, configuration = path.removeprefix(HUB).partition(":")
    options: dict[str, Any] = {"split": split}
    if configuration.endswith(SUFFIXES):  # a file of a data set whose script is not run
        options = {"split": "train", "data_files": f"hf://datasets/{name}/{configuration}"}
        name, configuration = "json", ""
    try:
        data = datasets.load_dataset(name, configuration or None, **options)
    except Exception as error:  # of many kinds: no such name or split, no connection, no access
        raise ConfigError(f"{path} cannot be loaded: {shown(str(error), 300)}") from None
    if isinstance(data, dict):
        if len(data) > 1:
            names = ", ".join(data)
            raise ConfigError(f"{path} has the splits {names}; name one in {section}.split")
        (data,) = data.values()
    yield from ((f"row {number}", record) for number, record in enumerate(data))


_NAMES: dict[Any, str] = {str: "text", list: "list", dict: "object"}


def kind(value: Any) -> str:
    """A value's kind in the words of the file format."""
    if value is None:
        return "null"
    if isinstance(value, (str, list, dict)) and not value:
        return f"an empty {_NAMES[type(value)]}"
    return _NAMES.get(type(value), type(value).__name__)
