"""Tree attention: output and gradients against float64, judged by what dense SDPA makes of the
same inputs."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from elpo_kernels import tree_attention

import elpo_fast.model.attention  # noqa: F401, registers `path`
from bench.gpu.cases import error, true_attention
from bench.gpu.part import Part
from bench.gpu.shapes import HEADS, Heads, operands, random_mask

Forest = tuple[int, int, float]  # trees, tokens of each, how often they branch


def run(part: Part) -> None:
    cases: list[tuple[Heads, int | None]]
    cases = [(heads, None) for heads in [*HEADS.values(), (8, 8, 96)]]
    cases += [((8, 2, 128), 33), ((8, 2, 256), 100)]
    forests: list[Forest] = [(3, 211, 0.03), (1, 700, 0.0), (40, 9, 0.2)]
    backends = ["sdpa", "triton", "varlen", "flex"]
    if part.tiny:
        cases, forests = [((3, 1, 16), None), ((2, 2, 16), 5)], [(2, 40, 0.05)]
        backends = ["sdpa", "triton", "path"]
    # FlexAttention takes longest, to compile: it comes last.
    for names in (backends[:-1], [backends[0], backends[-1]]):
        for (heads, window), forest in itertools.product(cases, forests):
            what = f"heads={heads} window={window} forest={forest[0]}x{forest[1]}"
            part.attempt(what, partial(case, part, what, names, heads, window, forest))


def case(
    part: Part, what: str, names: list[str], heads: Heads, window: int | None, forest: Forest
) -> None:
    """A row for each attention. Without `sdpa`'s errors there is nothing to judge others by."""
    trees, tokens, branching = forest
    mask = random_mask(part, trees, tokens, branching)
    *inputs, above = operands(part, trees * tokens, heads)
    scale = heads[2] ** -0.5
    true = true_attention(*inputs, above, mask, window=window, scale=scale)

    def errors(backend: str) -> list[float]:
        out = tree_attention(*inputs, mask, scale=scale, window=window, backend=backend)
        found = [out, *torch.autograd.grad(out, inputs, above)]
        return [error(f.detach(), t) for f, t in zip(found, true, strict=True)]

    reference = errors(names[0])
    allowed = [1.5 * e + (1e-5 if part.tiny else 2**-9) for e in reference]
    for backend in names[1:]:
        found = part.attempt(f"{backend} {what}", partial(errors, backend))
        if found is not None:
            line = f"{backend} {what}: " + " ".join(f"{e:.1e}" for e in found)
            part.row(line, errors=found, allowed=allowed)
            if not all(e <= a for e, a in zip(found, allowed, strict=True)):
                part.fault(f"too large: {line}")
