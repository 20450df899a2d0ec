"""Argument checks of the public operations: every message names op, argument, what was expected and got."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    op: str,
    name: str,
    value: object,
    shape: Sequence[int | None] | None,
    *,
    batched: bool = False,
    dtype: torch.dtype | None = None,
    like: Tensor | None = None,
    on: Tensor | None = None,
    is_index: bool = False,
    any_dtype: bool = False,
) -> None:
    """Raises unless ``value`` is a tensor of the given shape, dtype and device.

    Args:
        op: Name of the operation, for the message.
        name: Name of the argument, for the message.
        value: What the caller passed.
        shape: Expected size of each dimension; ``None`` accepts any, instead of all of them too.
        batched: Any number of leading dimensions may stand before ``shape``.
        dtype: The required dtype; without it, any floating dtype, or that of ``like``.
        like: A tensor whose device and (without ``dtype``) dtype are required.
        on: A tensor whose device alone is required.
        is_index: Whether ``value`` says where weights are. Beside operands on the meta device, which have none, it may
            lie anywhere: nothing reads it.
        any_dtype: Whether the dtype is of no matter.

    Raises:
        TypeError: ``value`` is not a dense tensor, or has the wrong dtype.
        ValueError: Its shape or device is wrong.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor, got one that is {kind.removeprefix('torch.')}")
    if shape is not None and (batched or value.shape != shape):
        check_shape(op, name, value, shape, batched=batched)
    if dtype is None and (like is not None or any_dtype):
        dtype = value.dtype if like is None else like.dtype
    if dtype is None and value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {value.dtype}")
    beside = like if like is not None else on
    if beside is not None and value.device != beside.device and not (is_index and beside.is_meta):
        raise ValueError(f"{op}: {name} must be on {beside.device}, got {value.device}")


def check_shape(op: str, name: str, value: Tensor, shape: Sequence[int | None], *, batched: bool = False) -> None:
    """Raises ``ValueError`` unless a tensor has a shape; the arguments are those of :func:`check_tensor`."""
    got = value.shape
    tail = got[max(len(got) - len(shape), 0) :] if batched else got
    # Lengths come first: of shapes of two lengths torch.export would note that there are not as many rows as columns.
    if len(tail) == len(shape) and (
        tail == shape or all(w is None or w == g for w, g in zip(shape, tail, strict=True))
    ):
        return
    wanted = ["..."] * batched + ["*" if size is None else str(size) for size in shape]
    raise ValueError(f"{op}: {name} must have shape [{', '.join(wanted)}], got {list(got)}")


def check_readable(op: str, name: str, value: Tensor) -> None:
    """Raises unless a tensor has values, which one on the meta device has not."""
    if value.is_meta:
        raise ValueError(f"{op}: {name} must hold values, got a tensor on the meta device")


def check_pair(op: str, name: str, value: object, least: int) -> tuple[int, int]:
    """Returns a pair of integers, each at least 0 or 1, or raises ``ValueError``."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        first, second = value
        if _is_size(first, least) and _is_size(second, least):
            return first, second
    kind = "positive integers" if least else "integers that are not negative"
    raise ValueError(f"{op}: {name} must be a pair of {kind}, got {value!r}")


def _is_size(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def in_one_dtype(op: str, name: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Casts two checked operands as :func:`autocast` does; raises unless they then have one dtype.

    Args:
        op: Name of the operation, for the message.
        name: Of the first operand, for the message.
        first: An operand.
        second: The one whose dtype is wanted.

    Raises:
        TypeError: They have different ones.
    """
    first, second = autocast(first, second)
    if first.dtype != second.dtype:
        raise TypeError(f"{op}: {name} must be {second.dtype}, got {first.dtype}")
    return first, second


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts operands to the autocast dtype where autocast is on, as ``nn.Linear`` does."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # asked of meta, PyTorch raises
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def as_rows(x: Tensor, features: int) -> Tensor:
    """Joins all but the last ``features`` dimensions into one, adding it where there is none."""
    leading = x.dim() - features
    if leading == 1:
        return x
    return x.flatten(0, leading - 1) if leading else x.unsqueeze(0)


def from_rows(y: Tensor, x: Tensor, features: int) -> Tensor:
    """Gives the rows of a result the leading dimensions of ``x``, which :func:`as_rows` joined."""
    leading = x.shape[: x.dim() - features]
    return y if len(leading) == 1 else y.view(*leading, *y.shape[1:])
