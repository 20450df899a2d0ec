"""The kernel of an expanded MLP in one launch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import kernels as public
from ...kernels.mlp import gluon as direct
from ...kernels.mlp import triton as kernels
from ...kernels.mlp.backends import BACKENDS as _BACKENDS
from ...kernels.mlp.eager import expanded_mlp_eager
from ...kernels.partition.config import GROUP
from ...kernels.partition.eager import Labels
from ...kernels.partition.gluon import _group
from . import contract
from .check import Cast, Check, drawn
from .contract import Draw, Kernel, Problem
from .partition import ROWS, check_direct


def _step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_H"] * given["BLOCK_K"] * size, given["BLOCK_M" if given["TURNED"] else "BLOCK_H"]


def _direct_step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_H"] * GROUP * given["WARPS_IN"] * size, 16


KERNELS = (
    Kernel(kernels._expanded_mlp, ("tl.load(words_at",), _step),
    Kernel(direct.multiply_twice, ROWS, _direct_step, check=check_direct, loads=(_group,)),
)
LAUNCHERS = (kernels,)
BACKENDS = (_BACKENDS,)
SHAPE = (64, 512)
"""Parents and inputs."""


def operands(case: Any, draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    (hidden, k), alpha, n = case.shape, case.alpha, case.outputs

    def labelled(rows: int, columns: int) -> Labels:
        return draw.seeded(rows, columns) if case.seeded else draw.packed(draw.labels(rows, columns))

    first, second = labelled(hidden, k), labelled(n, hidden) if case.merged else None
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

    shape: tuple[int, int] = SHAPE
    outputs: int = 1000
    usual: ClassVar[tuple[int, int]] = SHAPE
    operands = operands


CASES = tuple(
    Case("mlp", t, m, alpha, "relu") for t, m, alpha in product(("bf16", "fp16"), (1, 16, 64, 1024), (2, 4, 8))
)
QUICK = (Case("mlp", "bf16", 1, 2, "relu"), Case("mlp", "bf16", 1024, 2, "relu"))


def checks() -> Iterator[Check]:
    """The fused MLP, its second layer dense and merged."""
    for m, k, hidden, n in ((1, 512, 8, 100), (33, 70, 13, 33), (64, 128, 64, 130)):
        for alpha, merged in ((2, False), (2, True), (4, False)):
            generator = torch.Generator().manual_seed(0)
            labels = torch.randint(alpha, (hidden, k), generator=generator, dtype=torch.uint8)
            reads = torch.randint(alpha, (n, hidden), generator=generator, dtype=torch.uint8)
            shapes = ((m, k), (hidden, k), (n, hidden * (1 if merged else alpha)), (alpha, hidden), (n,))
            tensors = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]

            def run(cast: Cast, backend: str, tensors: list[Tensor] = tensors, labels: Tensor = labels,
                    reads: Tensor | None = reads if merged else None, alpha: int = alpha) -> list[Tensor]:  # fmt: skip
                x, w1, w2, bias1, bias2 = map(cast, tensors)
                more: dict[str, Any] = {"alpha": alpha, "bias1": bias1, "bias2": bias2, "activation": "gelu"}
                second = None if reads is None else reads.to(x.device)
                return [public.expanded_mlp(x, w1, labels.to(x.device), w2, second, backend=backend, **more)]

            name = f"expanded_mlp {m}x{k}-{hidden}-{n} alpha {alpha}{' merged' * merged}"
            yield Check(name, "mlp", "expanded_mlp", run, by_yardstick=True)
