"""Compile every kernel in every shipped configuration for GPUs that are not there.

`python kernels/tools/aot.py` prints registers, spills and shared memory, also of the tiles that
tree attention might have instead. It fails where a kernel asks for more shared memory than the chip
has or spills more than `MOST_SPILLED`. Few spills are no fault: compilers differ in the last
registers, and attention may gain more by a larger tile. That only a measurement tells.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
from elpo_kernels import policy_triton, rows_triton
from elpo_kernels.attention import kernels, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KIB = 1024
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
MOST_SPILLED = {"rows": 32, "attention": 512}  # bytes a thread
BY_NAME = {
    "index": "*i64",
    "target": "*i64",
    "position": "*i64",
    "source": "*i64",
    "column": "*i64",
    "flags": "*i8",
    **dict.fromkeys(("first", "columns", "stride", "out_stride", "count"), "i32"),
    **dict.fromkeys(("shard", "vocabulary", "width"), "i32"),
    **dict.fromkeys(("x_stride", "weight_stride", "width_stride"), "i32"),
    "ratio_cap": "fp32",
}
ATTENTION = {
    "scale": "fp32",
    **dict.fromkeys(("end", "position", "index", "counts", "order"), "*i32"),
    **dict.fromkeys(("lse", "delta", "key_sums", "value_sums"), "*fp32"),
    **dict.fromkeys(("size", "blocks", "window", "sums_stride", "out_stride"), "i32"),
    **dict.fromkeys(("query_stride", "key_stride", "value_stride"), "i32"),
    **dict.fromkeys(("query_head", "key_head", "value_head"), "i32"),
}
"""Arguments of the attention kernels that are no operands or results of products."""
ATTENTION_KERNELS = {
    "forward": kernels.forward_kernel,
    "query": kernels.query_gradient_kernel,
    "key": kernels.key_gradient_kernel,
}


@dataclass(frozen=True, slots=True)
class Shipped:
    """A kernel with its element types and compile-time constants."""

    kernel: Any
    types: dict[str, str]  # of the arguments that are not float32 pointers
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16, as the launcher finds them
    label: str = ""
    most_spilled: int = MOST_SPILLED["rows"]

    @property
    def name(self) -> str:
        if self.label:
            return self.label
        given = [f"{k}={v.removeprefix('*')}" for k, v in self.types.items()]
        on = [k.lower() for k, v in self.constants.items() if v and k not in ("BLOCK", "LIMIT")]
        return " ".join([self.kernel.fn.__name__.removesuffix("_kernel"), *given, *on])


@dataclass(frozen=True, slots=True)
class Usage:
    """What one configuration takes on one chip."""

    target: str
    name: str
    registers: int
    spilled: int  # bytes of local memory
    shared: int  # bytes
    most_spilled: int

    @property
    def fits(self) -> bool:
        return self.spilled <= self.most_spilled and self.shared <= TARGETS[self.target][1]


def shipped(target: str) -> Iterator[Shipped]:
    """Every configuration that the package launches on `target`."""
    yield from _shipped_rows()
    yield from _shipped_attention(target)


def _shipped_attention(target: str) -> Iterator[Shipped]:
    """Tree attention. Windows are for the head sizes of models that have them; float16 takes what
    bfloat16 takes."""
    problems = [("bf16", dim, False) for dim in (64, 96, 128, 256)]
    problems += [
        ("bf16", 128, True),
        ("bf16", 256, True),
        ("fp32", 64, False),
        ("fp32", 128, False),
    ]
    for element, dim, windowed in problems:
        size = 2 if element == "bf16" else 4
        own = tiles.TILES[target][size, triton.next_power_of_2(dim)]
        for kernel in ATTENTION_KERNELS:
            yield _attention(target, kernel, getattr(own, kernel), element, dim, windowed)


def candidates(target: str) -> Iterator[Shipped]:
    """Tree attention with each tile that a measurement on `target` decides between."""
    for dim, some in tiles.CANDIDATES[target].items():
        for kernel, trials in some.items():
            for tile in trials:
                made = _attention(target, kernel, tile, "bf16", dim, windowed=False)
                size = f"{tile.rows}x{tile.columns} warps={tile.warps} stages={tile.stages}"
                yield replace(made, label=f"candidate {made.label} {size}")


def _attention(
    target: str, kernel: str, tile: tiles.Tile, element: str, dim: int, windowed: bool
) -> Shipped:
    function = ATTENTION_KERNELS[kernel]
    constants = {"GROUP": 4, "D": dim, "DIM": triton.next_power_of_2(dim), "WINDOWED": windowed}
    constants["PRECISION"] = tiles.precision(target)
    constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns}
    if kernel == "key":
        constants["SPLITS"] = 2
    arguments = [name for name in function.arg_names if name not in constants]
    types = {name: ATTENTION.get(name, f"*{element}") for name in arguments}
    aligned = tuple(name for name in arguments if name not in ("blocks", "window", "scale"))
    label = f"attention {function.fn.__name__.removesuffix('_kernel')} {element} d={dim}"
    label += " windowed" * windowed
    most = MOST_SPILLED["attention"]
    return Shipped(function, types, constants, tile.warps, tile.stages, aligned, label, most)


def _shipped_rows() -> Iterator[Shipped]:
    """Kernels over rows of logits and over tokens."""
    rows, block = rows_triton, {"BLOCK": rows_triton.BLOCK}
    flags = [
        dict(zip(("HAS_BIAS", "SOFTCAP", "ENTROPY"), values, strict=True))
        for values in itertools.product((False, True), (0.0, 30.0), (False, True))
    ]
    wide, narrow = "*fp32", "*bf16"
    for constants in ({**f, **block} for f in flags):
        # From existing logits there is no bias, and the logits may be bfloat16.
        sources = [wide] if constants["HAS_BIAS"] else [wide, narrow]
        for source in sources:
            yield Shipped(rows.sums_kernel, {"logits": source}, constants, rows.WARPS)
            for out in (narrow, wide) if source == wide else (narrow,):
                types = {"logits": source, "out": out}
                yield Shipped(rows.gradient_kernel, types, constants, rows.WARPS)
        for out in (narrow, wide):
            yield Shipped(rows.powers_kernel, {"out": out}, constants, rows.WARPS)
    for operand, bias in itertools.product((narrow, wide), (False, True)):
        types, constants = dict.fromkeys(("x", "weight"), operand), {"HAS_BIAS": bias, **block}
        yield Shipped(rows.target_kernel, types, constants, rows.WARPS)
    for values in (narrow, wide):
        yield Shipped(rows.move_kernel, {"values": values}, block, rows.WARPS)
    for kept in (narrow, wide):
        yield Shipped(rows.with_entropy_kernel, {"kept": kept}, block, rows.WARPS)
    for low, high in itertools.product((0, 1), repeat=2):
        constants = {"LOW_STEP": low, "HIGH_STEP": high, "LIMIT": 40.0}
        constants["BLOCK"] = policy_triton.BLOCK
        yield Shipped(policy_triton.surrogate_kernel, {}, constants, 4)


def measure(configuration: Shipped, target: str) -> Usage:
    """Compile for `target`; `RuntimeError` from Triton where that fails."""
    signature = {
        name: "constexpr"
        if name in configuration.constants
        else configuration.types.get(name, BY_NAME.get(name, "*fp32"))
        for name in configuration.kernel.arg_names
    }
    names = configuration.kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in configuration.aligned}
    source = ASTSource(configuration.kernel, signature, configuration.constants, aligned)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    compiled = triton.compile(source, target=TARGETS[target][0], options=options)
    usage = _amd_usage(compiled) if "amdgcn" in compiled.asm else _nvidia_usage(compiled)
    shared, most = compiled.metadata.shared, configuration.most_spilled
    return Usage(target, configuration.name, *usage, shared, most)


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(compiled: Any) -> tuple[int, int]:
    # Scalar registers spill into lanes of vector registers; what costs is scratch memory.
    pattern = r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)"
    found = {key: int(value) for key, value in re.findall(pattern, compiled.asm["amdgcn"])}
    return found["vgpr_count"], found["private_segment_fixed_size"]


def main() -> int:
    """Print the table; the exit code says whether everything fits."""
    print(f"{'chip':8} {'registers':>9} {'spilled':>8} {'shared':>7}  kernel")
    failed = 0
    for target in TARGETS:
        for configuration in itertools.chain(shipped(target), candidates(target)):
            usage = measure(configuration, target)
            failed += not usage.fits
            mark = "" if usage.fits else "  DOES NOT FIT"
            print(
                f"{target:8} {usage.registers:9} {usage.spilled:8} {usage.shared:7}  "
                f"{usage.name}{mark}"
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
