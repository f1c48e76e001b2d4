"""One optimizer update from packed trees: every unique token forward and backward once.

The loss of an update is the sum over its micro-batches of

    - sum_t pos_t * min(r_t, clip r_t) + neg_t * max(r_t, clip r_t),   r_t = exp(logp_t - old_t),

where `clip` has each token's own bounds. The coefficients carry all weights (`tree.pack`), so this
is Eq. 1 over all trajectories with Eq. 12's bounds, whatever the split into micro-batches.

Invariants: master weights and their gradients have the model's own dtype (float32); a compute copy
in another dtype mirrors the masters after every update, and shares what is frozen; nothing that is
not finite ever reaches the optimizer: a step that would is refused with parameters, moments and
schedule untouched.

On several ranks all call with the same micro-batches and get the same figures; each computes its
share of them, and the parameters that FSDP gathers take the place of the compute copy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from elpo_kernels import LoRA, PolicyLossOutput, linear_logprob, linear_policy_loss
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from elpo_fast.config import TrainConfig
from elpo_fast.model.checkpointed import checkpoint_blocks
from elpo_fast.model.compiled import compile_blocks
from elpo_fast.model.forward import packed_hidden
from elpo_fast.model.lora import lora_of
from elpo_fast.regions import region
from elpo_fast.train import adamw
from elpo_fast.train.costs import Costs
from elpo_fast.train.metrics import Part, StepStats, combined
from elpo_fast.train.parallel import ALONE, Ranks, Sharded
from elpo_fast.train.staging import Staged, stage, to_device, to_host
from elpo_fast.tree.pack import LossRows, PackedBatch, section
from elpo_fast.types import RunError

Schedule = Callable[[int], float]
"""Number of updates made so far -> factor on the learning rate."""

WEIGHTS, MOMENTS = "weights.", "moments."
"""What the names of a `PolicyOptimizer.state_dict` begin with; a parameter's name follows."""

_T = TypeVar("_T")


class NonFiniteError(RunError):
    """Loss or gradient is NaN or infinite; `trees` are the forest's trees that make it so."""

    def __init__(self, what: str, trees: Sequence[int]) -> None:
        self.trees = tuple(trees)
        super().__init__(
            f"{what} is not finite on trees {list(self.trees)}; no parameter was changed. "
            "Look at these trees, then lower the learning rate or the clip bounds"
        )


def warmup_constant(warmup: int) -> Schedule:
    """Rise linearly over `warmup` updates, then stay."""
    return lambda update: min(1.0, (update + 1) / (warmup + 1))


def warmup_linear(warmup: int, total: int) -> Schedule:
    """Rise linearly over `warmup` updates, then fall to 0 at update `total` along a line."""
    rise = warmup_constant(warmup)
    left = max(1, total - warmup)
    return lambda update: min(rise(update), max(0.0, (total - update) / left))


def warmup_cosine(warmup: int, total: int) -> Schedule:
    """Rise linearly over `warmup` updates, then fall to 0 at update `total` along a cosine."""

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / (warmup + 1)
        progress = min(1.0, (update - warmup) / max(1, total - warmup))
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def schedule_of(train: TrainConfig) -> Schedule:
    """The configured one, over all updates of reinforcement learning."""
    total = train.steps * train.updates_per_step
    match train.schedule:
        case "linear":
            return warmup_linear(train.warmup, total)
        case "cosine":
            return warmup_cosine(train.warmup, total)
    return warmup_constant(train.warmup)


class _Head(NamedTuple):
    """The head as the kernels take it, in the hidden states' dtype."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None
    lora: LoRA | None

    def logprob(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        """Log-probs `[T]` of `targets` `[T]` from the hidden states `[T, H]` before them."""
        weight, bias, lora = self
        logprob = linear_logprob(
            hidden, weight, targets, bias=bias, lora=lora, temperature=temperature
        )
        assert isinstance(logprob, torch.Tensor)
        return logprob


class PolicyOptimizer:
    """Master weights, their AdamW and the compute copy that runs forward and backward.

    `compute` is the model to sample from in process: it always holds the current weights. With
    `dtype` equal to that of all that is trained, or on several ranks, it is the model itself.
    Parameters that do not require a gradient are left as they are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        grad_clip: float = 1.0,
        temperature: float = 1.0,
        ratio_cap: float = math.inf,
        dtype: torch.dtype = torch.float32,
        optimizer: adamw.Kind = "adamw",
        schedule: Schedule | None = None,
        gradient_checkpointing: Literal[False, True, "selective"] = False,
        compiled: bool = False,
        ranks: Ranks = ALONE,
        root: nn.Module | None = None,
    ) -> None:
        """`root`: the `Sharded` of a model that is spread over `ranks` already; `ratio_cap` bounds
        the ratio where the coefficient is negative (dual clip)."""
        self.model = model
        self.ranks = ranks
        self.lr = lr
        self.grad_clip = grad_clip
        self.temperature = temperature
        self.ratio_cap = ratio_cap
        self.dtype = dtype
        self.schedule = schedule or warmup_constant(0)
        self.updates = 0
        self._inside: Callable[[Callable[[], Any]], Any] = lambda call: call()
        if ranks.mesh is not None:
            self.compute = model
            self._inside = root or Sharded(model, ranks.mesh, dtype)
        else:
            exact = all(p.dtype == dtype for p in model.parameters() if p.requires_grad)
            self.compute = model if exact else _compute_copy(model, dtype)
        if gradient_checkpointing == "selective":
            checkpoint_blocks(self.compute)
        elif gradient_checkpointing:
            self.compute.gradient_checkpointing_enable({"use_reentrant": False})
            self.compute.train()  # transformers checkpoints in this mode only; dropout is 0
        if compiled:
            compile_blocks(self.compute)
        self.costs = Costs.of(model)
        self._masters: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        assert ranks.mesh is None or all(isinstance(p, DTensor) for p in self._masters)
        self._copies: list[torch.Tensor] = [p for p in self.compute.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._masters if p.ndim >= 2]},
            {"params": [p for p in self._masters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = adamw.make_adamw(
            optimizer, groups, lr=lr, betas=betas, weight_decay=weight_decay
        )

    def update(self, batches: Sequence[PackedBatch]) -> StepStats:
        """One clipped policy-gradient update; the gradient is the sum over all `batches`.

        Without a single non-zero coefficient nothing changes, moments and schedule included.
        Raises `NonFiniteError`.
        """
        return self._update(batches, self.policy_backward)

    def nll_update(self, batches: Sequence[PackedBatch]) -> StepStats:
        """One update of `-sum_t pos_coef_t * logp_t` at temperature 1, for demonstrations.

        Raises `NonFiniteError`.
        """
        return self._update(batches, self.nll_backward)

    def policy_backward(self, batch: PackedBatch) -> Part | None:
        """Add one micro-batch's gradient to the masters' `.grad`; `None`: it has no coefficient.
        The loss makes its own gradients in its forward; the backward scales these and goes on
        through the blocks. Nothing here waits for the device."""
        rows = batch.loss_rows
        entropy_coef: list[NDArray[Any]] = []
        if batch.entropy_coef is not None:  # of all that the agent wrote, each token by itself
            spoken = np.flatnonzero(batch.agent)
            rows = LossRows(spoken, batch.pos_coef[spoken], batch.neg_coef[spoken])
            entropy_coef = [batch.entropy_coef[spoken]]
        if not len(rows):
            return None
        old, low, high = (
            column[rows.index] for column in (batch.old_logprob, batch.eps_low, batch.eps_high)
        )
        work = {"tokens": len(batch.trie), "pairs": _pairs(batch)}
        with region("forward", **work):
            columns = (old, rows.pos, rows.neg, low, high, *entropy_coef)
            staged = stage(batch, rows.index, columns, self.model.device)

            def compute() -> PolicyLossOutput:
                hidden, head = self._predictors(staged)
                with region("loss", rows=3 * len(rows)):  # its gradients, too
                    return linear_policy_loss(
                        hidden,
                        head.weight,
                        staged.targets,
                        *staged.columns[:5],
                        entropy_coef=staged.columns[5] if entropy_coef else 0.0,
                        bias=head.bias,
                        lora=head.lora,
                        temperature=self.temperature,
                        ratio_cap=self.ratio_cap,
                    )

            out = self._inside(compute)
        with region("backward", **work):
            out.loss.backward()
        with region("loss"):
            gap = out.logprob - staged.columns[0]
            values = torch.hstack([out.loss.detach(), *out.stats, gap])
        return Part(len(batch.trie), len(rows), values)

    def nll_backward(self, batch: PackedBatch) -> Part | None:
        """As `policy_backward`, for `nll_update`."""
        rows = batch.loss_rows
        if not len(rows):
            return None
        work = {"tokens": len(batch.trie), "pairs": _pairs(batch)}
        with region("forward", **work):
            staged = stage(batch, rows.index, [rows.pos], self.model.device)
            logprob = self._inside(lambda: self._logprob(staged, 1.0))
            loss = -(staged.columns[0] * logprob).sum()
        with region("backward", rows=2 * len(rows), **work):
            loss.backward()
        return Part(len(batch.trie), len(rows), loss.detach()[None])

    @torch.no_grad()
    def logprobs(
        self, batches: Sequence[PackedBatch], temperature: float | None = None
    ) -> list[NDArray[np.floating]]:
        """Log-probs `[P]` of each batch, by default under the sampling temperature; 0 on tokens
        that are not the agent's. In float32, or in float64 for a model in that.

        With `batch.old_logprob` replaced by these, the first update's ratios are 1.
        """

        at = self.temperature if temperature is None else temperature

        def of(batch: PackedBatch) -> torch.Tensor:
            with region("forward", tokens=len(batch.trie), pairs=_pairs(batch)):
                _, first, _ = batch.spoken
                staged = stage(batch, first, [], self.model.device)
                return self._inside(lambda: self._logprob(staged, at))

        done = self._mine(batches, of)
        with region("loss"):
            read = to_host([*done.values()])
        found = self._everyones(dict(zip(done, read, strict=True)))
        results = []
        for batch, logprob in zip(batches, found, strict=True):
            tokens, _, place = batch.spoken
            results.append(np.zeros(len(batch), logprob.dtype))
            results[-1][tokens] = logprob[place]
        return results

    @torch.no_grad()
    def score(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probs `[N - 1]` at temperature 1 of all but the first of one row's tokens `[N]`."""
        (ids,) = to_device([torch.from_numpy(tokens)], self.model.device)

        def compute() -> torch.Tensor:
            place = torch.arange(len(ids), device=ids.device)
            hidden, head = self._hidden(ids, place, torch.full_like(ids, len(ids)))
            return head.logprob(hidden[:-1], ids[1:])

        return self._inside(compute).float().cpu().numpy()

    def restart(self, *, lr: float, schedule: Schedule) -> None:
        """Begin another phase: fresh moments, schedule from its start, weights as they are."""
        self.lr, self.schedule, self.updates = lr, schedule, 0
        self._optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Trained weights and their moments by name, sharded where the model is: the tensors
        themselves, but float32 copies of moments in 8 bits. With `updates` it is all that training
        changes."""
        state: dict[str, Any] = {}
        for name, master in self.trained():
            state[f"{WEIGHTS}{name}"] = master.detach()
            for moment, value in self._optimizer.state.get(master, {}).items():
                state[f"{MOMENTS}{name}.{moment}"] = adamw.exact(value)
        return state

    def make_moments(self, names: Iterable[str]) -> dict[str, Any]:
        """Room for the moments among these names of a `state_dict`; it and the weights are to be
        written into, and given to `load_state_dict`."""
        known = {name.rpartition(".")[0] for name in names}
        chosen = (master for name, master in self.trained() if f"{MOMENTS}{name}" in known)
        adamw.make_moments(self._optimizer, [*chosen])
        return self.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], updates: int) -> None:
        """Continue from what was written into the `state` of `make_moments`."""
        for name, master in self.trained():
            for moment, own in self._optimizer.state.get(master, {}).items():
                value = state[f"{MOMENTS}{name}.{moment}"]
                if own is not value:  # in 8 bits
                    own.copy_(value)
        self.updates = updates
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters into the compute weights, after anyone but `update` changed them."""
        if self.compute is not self.model:
            torch._foreach_copy_(self._copies, self._masters)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The master weights that updates change, by the model's names."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _update(
        self, batches: Sequence[PackedBatch], loss_of: Callable[[PackedBatch], Part | None]
    ) -> StepStats:
        try:
            parts, norm, length = self._gradient(batches, loss_of)
            if not parts:
                return StepStats(0.0, 0.0, 0.0, tokens=0, trained_tokens=0)
            if not all(math.isfinite(part.loss) for part in parts):
                raise NonFiniteError("the loss", self._culprits(batches, loss_of))
            if not math.isfinite(length):
                raise NonFiniteError("the gradient", self._culprits(batches, loss_of))
            with region("optimizer", passes=1):
                nn.utils.clip_grads_with_norm_(self._masters, self.grad_clip, norm)
                lr = self.lr * self.schedule(self.updates)
                adamw.step(self._optimizer, lr)
                self.refresh()
        finally:
            with region("optimizer"):
                self._optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return combined(parts, length, lr)

    def _gradient(
        self, batches: Sequence[PackedBatch], loss_of: Callable[[PackedBatch], Part | None]
    ) -> tuple[list[Part], torch.Tensor, float]:
        """Forward and backward of the batches that have a coefficient, on whichever rank: what
        they contributed, and the gradient's norm, on the device and read from it."""
        trained = [
            batch
            for batch in batches
            if batch.pos_coef.any() or batch.neg_coef.any() or batch.entropy_coef is not None
        ]
        done = self._mine(trained, loss_of)
        mine = {index: part for index, part in done.items() if part is not None}
        with region("optimizer"):
            norm = self._norm()
            *values, (length,) = to_host([*(part.values for part in mine.values()), norm[None]])
        read = zip(mine.items(), values, strict=True)
        parts = self._everyones({i: replace(part, values=array) for (i, part), array in read})
        return parts, norm, float(length)

    def _mine(
        self, batches: Sequence[PackedBatch], work: Callable[[PackedBatch], _T]
    ) -> dict[int, _T]:
        """`work` on this rank's share of the batches, by index."""
        with region("packing"):  # which tries and rows are put together when they are asked for
            mine, idle = self.ranks.share([self._cost(batch) for batch in batches])
        done = {index: work(batches[index]) for index in mine}
        for _ in range(idle):
            self._idle()
        return done

    def _everyones(self, done: dict[int, _T]) -> list[_T]:
        """All ranks' results on every rank, in the order of their index."""
        gathered = {i: result for part in self.ranks.gather(done) for i, result in part.items()}
        return [gathered[index] for index in sorted(gathered)]

    def _cost(self, batch: PackedBatch) -> float:
        """Estimated work, in computed rows: products with the blocks' weights, attention along the
        paths, and the head of every row of the loss."""
        trie = batch.trie
        costs, rows = self.costs, len(batch.loss_rows)
        flops = costs.forward(len(trie), _pairs(batch)) + costs.head(rows)
        return flops / costs.forward(1, 0)

    def _idle(self) -> None:
        """A pass that adds 0 to every gradient: the collective calls of one micro-batch."""
        # Two tokens, because one would be a shape of its own to compiled blocks.
        zeros = torch.zeros(2, dtype=torch.int32, device=self.model.device)

        def nothing() -> torch.Tensor:
            hidden, head = self._hidden(zeros, zeros, zeros + 2)
            parts = [hidden, head.weight, head.bias, *(head.lora or ())[:2]]
            return 0 * sum(part.sum() for part in parts if part is not None)

        loss = self._inside(nothing)
        if loss.requires_grad:
            loss.backward()

    def _norm(self) -> torch.Tensor:
        """Norm of the whole gradient, over all parameters and ranks."""
        norm = nn.utils.get_total_norm([p.grad for p in self._masters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _logprob(self, staged: Staged, temperature: float) -> torch.Tensor:
        hidden, head = self._predictors(staged)
        with region("loss", rows=len(staged.targets)):
            return head.logprob(hidden, staged.targets, temperature)

    def _predictors(self, staged: Staged) -> tuple[torch.Tensor, _Head]:
        """Hidden states `[T, H]` that predict the chosen tokens, and the head."""
        hidden, head = self._hidden(staged.token_ids, staged.position, staged.end, staged.host_end)
        # Siblings share their predecessor. The gradient of an index, `hidden[...]`, adds theirs in
        # the order in which threads come; an embedding's does not, and is faster.
        return F.embedding(staged.before, hidden), head

    def _hidden(
        self,
        token_ids: torch.Tensor,
        position: torch.Tensor,
        end: torch.Tensor,
        host_end: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, _Head]:
        """Hidden states `[N, H]` of packed trees, and the head in their dtype."""
        # A token's embedding gradient sums over all its occurrences: that needs the master.
        embed = self.model.get_input_embeddings()
        hidden = packed_hidden(
            self.compute,
            token_ids,
            position,
            end,
            embed=embed,
            dtype=self.dtype,
            host_end=host_end,
        )
        head, dtype = self.compute.get_output_embeddings(), hidden.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        lora = lora_of(head)
        if lora is not None:
            lora = LoRA(lora.a.to(dtype), lora.b.to(dtype), lora.scale)
        return hidden, _Head(head.weight.to(dtype), bias, lora)

    def _culprits(
        self, batches: Sequence[PackedBatch], loss_of: Callable[[PackedBatch], Part | None]
    ) -> list[int]:
        """Trees whose own loss or gradient is not finite; all of them if only the sum overflows."""
        found = []
        for batch in batches:
            for index, tree in enumerate(batch.trees):
                self._optimizer.zero_grad(set_to_none=True)
                start, stop = (int(at) for at in batch.tree_start[index : index + 2])
                alone = section(batch, index, np.ones(stop - start, np.bool_))
                parts, _, length = self._gradient([alone], loss_of)
                if not all(map(math.isfinite, (*(part.loss for part in parts), length))):
                    found.append(int(tree))
        return found or [int(tree) for batch in batches for tree in batch.trees]


def _pairs(batch: PackedBatch) -> float:
    """How often a computed token attends to one, itself included."""
    return float(np.sum(batch.trie.position + 1.0))


def _compute_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with trained parameters in `dtype`, whose gradients are added to the masters' at
    once; the others are the model's own.

    Buffers keep their type: rotary frequencies in bfloat16 would shift every position.
    """
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    copied = copy.deepcopy(model, frozen)
    for parameter, master in zip(copied.parameters(), model.parameters(), strict=True):
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            parameter.register_post_accumulate_grad_hook(_adder(master))
    return copied


def _adder(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.to(master.dtype)
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return add
