"""Argument checks shared by the public functions; every error names the value and the remedy."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

Number = float | Tensor


class SoftmaxOptions(TypedDict, total=False):
    """What the distribution over logits may be, and who computes it."""

    temperature: Number  # a number or [T], 1 by default
    softcap: float | None
    ignore_index: int  # target of tokens that have none, -100 by default
    backend: str  # "auto", "triton" or "torch"


DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """float64 stays what it is, everything narrower accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be bfloat16, float32 or float64, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, not {like.device}; move it there")


def check_per_token(name: str, values: Tensor | None, like: Tensor) -> None:
    """One value for each row of `like`, on its device."""
    if values is None:
        return
    if values.shape != like.shape[:1]:
        raise ValueError(
            f"{name} must be [{like.shape[0]}], one value a token, got {list(values.shape)}"
        )
    check_device(name, values, like)


def check_targets(targets: Tensor, like: Tensor) -> None:
    check_per_token("targets", targets, like)
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets must be int64 or int32, got {targets.dtype}")


def bound(name: str, value: Number, like: Tensor) -> Tensor:
    """A clip bound as a tensor in the accumulation dtype, 0-dimensional or `[T]`."""
    dtype = accumulation(like.dtype)
    if isinstance(value, Tensor):
        if value.ndim:
            check_per_token(name, value, like)
        return value.detach().to(like.device, dtype)
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return torch.full((), value, dtype=dtype, device=like.device)


def split_temperature(temperature: Number, like: Tensor) -> tuple[float, Tensor | None]:
    """The temperature as a number, or as 1 and one value a token."""
    if isinstance(temperature, Tensor):
        check_per_token("temperature", temperature, like)
        return 1.0, temperature.detach()
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    return float(temperature), None


def check_ratio_cap(ratio_cap: float) -> float:
    """Infinity stands for none."""
    if not ratio_cap >= 1:
        raise ValueError(f"ratio_cap must be >= 1 (1 + eps_high or more is meant), got {ratio_cap}")
    return float(ratio_cap)


def check_softcap(softcap: float | None) -> float:
    """0 stands for none."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and > 0, or None, got {softcap}")
    return softcap or 0.0


def entropy_coefficient(value: Number, like: Tensor) -> Tensor | None:
    """`[T]`, or `None` where the entropy does not enter the loss."""
    if isinstance(value, Tensor):
        if value.ndim:
            check_per_token("entropy_coef", value, like)
        return value.detach().to(accumulation(like.dtype)).expand(like.shape[0])
    if value == 0:
        return None
    return torch.full((like.shape[0],), value, dtype=accumulation(like.dtype), device=like.device)


def check_signs(pos: Tensor, neg: Tensor) -> None:
    """A pair of other signs is no sum of clipped surrogates. Reads the device."""
    _raise_for_signs(*torch.stack([(pos < 0).any(), (neg > 0).any()]).tolist())


def _raise_for_signs(pos_wrong: bool, neg_wrong: bool) -> None:
    for name, wrong, sign in (("pos_coef", pos_wrong, ">="), ("neg_coef", neg_wrong, "<=")):
        if wrong:
            raise ValueError(
                f"{name} must be {sign} 0 everywhere; give advantages= for mixed signs"
            )


def chosen_tokens(
    chosen: Tensor, targets: Tensor, size: int, ignore_index: int, *signed: Tensor
) -> Tensor:
    """Where the mask `chosen` `[T]` is true; `ValueError` for a target that is no token, and for
    `signed`, c⁺ and c⁻, of other signs. Reads the device once where all are chosen, else twice."""
    if not len(targets):
        return torch.arange(0, device=targets.device)
    bounds = torch.aminmax(torch.where(targets == ignore_index, 0, targets))
    counts = [chosen.sum(), *bounds]
    if signed:
        pos, neg = signed
        counts += [(pos < 0).any(), (neg > 0).any()]
    count, least, most, *wrong_signs = torch.stack(counts).tolist()
    if least < 0 or most >= size:
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= size))
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{at}] = {int(targets[at])} is outside the vocabulary of {size}; "
            f"give tokens without a target ignore_index={ignore_index}"
        )
    if signed:
        _raise_for_signs(*wrong_signs)
    if count == len(chosen):
        return torch.arange(count, device=chosen.device)
    return chosen.nonzero()[:, 0]
