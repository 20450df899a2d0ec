"""Matmuls of a weight of which only whole blocks are kept: any block mask, values stored compactly."""

from .api import block_grad, block_matmul, block_matmul_t
from .eager import block_grad_eager, block_matmul_eager, block_matmul_t_eager
from .layout import BlockLayout

__all__ = [
    "BlockLayout",
    "block_grad",
    "block_grad_eager",
    "block_matmul",
    "block_matmul_eager",
    "block_matmul_t",
    "block_matmul_t_eager",
]
