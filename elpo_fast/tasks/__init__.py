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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elpo_fast.config import TaskConfig
    from elpo_fast.tasks.common import RunFunction
    from elpo_fast.types import TaskSource


def make_source(
    config: TaskConfig, seed: int, run_function: RunFunction, secret: str | None = None
) -> TaskSource:
    """The configured task source. `seed` decides the order (or draw) of the training tasks;
    `secret` draws generated tasks where `config.seed` does not, by default a fresh one.

    Raises `ConfigError` for options the source does not know or cannot use.
    """
    # Imported here: verifiers import this package inside the sandbox and need none of these.
    from elpo_fast.config import parse_section

    key = secret or secrets.token_hex() if config.seed is None else config.seed
    match config.source:
        case "ledger":
            from elpo_fast.tasks.ledger import Ledger, LedgerOptions

            ledger = parse_section(LedgerOptions, config.options, "task.options.")
            return Ledger(ledger, seed=seed, key=key, system=config.system)
        case "reasoning_gym":
            from elpo_fast.tasks.reasoning_gym import ReasoningGym, ReasoningGymOptions

            gym = parse_section(ReasoningGymOptions, config.options, "task.options.")
            return ReasoningGym(
                gym, seed=seed, key=key, run_function=run_function, system=config.system
            )
        case "file":
            from elpo_fast.tasks.file import FileOptions, FileSource

            file = parse_section(FileOptions, config.options, "task.options.")
            return FileSource(file, seed=seed, run_function=run_function, system=config.system)
