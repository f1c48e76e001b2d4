"""What flash attention does, segment by segment, for machines that cannot run it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from elpo_kernels.attention.varlen import Kernel, Segments


@pytest.fixture
def segment_kernel() -> Kernel:
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: Segments,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        outputs = []
        bounds = zip(parts.queries.tolist(), parts.keys.tolist(), strict=True)
        for (q, k), (q_stop, k_stop) in pairwise(bounds):
            own, seen = q_stop - q, k_stop - k
            assert own <= parts.longest_query and seen <= parts.longest_key
            keys, values = (x[k:k_stop].repeat_interleave(groups, 1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query[q:q_stop], keys) * scale
            apart = torch.arange(seen - own, seen)[:, None] - torch.arange(seen)
            hidden = (apart < 0) | (apart >= (window or seen))
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(outputs)

    return attend
