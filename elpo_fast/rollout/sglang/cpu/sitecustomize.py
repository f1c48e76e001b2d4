"""Lets SGLang start on a machine without its GPU binaries; runs in SGLang's interpreter alone.

SGLang imports names of `sgl_kernel` and `torchvision` when it starts, but on a CPU calls none of
them for text models: it has PyTorch formulations of its own. With this folder on `PYTHONPATH` every
process of the server imports this file, and from then on each of these packages, where it is not
installed, is a placeholder: any name can be imported from it, and calling one raises.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

_BINARIES = ("sgl_kernel", "torchvision")


class _Placeholder:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{self._name} is not installed; this model or option needs a GPU build")


class _PlaceholderModule(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> _Placeholder:
        return getattr(_Placeholder(self.__name__), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in _BINARIES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())  # last: an installed package is found before
