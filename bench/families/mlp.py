"""The kernel of an expanded MLP in one launch."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from torch import Tensor

from ...kernels.mlp import triton as kernels
from ...kernels.mlp.backends import BACKENDS as _BACKENDS
from ...kernels.mlp.eager import expanded_mlp_eager
from . import contract
from .contract import Draw, Kernel, Problem


def _step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_H"] * given["BLOCK_K"] * size, given["BLOCK_M" if given["TURNED"] else "BLOCK_H"]


KERNELS = (Kernel(kernels._expanded_mlp, ("tl.load(words_at",), _step),)
LAUNCHERS = (kernels,)
BACKENDS = (_BACKENDS,)
SHAPE = (64, 512)
"""Parents and inputs."""


def operands(case: Any, draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    (hidden, k), alpha, n = case.shape, case.alpha, case.outputs
    first = draw.packed(draw.labels(hidden, k))
    second = draw.packed(draw.labels(n, hidden)) if case.merged else None
    # The hidden activations are rounded to 16 bits: with factors of one they are integers of no more than 8 bits.
    x, w1 = draw(case.m, k, lying=case.lying, most=1), draw(hidden, k, most=1)
    w2 = draw(n, hidden if case.merged else alpha * hidden)
    biases = (draw(alpha, hidden, most=3), draw(n)) if case.bias else ()

    def fields(rest: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        return (rest[0], rest[1]) if rest else (None, None)

    return Problem(
        (x, w1, w2, *biases),
        lambda x, w1, w2, *b: kernels.expanded_mlp_triton(x, w1, first, w2, second, alpha, *fields(b), case.activation),
        lambda x, w1, w2, *b: expanded_mlp_eager(x, w1, first, w2, second, alpha, *fields(b), case.activation),
        k + alpha * hidden,
    )


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of the fused MLP."""

    op: str
    dtype: str
    m: int
    alpha: int
    activation: str | None = None
    shape: tuple[int, int] = SHAPE
    outputs: int = 1000
    usual: ClassVar[tuple[int, int]] = SHAPE

    def posed(self) -> Problem:
        """See :class:`.contract.Case`."""
        return operands(self, Draw(self))


CASES = tuple(Case("mlp", t, m, alpha, "relu") for t, m, alpha in product(("bf16", "fp16"), (1, 64), (2, 4, 8)))
QUICK = (Case("mlp", "bf16", 1, 2, "relu"),)
