"""Argument checks of the public operations: every message names op, argument, what was expected and got."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    op: str,
    name: str,
    value: object,
    shape: Sequence[int | None],
    *,
    batched: bool = False,
    dtype: torch.dtype | None = None,
    like: Tensor | None = None,
    on: Tensor | None = None,
) -> None:
    """Raises unless ``value`` is a tensor of the given shape, dtype and device.

    Args:
        op: Name of the operation, for the message.
        name: Name of the argument, for the message.
        value: What the caller passed.
        shape: Expected size of each dimension; ``None`` accepts any.
        batched: Any number of leading dimensions may stand before ``shape``.
        dtype: The required dtype; without it, any floating dtype, or that of ``like``.
        like: A tensor whose device and (without ``dtype``) dtype are required.
        on: A tensor whose device alone is required.

    Raises:
        TypeError: ``value`` is no tensor, or has the wrong dtype.
        ValueError: Its shape or device is wrong.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    got = tuple(value.shape)
    tail = got[max(len(got) - len(shape), 0) :] if batched else got
    if len(tail) != len(shape) or any(w is not None and w != g for w, g in zip(shape, tail, strict=True)):
        wanted = ["..."] * batched + ["*" if size is None else str(size) for size in shape]
        raise ValueError(f"{op}: {name} must have shape [{', '.join(wanted)}], got {list(got)}")
    if dtype is None and like is not None:
        dtype = like.dtype
    if dtype is None and value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {value.dtype}")
    beside = like if like is not None else on
    if beside is not None and value.device != beside.device:
        raise ValueError(f"{op}: {name} must be on {beside.device}, got {value.device}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts operands to the autocast dtype where autocast is on, as ``nn.Linear`` does."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def as_rows(x: Tensor, features: int) -> Tensor:
    """Joins all but the last ``features`` dimensions into one, adding it where there is none."""
    leading = x.dim() - features
    return x.flatten(0, leading - 1) if leading else x.unsqueeze(0)
