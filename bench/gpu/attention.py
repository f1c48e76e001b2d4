"""Tree attention alone, forward and backward, beside FlexAttention and flash attention over paths;
and ours under other tiles."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from elpo_kernels import tree_attention
from elpo_kernels.attention import tiles as shipped_tiles
from elpo_kernels.attention.flex import flex_attention

import elpo_fast.model.attention  # noqa: F401, registers `path`
from bench.gpu.part import Part, judged, medians
from bench.gpu.shapes import HEADS, Heads, operands, packed_mask


def run(part: Part) -> None:
    shapes = [(2, 1, 16)] if part.tiny else [HEADS["0.5b"], HEADS["7b"]]
    for tokens in (48,) if part.tiny else (32768, 8192):
        for heads in shapes:
            what = f"heads={heads} N={tokens}"
            part.attempt(what, partial(beside_others, part, what, heads, tokens))
    if not part.ahead:  # compiled as they come: a second each
        for heads in shapes:
            part.attempt(f"tiles {heads}", partial(tiles, part, heads))


def _flex_static(*inputs: Any) -> torch.Tensor:
    return flex_attention(*inputs, inputs[0].shape[-1] ** -0.5, dynamic=False)


def beside_others(part: Part, what: str, heads: Heads, tokens: int) -> None:
    mask, pairs = packed_mask(part, tokens)
    *inputs, above = operands(part, tokens, heads)
    names = ["triton", "path"] if part.tiny else ["triton", "varlen", "flex"]
    attend: dict[str, Any] = {name: partial(tree_attention, backend=name) for name in names}
    if "flex" in attend:  # compiled for this very number of tokens
        attend["flex-static"] = _flex_static

    def forward(name: str) -> torch.Tensor:
        return attend[name](*inputs, mask)

    def both(name: str) -> None:
        torch.autograd.grad(forward(name), inputs, above)

    for direction, do, products in (("forward", forward, 2), ("both", both, 7)):
        calls = {name: partial(do, name) for name in attend}
        rounds = part.interleaved(f"{what} {direction}", calls, queued=True)
        times = medians(rounds)
        rate = {n: 2 * products * pairs * heads[0] * heads[2] / ms / 1e9 for n, ms in times.items()}
        line = f"{what} {direction:8}" + "".join(
            f"  {n} {ms:.3f} ms ({rate[n]:.0f} TFLOP/s)" for n, ms in times.items()
        )
        flex = [ms for name, ms in times.items() if name.startswith("flex")]
        if flex:
            line += f"  Flex takes {judged(min(flex) / times['triton'], 1.0, least=True)} of ours"
        part.row(line, heads=heads, tokens=tokens, direction=direction, ms=times, rounds_ms=rounds)


def tiles(part: Part, heads: Heads) -> None:
    """Forward and backward with another tile for one kernel at a time."""
    mask, _ = packed_mask(part, 48 if part.tiny else 16384)
    *inputs, above = operands(part, len(mask.end), heads)

    def both() -> None:
        out = tree_attention(*inputs, mask, backend="triton")
        torch.autograd.grad(out, inputs, above)

    device = torch.device(part.device)
    shipped = shipped_tiles.tiles(device, part.dtype, heads[2])

    def with_tile(kernel: str, tile: shipped_tiles.Tile) -> None:
        with shipped_tiles.trial(device, part.dtype, heads[2], kernel, tile):
            both()

    both()
    calls: dict[str, Any] = {"as shipped": both}
    found = shipped_tiles.candidates(device, heads[2])
    for kernel, tile in found[:2] if part.tiny else found:
        if tile == getattr(shipped, kernel):
            continue
        name = f"{kernel} {tile.rows}x{tile.columns}, {tile.warps} warps, {tile.stages} stages"
        try:
            with_tile(kernel, tile)
        except triton.OutOfResources as fault:
            part.row(f"tiles {heads}: {name} does not fit ({fault})", heads=heads)
            continue
        calls[name] = partial(with_tile, kernel, tile)
    times = medians(part.interleaved(f"tiles {heads}", calls, warmup=1, rounds=5, queued=True))
    for name, ms in sorted(times.items(), key=lambda item: item[1]):
        ratio = ms / times["as shipped"]
        line = f"tiles {heads}: {ms:.3f} ms, {ratio:.3f} of as shipped: {name}"
        part.row(line, heads=heads, ms=ms)
