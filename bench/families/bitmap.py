"""The kernel that moves packed values to their places and back."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from ... import kernels as public
from ...kernels.bitmap import eager as twins
from ...kernels.bitmap import triton as kernels
from ...kernels.bitmap.backends import BACKENDS as _BACKENDS
from ...kernels.bitmap.layout import Bitmap
from . import contract
from .check import SHAPES, Cast, Check, drawn
from .contract import SHAPE, Draw, Kernel, Problem, pair

KERNELS = (Kernel(kernels._bitmap_move, ("tl.load(values_at", "tl.load(dense_at"), None, False, lambda row: []),)
LAUNCHERS = ()
BACKENDS = (_BACKENDS,)
OPERATIONS = ("unpack", "pack")


def operands(case: "Case", draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    kept = Bitmap.pack(draw.mask(*case.shape)).to(draw.device)
    ours, twin = pair(f"{case.op}_values", kernels, twins)
    operand = draw(kept.nnz) if case.op == "unpack" else draw(*case.shape)
    return Problem((operand,), lambda t: ours(t, kept), lambda t: twin(t, kept), 1)


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of a bitmap operation; of ``alpha`` positions one is kept. There are no activations."""

    op: str
    dtype: str
    m: int = 0
    alpha: int | None = 2
    shape: tuple[int, int] = SHAPE
    file: ClassVar[str] = "bitmap"

    def posed(self) -> Problem:
        """See :class:`.contract.Case`."""
        return operands(self, Draw(self))


CASES = tuple(Case(op, t) for op, t in product(OPERATIONS, ("bf16", "fp32")))
"""Numbers of 16 bits are moved alike, of whatever type."""
QUICK = tuple(Case(op, "bf16") for op in OPERATIONS)


def checks() -> Iterator[Check]:
    """Both moves, and a product with its gradients, by shape and density."""
    for (m, n, k), density in ((shape, d) for shape in SHAPES for d in (0.0, 0.5, 1.0)):
        kept = Bitmap.pack(torch.rand(n, k, generator=torch.Generator().manual_seed(0)) < density)
        w, x, dy = drawn(n, k, seed=1), drawn(m, k, seed=2), drawn(m, 1, n, seed=3)

        def run(cast: Cast, backend: str, kept: Bitmap = kept, w: Tensor = w, x: Tensor = x,
                dy: Tensor = dy) -> list[Tensor]:  # fmt: skip
            x, w, dy = cast(x), cast(w), cast(dy)
            there = kept.to(x.device)
            values = public.pack_values(w, there, backend=backend)
            moved = [values, public.unpack_values(values, there.T, backend=backend)]
            products = [public.masked_matmul(x, values, there, backend=backend)]
            products += [public.partition_grad(dy, x, None, kept=there, backend=backend)]
            return [*moved, *products, public.masked_matmul(dy[:, 0], values, there.T, backend=backend)]

        yield Check(f"bitmap {m}x{n}x{k} density {density}", "bitmap", "unpack_values", run)
