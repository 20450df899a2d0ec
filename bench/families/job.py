"""What the tuner asks of a family: an operation on data of a size, and the problem that it is to the chooser."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

SHAPE = (4096, 4096)
"""``(N, K)`` of what is tuned."""
Setup = tuple[Callable[..., Tensor], partial[Tensor], Any]
"""A launcher and an eager twin on the same random data, and the problem that the chooser sees."""


def draw(shape: tuple[int, ...], target: str, dtype: torch.dtype) -> Tensor:
    """Normal numbers made where they are wanted; on ``"meta"`` none, where launches are only compiled."""
    if target == "meta":
        return torch.empty(shape, dtype=dtype, device=target)
    generator = torch.Generator(target).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=target).to(dtype)
