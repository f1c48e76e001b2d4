"""What a server can import and its children can read. There are two views.

Graders see what is installed, this project and the folders they are said to be in. Programs that a
model wrote see the standard library, system libraries, the scientific packages with what these
require, and of this project the sandbox's own code: no task, no generator of tasks, no grader, no
other package or data. So a program that looks for its task's answer finds nothing to look in.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from elpo_fast.config import ConfigError

PACKAGES = (
    *("numpy", "scipy", "sympy", "networkx", "pandas", "matplotlib", "scikit-learn"),
    *("statsmodels", "numba", "torch"),
)
"""Distributions that programs are offered where they are installed."""

# Of an environment: the interpreter that it was made with, which finds its library by itself.
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
BOOT = str(Path(__file__).with_name("_boot.py"))

_RUNTIME = {
    "tools": ("_server", "_nursery", "_child", "_cell", "_confine", "_look", "_records", "_warm"),
    "tasks": ("code_verifier",),
}
"""What servers of model-written code have of this project."""
_LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64")
_ROOT_LIBRARIES = ("/lib", "/lib32", "/lib64")
_SYSTEM = (
    *("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"),
    "/nix/store",
)

Place = tuple[str | None, tuple[str, ...] | None]
"""File of a module or package (`None`: it has none) and a package's folders of submodules."""


@dataclass(frozen=True, slots=True)
class View:
    path: tuple[str, ...]  # `sys.path`
    readable: tuple[str, ...]  # files and folders
    hidden: tuple[str, ...] = ()  # folders below these that cannot be read, but for `readable` ones
    modules: Mapping[str, Place] = field(default_factory=dict)  # found without `path`
    metadata: Mapping[str, str] = field(default_factory=dict)  # folders of distributions, by name

    def imports(self, where: Callable[[str], str]) -> str:
        """For `_boot`, with every path as `where` says it is seen there."""
        modules = {
            name: (file and where(file), None if folders is None else list(map(where, folders)))
            for name, (file, folders) in self.modules.items()
        }
        metadata = {name: where(folder) for name, folder in self.metadata.items()}
        path = list(map(where, self.path))
        return json.dumps({"path": path, "modules": modules, "metadata": metadata})

    def allowed(self) -> tuple[str, ...]:
        """What may be read, said without exceptions: `hidden` folders are left out by naming their
        neighbours."""
        return tuple(dict.fromkeys(p for place in self.readable for p in _without(place, self)))

    def listed(self) -> tuple[str, ...]:
        """Folders on `path` that `allowed` takes apart: to import from them, names must be seen."""
        return tuple(folder for folder in self.path if _within(self.hidden, folder))


def graders(extra: Sequence[str]) -> View:
    """Interpreter, installed packages, this package, system libraries, and `extra`; nothing of the
    working directory or of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    prefixes = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    prefixes |= {sys.prefix, sys.base_prefix}
    path = []
    for entry in filter(os.path.isdir, sys.path):
        installed = _is_installed(entry)
        if installed or any(Path(entry).is_relative_to(prefix) for prefix in prefixes):
            path.append(entry)
            prefixes |= {entry, os.path.realpath(entry)} if installed else set()
    path += [*extra, str(package.parent)]
    wanted = ["/usr", *_ROOT_LIBRARIES, *_SYSTEM, *sorted(prefixes), str(package), *extra]
    return View(tuple(path), _existing(wanted))


@cache
def programs(packages: tuple[str, ...] | None) -> View:
    """The standard library and these distributions (`None`: those of `PACKAGES` that are there)
    with what they require. `ConfigError` for one that is not installed."""
    standard = os.path.realpath(sysconfig.get_path("stdlib"))
    path = (standard, os.path.join(standard, "lib-dynload"))
    project = Path(__file__).parents[1]
    modules: dict[str, Place] = {"elpo_fast": (None, ())}
    metadata, places = {}, [BOOT]
    for room, names in _RUNTIME.items():
        modules[f"elpo_fast.{room}"] = None, ()
        for name in names:
            places.append(str(project / room / f"{name}.py"))
            modules[f"elpo_fast.{room}.{name}"] = places[-1], None
    for name, found in _with_required(packages).items():
        for entry, place in _entries(found).items():
            places.append(place)
            if entry.endswith((".dist-info", ".egg-info")):
                metadata[name] = place
            elif (module := _module(entry, place)) is not None:
                modules[module[0]] = module[1]
    base = os.path.realpath(os.path.join(sys.base_prefix, "lib"))
    libraries = _existing([*_LIBRARIES, *_ROOT_LIBRARIES, base, standard])
    # What is installed for this or another interpreter, and the folder that this project lies in.
    others = {*filter(_is_installed, sys.path), str(project.parent)}
    for library in libraries:
        others |= {str(p) for p in Path(library).glob("python3*/*-packages")}
        others |= {str(p) for p in Path(library).glob("*-packages")}
    hidden = set(map(os.path.realpath, others))
    covered = {
        folder for library in libraries for folder in _within(hidden, os.path.realpath(library))
    }
    readable = _existing([*libraries, *_SYSTEM, PYTHON, *places])
    return View(path, readable, tuple(sorted(covered)), modules, metadata)


def _is_installed(entry: str) -> bool:
    """Whether this folder of `sys.path` is one that packages are installed in."""
    return Path(entry).name in ("site-packages", "dist-packages")


def _existing(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(os.path.exists, paths)))


def _without(place: str, view: View) -> Iterator[str]:
    """`place`, or what is below it but not `hidden`."""
    place = os.path.realpath(place)
    if place in view.hidden:
        return
    if not _within(view.hidden, place):
        yield place
        return
    for entry in os.scandir(place):
        if not entry.is_symlink():  # what it points to is readable where it lies, or not at all
            yield from _without(entry.path, view)


def _within(folders: Iterable[str], place: str) -> list[str]:
    return [folder for folder in folders if Path(folder).is_relative_to(place)]


def _with_required(packages: Sequence[str] | None) -> dict[str, Distribution]:
    """These distributions and what they require, without extras, by their normalized names."""
    found: dict[str, Distribution] = {}
    waiting = [
        (name, packages is not None) for name in (PACKAGES if packages is None else packages)
    ]
    while waiting:
        name, must = waiting.pop()
        if canonicalize_name(name) in found:
            continue
        try:
            here = distribution(name)
        except PackageNotFoundError:
            if must:
                raise ConfigError(
                    f"tools.packages: {name!r} is not installed; install it or leave it out"
                ) from None
            continue
        found[canonicalize_name(name)] = here
        for requirement in map(Requirement, here.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append((requirement.name, False))
    return found


def _entries(found: Distribution) -> dict[str, str]:
    """Names and places of what a distribution has put beside others."""
    names = {file.parts[0] for file in found.files or ()} - {"..", "/", "__pycache__"}
    if not names:  # installed by a system's own package manager
        names = set((found.read_text("top_level.txt") or found.name).split())
        names |= {f"{name}.py" for name in names}
    places = {name: os.path.realpath(str(found.locate_file(name))) for name in sorted(names)}
    return {name: place for name, place in places.items() if os.path.exists(place)}


def _module(entry: str, place: str) -> tuple[str, Place] | None:
    """What is imported from this entry of a folder of packages, and how."""
    if os.path.isdir(place):
        file = os.path.join(place, "__init__.py")
        found = file if os.path.exists(file) else None
        return (entry, (found, (place,))) if entry.isidentifier() else None
    name = inspect.getmodulename(entry)
    return (name, (place, None)) if name else None
