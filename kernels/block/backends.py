"""What runs the block operations, and what keeps each from a call."""

from torch import Tensor

from ..cpu import why_not_cpu
from ..dispatch import Backend, why_not_triton
from .config import limit


def _why_not_triton(operand: Tensor, block: tuple[int, int]) -> str | None:
    return why_not_triton(operand, limit(block))


def _why_not_cpu(operand: Tensor, block: tuple[int, int]) -> str | None:
    return why_not_cpu(operand)


BACKENDS = {
    "triton": Backend("block.triton", "blocks", _why_not_triton),
    "cpu": Backend("block.cpu", "blocks on a CPU", _why_not_cpu),
    "eager": Backend("block.eager", ""),
}
"""``why_not`` takes an operand and the sides of a block."""
