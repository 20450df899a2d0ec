"""The kernel that moves packed values to their places and back."""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from ...kernels.bitmap import eager as twins
from ...kernels.bitmap import triton as kernels
from ...kernels.bitmap.backends import BACKENDS as _BACKENDS
from ...kernels.bitmap.layout import Bitmap
from . import contract
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
QUICK = (Case("unpack", "bf16"),)
