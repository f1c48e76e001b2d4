"""The first program of every server: decides what can be imported there, then becomes the server.

First argument, JSON: `path` becomes `sys.path`; `modules` names modules and packages that are found
without it, each with its file and, for packages, the folders of its submodules; `metadata` has the
`.dist-info` folders of distributions by their normalized names. Second argument: see `_server`.
"""

from __future__ import annotations

# ruff: noqa: E402
import os

# What these two do in every child takes longer than the fork itself. A session's random numbers
# have to go on anyway, and `_child` sees to the threads.
_register, os.register_at_fork = os.register_at_fork, lambda **_: None
import random  # noqa: F401
import threading  # noqa: F401

os.register_at_fork = _register

import json
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import DistributionFinder, PathDistribution
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

_ANY = DistributionFinder.Context()


class Allowed(DistributionFinder):
    """Finds the modules it is told of, by name; no folder that holds others is looked into."""

    def __init__(
        self, modules: dict[str, tuple[str | None, list[str] | None]], metadata: dict[str, str]
    ) -> None:
        self._modules, self._metadata = modules, metadata

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self._modules:
            return None
        file, folders = self._modules[name]
        if file is not None:
            return spec_from_file_location(name, file, submodule_search_locations=folders)
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = folders
        return spec

    def find_distributions(
        self, context: DistributionFinder.Context = _ANY
    ) -> Iterator[PathDistribution]:
        wanted = context.name and re.sub(r"[-_.]+", "-", context.name).lower()
        for name, folder in self._metadata.items():
            if wanted in (None, name):
                yield PathDistribution(Path(folder))


if __name__ == "__main__":
    imports = json.loads(sys.argv.pop(1))
    sys.path[:] = imports["path"]
    sys.meta_path.append(Allowed(imports["modules"], imports["metadata"]))
    from elpo_fast.tools._server import main

    main()
