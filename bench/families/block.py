"""The block kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ...kernels.block import triton as kernels
from ...kernels.block.backends import BACKENDS as _BACKENDS
from ...kernels.block.layout import BlockLayout, grid
from . import contract
from .contract import SHAPE, TYPES, Kernel


def _step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_IN"] * given["BK" if given["TRANSPOSED"] else "BN"] * size, given["BLOCK_M"]


def _outer_step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_M"] * (given["BN"] + given["BK"]) * size, given["BN"]


KERNELS = (
    Kernel(kernels._block_multiply, ("tl.load(values_ptr",), _step),
    Kernel(kernels._block_outer, ("tl.load(dy_ptr", "tl.load(x_ptr"), _outer_step),
)
LAUNCHERS = (kernels,)
BACKENDS = (_BACKENDS,)
OPERATIONS = ("forward", "dx", "dw")
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (64, 128), (128, 64), (16, 64))


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of a block operation; of ``alpha`` blocks one is kept, every other one if it is not given."""

    op: str
    dtype: str
    m: int
    block: tuple[int, int]
    alpha: int | None = None
    activation: str | None = None
    shape: tuple[int, int] = SHAPE

    def launch(self) -> object:
        """See :class:`.contract.Case`."""
        n, k = self.shape
        rows, columns = (torch.arange(size) for size in grid(self.shape, self.block))
        shared_out = BlockLayout.from_mask((rows[:, None] + columns) % (self.alpha or 2) == 0, self.shape, self.block)
        layout = BlockLayout(self.shape, self.block, *(index.to("meta") for index in shared_out.tensors))
        x, dy, values = self.empty(self.m, k), self.empty(self.m, n), self.empty(*layout.values_shape)
        if self.op == "forward":
            bias = self.empty(n) if self.activation else None
            return kernels.block_matmul_triton(x, values, layout, bias, self.activation)
        if self.op == "dx":
            return kernels.block_matmul_t_triton(dy, values, layout)
        return kernels.block_grad_triton(dy, x, layout)


CASES = (
    *(Case(op, t, m, b) for op, b, t, m in product(OPERATIONS, BLOCKS, TYPES, (1, 16, 64, 1024, 8192))),
    *(
        Case("forward", "bf16", m, block, activation=activation)
        for block, m, activation in product(BLOCKS, (16, 8192), ("relu", "gelu", "silu"))
    ),
)
QUICK = (
    Case("forward", "bf16", 1024, (128, 128)),
    Case("forward", "bf16", 1, (64, 64), activation="gelu"),
    Case("dx", "fp16", 1024, (64, 64)),
    Case("dw", "bf16", 1024, (128, 128)),
)
