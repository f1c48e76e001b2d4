"""Task sources: where problems come from and how finished trajectories are judged.

Invariants of every source
- `train(i)` and `held_out(j)` never show the same problem: a problem's content, hashed, decides
  which of the two splits it belongs to. Different random seeds would not guarantee that.
- Generated tasks are drawn with a key: a secret of the run, or the number `task.seed`. The held-out
  ones depend on it and the options alone, not on the run's seed, so that runs with the same
  `task.seed` can be compared pairwise on the same tasks.
- Judging never executes model output in this process: verifiers run in the sandbox, in servers of
  their own; what the model's programs see there holds nothing of this package.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from elpo_fast.config import TaskConfig
    from elpo_fast.tasks.common import RunFunction
    from elpo_fast.tasks.reward import Apart
    from elpo_fast.types import TaskSource

_BUILT_IN = {
    "ledger": "elpo_fast.tasks.ledger:Ledger",
    "reasoning_gym": "elpo_fast.tasks.reasoning_gym:ReasoningGym",
    "file": "elpo_fast.tasks.file:FileSource",
    "verifiers": "elpo_fast.tasks.verifiers:Verifiers",
}
_OFFERED = ("seed", "key", "system", "run_function", "judged")


def make_source(
    config: TaskConfig,
    seed: int,
    run_function: RunFunction,
    secret: str | None = None,
    *,
    apart: Apart | None = None,
) -> TaskSource:
    """The configured task source. `seed` decides the order (or draw) of the training tasks;
    `secret` draws generated tasks where `config.seed` does not, by default a fresh one;
    `apart` runs a reward with a time limit, see `Toolbox.apart`.

    Raises `ConfigError` for a source that is not there, and for options that it does not know or
    cannot use.
    """
    # Imported here: verifiers import this package inside the sandbox and need none of these.
    from elpo_fast import own
    from elpo_fast.config import ConfigError
    from elpo_fast.tasks.reward import Rewarded
    from elpo_fast.types import TaskSource

    path, kind = _found(config)
    options = config.options
    if not isinstance(kind, type):  # a function that gives rows
        kind, options = own.load(_BUILT_IN["file"]), {"path": path, **options}
    if config.system is not None and not own.takes(kind, "system"):
        raise ConfigError(f"task.system: {path} has no parameter `system` to be told it; drop one")
    source = own.bound(kind, _OFFERED, options, "task.options")(
        seed=seed,
        key=secret or secrets.token_hex() if config.seed is None else config.seed,
        system=config.system,
        run_function=run_function,
        judged=config.reward is None,
    )
    own.complete(source, TaskSource, f"task.source: {path}")
    if config.reward is None:
        return source
    return cast("TaskSource", Rewarded(source, config, apart))


def tokenizer_texts(
    source: TaskSource, config: TaskConfig, seed: int, run_function: RunFunction
) -> Iterator[str]:
    """Texts of `source` to make a small tokenizer from, the same for the same configuration: those
    of generated tasks are not drawn with a run's secret."""
    from elpo_fast import own

    if config.seed is None and own.takes(_found(config)[1], "key"):
        public = config.model_copy(update={"seed": 0, "reward_timeout_s": None})
        source = make_source(public, seed, run_function)
    yield from source.vocabulary_texts()


def _found(config: TaskConfig) -> tuple[str, Any]:
    """The name of the configured source, and what it stands for."""
    from elpo_fast import own

    path = own.target("tasks", _BUILT_IN.get(config.source, config.source))
    return path, own.find("tasks", path, "task.source")
