"""What the machine can do at most: memory and matrix products."""

from __future__ import annotations

import torch

from bench.gpu.part import Part, medians


def run(part: Part) -> None:
    size = 1 << (16 if part.tiny else 31)
    source = torch.empty(size, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    edge = 64 if part.tiny else 8192
    a, b = (torch.randn(edge, edge, device=part.device, dtype=part.dtype) for _ in range(2))
    variants = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = medians(part.interleaved("ceilings", variants))
    copied = 2 * size / times["copy"] / 1e9
    product = 2 * edge**3 / times["product"] / 1e9
    processors = None
    if not part.tiny:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
    part.row(
        f"copy {copied:.2f} TB/s, {edge}³ {part.dtype} product {product:.0f} TFLOP/s",
        copy_tb_per_s=copied,
        product_tflops=product,
        multiprocessors=processors,
    )
