"""The kernel that moves packed values to their places and back, and the partition kernels that read them packed."""

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
from ...kernels.bitmap.layout import RUN, WORD, Bitmap
from ...kernels.gpus import architecture
from ...kernels.partition import eager as partition_twins
from ...kernels.partition import triton as partition_kernels
from . import contract, partition
from .check import SHAPES, Cast, Check, drawn
from .contract import Draw, Kernel, Problem, pair

KERNELS = (Kernel(kernels._bitmap_move, ("tl.load(values_at", "tl.load(dense_at"), None, False, lambda row: []),)
LAUNCHERS = ()
BACKENDS = (_BACKENDS,)
OPERATIONS = ("unpack", "pack")
PRODUCTS = tuple(f"kept_{op}" for op in partition.OPERATIONS)
"""The partition operations on kept values."""


def operands(case: "Case", draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    kept = _kept(case, draw)
    if case.op in PRODUCTS:
        return _product(case, draw, kept)
    ours, twin = pair(f"{case.op}_values", kernels, twins)
    operand = draw(kept.nnz) if case.op == "unpack" else draw(*case.shape)
    return Problem((operand,), lambda t: ours(t, kept), lambda t: twin(t, kept), 1)


def _kept(case: "Case", draw: Draw) -> Bitmap:
    """The bitmap of a case; where nothing has numbers only its sizes count."""
    n, k = case.shape
    if draw.device != "meta":
        return Bitmap.pack(draw.mask(n, k)).to(draw.device)
    bits, starts = (torch.empty(n, -(-k // per), dtype=torch.int32, device="meta") for per in (WORD, RUN))
    return Bitmap(bits, starts, (n, k), n * k // (case.alpha or 1))


def _product(case: "Case", draw: Draw, kept: Bitmap) -> Problem:
    """A partition operation of ``case.alpha`` children; one needs no labels."""
    (n, k), alpha, m = case.shape, case.alpha or 1, case.m
    plain = draw.labels(n, k)
    table, labels = (plain, draw.packed(plain)) if alpha > 1 else (torch.zeros_like(plain), None)
    op = case.op.removeprefix("kept_").removesuffix("_t")
    if case.op.endswith("_t"):
        (n, k), kept, table, labels = (k, n), kept.T, table.T, None if labels is None else labels.T
    ours, twin = pair(partition.NAMES[op], partition_kernels, partition_twins)
    if op == "grad":
        given = draw(m, alpha, n, most=draw.rest), draw(m, k)
        return Problem(given, lambda *o: ours(*o, labels, kept=kept), lambda *o: kept.from_dense(twin(*o, table)), m)
    bias = (draw(alpha, n) if op == "split" else draw(n)) if case.bias else None
    given = draw(*((m, k) if op == "split" else (m, alpha, k)), most=draw.rest), draw(kept.nnz)
    fused, children = (bias, case.activation), (alpha,) if op == "split" else ()
    return Problem(
        given,
        lambda *o: ours(*o, labels, *children, *fused, kept=kept),
        lambda x, v: twin(x, kept.to_dense(v), table, *children),
        k,
        contract.ending(case, bias),
    )


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of an operation on packed values.

    Of ``alpha`` positions one is kept. Where values are only moved there are no activations; a product has as many
    children.
    """

    m: int = 0
    alpha: int | None = 2
    file: ClassVar[str] = "bitmap"
    operands = operands

    def runs_on(self, arch: int) -> bool:
        """Not where the products are made of a decompressed weight."""
        return self.op not in PRODUCTS or architecture(arch).matrix != "tcgen05.mma"


CASES = (
    *(Case(op, t) for op, t in product(OPERATIONS, ("bf16", "fp32"))),
    *(Case(op, "bf16", m, alpha) for op, (m, alpha) in product(PRODUCTS, ((16, 1), (64, 2), (64, 8)))),
    *(Case(op, "fp32", 16, 2) for op in ("kept_split", "kept_merge_t", "kept_grad")),
)
"""Numbers of 16 bits are moved alike, of whatever type."""
QUICK = (*(Case(op, "bf16") for op in OPERATIONS), *(Case(op, "bf16", 16, 2) for op in ("kept_split", "kept_grad")))


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
