"""What the tuner asks of a family: an operation on data of a size, and the problem that it is to the chooser."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

Own = TypeVar("Own", bound="Job")

SHAPE = (4096, 4096)
"""``(N, K)`` of what is tuned."""
Setup = tuple[Callable[..., Tensor], partial[Tensor], Any]
"""A launcher and an eager twin on the same random data, and the problem that the chooser sees."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One entry of a family's table; each family adds how it is set up, and the ``candidates`` for a problem.

    Attributes:
        op: One of the family's.
        m: Rows of activations.
        dtype: Of the operands.
        shape: ``(N, K)`` of the stored weight, or of a block operation's parent.
        family: Whose table it is.
        smallest: What is small of a job that the interpreter can walk.
    """

    op: str
    m: int
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int] = SHAPE
    family: ClassVar[str]
    smallest: ClassVar[dict[str, Any]] = {"m": 5, "shape": (64, 64), "dtype": torch.float32}

    def small(self: Own) -> Own:
        """The same at a size that the interpreter can walk."""
        return replace(self, **self.smallest)


def draw(shape: tuple[int, ...], target: str, dtype: torch.dtype) -> Tensor:
    """Normal numbers made where they are wanted; on ``"meta"`` none, where launches are only compiled."""
    if target == "meta":
        return torch.empty(shape, dtype=dtype, device=target)
    generator = torch.Generator(target).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=target).to(dtype)
