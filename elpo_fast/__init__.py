"""ELPO: error-localized policy optimization of tool-using language models on rollout trees.

What stands in `__all__` is the library's public face (docs/own.md); it is imported when it is used.
"""

import logging
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# transformers imports torchao wherever it is installed, and that warns of GPU libraries and of
# deprecations that are not its user's concern.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_PUBLIC = {
    "types": "End MalformedCall Task TaskSource Tool ToolCall ToolResult Verdict",
    "config": "Config ConfigError Section load_config parse_config",
    "model.load": "load_model",
    "train.parts": "Parts assembled",
    "algo": "make_planner score",
    "algo.planners": "Critical Planner Request Trajectory",
    "rollout.formats": "CallFormat",
    "rollout.imported": "read_trees",
    "tree.store": "Forest Tree",
    "tree.pack": "micro_batches",
    "model.lora": "named_weights",
    "eval.run": "evaluate",
}
_MODULE = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
