"""The block kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...kernels.block import eager as twins
from ...kernels.block import triton as kernels
from ...kernels.block.backends import BACKENDS as _BACKENDS
from ...kernels.block.layout import BlockLayout, grid
from . import contract
from .contract import SHAPE, TYPES, Draw, Kernel, Meta, Problem, ending


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


def operands(case: Any, draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    (n, k), m, lying = case.shape, case.m, case.lying
    layout = BlockLayout.from_mask(draw.mask(*grid(case.shape, case.block)), case.shape, case.block)
    layout = BlockLayout(case.shape, case.block, *(index.to(draw.device) for index in layout.tensors))
    values = draw.stored(layout, draw(n, k))
    bias = draw(n) if case.bias else None
    x = draw(m, k, lying=lying, most=None if case.op == "dw" else draw.rest)
    dy = draw(m, n, lying=lying, most=draw.rest)
    if case.op == "forward":
        return Problem(
            (x, values),
            lambda x, v: kernels.block_matmul_triton(x, v, layout, bias, case.activation),
            lambda x, v: twins.block_matmul_eager(x, v, layout),
            ending(case, bias),
            k,
        )
    if case.op == "dx":
        return Problem(
            (dy, values),
            lambda dy, v: kernels.block_matmul_t_triton(dy, v, layout),
            lambda dy, v: twins.block_matmul_t_eager(dy, v, layout),
            lambda y: y,
            n,
        )
    return Problem(
        (dy, x),
        lambda dy, x: kernels.block_grad_triton(dy, x, layout),
        lambda dy, x: twins.block_grad_eager(dy, x, layout),
        lambda y: y,
        m,
    )


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

    def posed(self) -> Problem:
        """See :class:`.contract.Case`."""
        return operands(self, Meta(self))


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
