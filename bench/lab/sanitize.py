"""Memory safety of the kernels under the interpreter: out-of-bounds accesses and races between programs.

What TileLens 3.1 can do here, tried: its sanitizer follows addresses symbolically, loops and indices read from memory
included, and names the tensor that a pointer came from. It gives equal ``tl.arange`` of one program the same symbol,
so that of a square tile it sees the diagonal alone. Its race detector records accesses and judges none of them (its
solver is an empty file). So bounds are checked twice, by the sanitizer and lane by lane in the trace, and races are
found in the trace: exact for what was run, blind to atomics, which these kernels do not use.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpe.kernels.block.layout import BlockLayout, grid
from fpe.kernels.partition.labels import PackedLabels

from .trace import Kernels, Touch, Trace, family_kernels, tracing, watching


@dataclass(frozen=True)
class Finding:
    """Something that a kernel must not do.

    Attributes:
        kernel: Its name.
        kind: ``"bounds"`` (sanitizer), ``"bounds, traced"`` or ``"race"``.
        tensor: The argument.
        detail: What happened.
    """

    kernel: str
    kind: str
    tensor: str
    detail: str


@dataclass(frozen=True)
class BlockCase:
    """A small odd launch of the block operations.

    Attributes:
        id: Its name.
        m: Rows of activations.
        shape: ``(N, K)``.
        block: ``(bn, bk)``.
        density: Chance that a block is kept.
        dtype: Of the operands.
        bias: Whether the forward adds a bias, with an activation after it.
        strided: Whether the operands' rows lie apart.
    """

    id: str
    m: int = 19
    shape: tuple[int, int] = (70, 90)
    block: tuple[int, int] = (16, 32)
    density: float = 0.5
    dtype: torch.dtype = torch.float16
    bias: bool = False
    strided: bool = False
    family = "block"

    def operands(self) -> tuple[Tensor, Tensor, Tensor, BlockLayout]:
        """Activations, output gradient, values and layout."""
        generator = torch.Generator().manual_seed(0)
        n, k = self.shape
        mask = torch.rand(grid(self.shape, self.block), generator=generator) < self.density
        layout = BlockLayout.from_mask(mask, self.shape, self.block)
        apart = 5 if self.strided else 0
        x, dy = (torch.ones(self.m, size + apart, dtype=self.dtype)[:, :size] for size in (k, n))
        return x, dy, torch.ones(layout.values_shape, dtype=self.dtype), layout

    def runs(self) -> Iterator[Callable[[], Any]]:
        """Forward, dX and dW."""
        from fpe.kernels.block import triton as module

        x, dy, values, layout = self.operands()
        bias = torch.ones(self.shape[0], dtype=self.dtype) if self.bias else None
        yield lambda: module.block_matmul_triton(x, values, layout, bias, "relu" if self.bias else None)
        yield lambda: module.block_matmul_t_triton(dy, values, layout)
        yield lambda: module.block_grad_triton(dy, x, layout)


@dataclass(frozen=True)
class PartitionCase:
    """A small odd launch of the partition operations.

    Attributes:
        id: Its name.
        alpha: Children.
        m: Rows of activations.
        shape: ``(N, K)``.
        dtype: Of the operands.
        holes: Whether some edges belong to nobody.
        bias: Whether the forwards add a bias, with an activation after it.
        strided: Whether the activations' rows lie apart.
    """

    id: str
    alpha: int = 2
    m: int = 19
    shape: tuple[int, int] = (70, 90)
    dtype: torch.dtype = torch.float16
    holes: bool = False
    bias: bool = False
    strided: bool = False
    family = "partition"

    def operands(self) -> tuple[Tensor, Tensor, Tensor, PackedLabels]:
        """Activations of the parents' inputs and of their children, weight and labels."""
        (n, k), apart = self.shape, 5 if self.strided else 0
        drawn = torch.randint(self.alpha + self.holes, (n, k), generator=torch.Generator().manual_seed(0))
        x = torch.ones(self.m, k + apart, dtype=self.dtype)[:, :k]
        children = torch.ones(self.m, self.alpha, n + apart, dtype=self.dtype)[:, :, :n]
        return x, children, torch.ones(n, k, dtype=self.dtype), PackedLabels.pack(drawn.byte(), self.alpha)

    def runs(self) -> Iterator[Callable[[], Any]]:
        """Both multiplications on the weight and on its transpose, and both gradients."""
        from fpe.kernels.partition import triton as module

        (n, k), alpha, activation = self.shape, self.alpha, "relu" if self.bias else None
        x, dy, w, labels = self.operands()
        z, y = torch.ones(self.m, alpha, k, dtype=self.dtype), torch.ones(self.m, n, dtype=self.dtype)
        wide, narrow = (torch.ones(size, dtype=self.dtype) if self.bias else None for size in ((alpha, n), (n,)))
        yield lambda: module.split_matmul_triton(x, w, labels, alpha, wide, activation)
        yield lambda: module.merge_matmul_triton(dy, w.T, labels.T)
        yield lambda: module.partition_grad_triton(dy, x, labels)
        yield lambda: module.merge_matmul_triton(z, w, labels, narrow, activation)
        yield lambda: module.split_matmul_triton(y, w.T, labels.T, alpha)
        yield lambda: module.partition_grad_triton(z, y, labels.T)


@dataclass(frozen=True)
class MlpCase:
    """A small odd launch of the fused MLP.

    Attributes:
        id: Its name.
        alpha: Children.
        m: Rows of activations.
        sizes: Inputs, parents, outputs.
        merged: Whether the second layer has labels too.
    """

    id: str
    alpha: int = 2
    m: int = 19
    sizes: tuple[int, int, int] = (70, 13, 33)
    merged: bool = False
    family = "mlp"

    def runs(self) -> Iterator[Callable[[], Any]]:
        """The one launch."""
        from fpe.kernels.mlp import triton as module

        (k, hidden, n), alpha, generator = self.sizes, self.alpha, torch.Generator().manual_seed(0)

        def labels(*shape: int) -> PackedLabels:
            return PackedLabels.pack(torch.randint(alpha, shape, generator=generator).byte(), alpha)

        shapes = ((self.m, k), (hidden, k), (n, hidden * (1 if self.merged else alpha)), (alpha, hidden), (n,))
        x, w1, w2, bias1, bias2 = (torch.ones(shape, dtype=torch.float16) for shape in shapes)
        first, second = labels(hidden, k), labels(n, hidden) if self.merged else None
        yield lambda: module.expanded_mlp_triton(x, w1, first, w2, second, alpha, bias1, bias2)


Case = BlockCase | PartitionCase | MlpCase

CASES: tuple[Case, ...] = (
    BlockCase("tails"),
    BlockCase("one-row", m=1, bias=True),
    BlockCase("square-blocks", block=(16, 16), bias=True, strided=True),
    BlockCase("even", m=32, shape=(64, 96), block=(32, 32)),
    BlockCase("split", m=3, shape=(20, 300), block=(16, 16), density=2.0, bias=True),
    BlockCase("split-rows", m=530, shape=(17, 33), block=(16, 16), density=0.7),
    BlockCase("inner-steps", m=5, shape=(65, 70), block=(64, 64), dtype=torch.float32, strided=True),
    BlockCase("grouped", m=1100, shape=(33, 16), block=(16, 16), density=0.8),
    BlockCase("sparse", block=(16, 16), density=0.1),
    BlockCase("empty", density=0.0),
    PartitionCase("tails-of-a-partition"),
    PartitionCase("odd-inputs", shape=(65, 91), strided=True, bias=True),
    PartitionCase("even-tiles", m=32, shape=(128, 256), bias=True),
    PartitionCase("split-partition", m=3, shape=(40, 1100), bias=True),
    PartitionCase("split-partition-of-the-transpose", m=3, shape=(1100, 40), bias=True),
    PartitionCase("three-children-and-holes", alpha=3, holes=True),
    PartitionCase("eight-children", alpha=8, m=5, dtype=torch.float32, strided=True, holes=True),
    PartitionCase("one-weight", m=1, shape=(1, 1), bias=True),
    MlpCase("mlp"),
    MlpCase("mlp-odd", alpha=3, sizes=(71, 17, 70), merged=True),
    MlpCase("mlp-one-row", alpha=8, m=1, sizes=(8, 1, 1)),
    MlpCase("mlp-even", m=64, sizes=(128, 16, 64), merged=True),
    PartitionCase("many-rows", m=600, shape=(20, 40), alpha=4, holes=True),
)


def check_kernels(cases: Iterable[Case] = CASES) -> list[Finding]:
    """Runs every operation of every case under all checks; needs ``TRITON_INTERPRET=1`` and TileLens.

    Returns:
        What was found; nothing, if all is well.
    """
    return [finding for case in cases for run in case.runs() for finding in check(family_kernels(case.family), run)]


def check(kernels: Kernels, run: Callable[[], Any]) -> list[Finding]:
    """Runs launches twice, under the sanitizer and under the tracer.

    Args:
        kernels: What is launched.
        run: Makes the launches. Under the sanitizer nothing is computed: its results are not to be looked at.
    """
    from tilelens.clients import Sanitizer

    findings: list[Finding] = []

    def collect(kernel: str, sanitizer: Any) -> None:
        for r in sanitizer.records:
            line = r.user_code_tracebacks[-1].lineno if r.user_code_tracebacks else "?"
            access = r.op_type.__name__.lower()
            findings.append(Finding(kernel, "bounds", _name(r.tensor_name), f"{access} in line {line} may leave it"))

    with watching(kernels, lambda: Sanitizer(abort_on_error=False), collect):
        run()
    if any(finding.detail.startswith("store") for finding in findings):
        return findings  # the tracer would let it happen and take this process with it
    with tracing(kernels) as traces:
        run()
    for trace in traces:
        findings += [*bounds(trace), *races(trace)]
    return findings


def bounds(trace: Trace) -> Iterator[Finding]:
    """Active lanes outside of the tensor that their access starts in."""
    for position, touches in trace.programs.items():
        for t in touches:
            outside = (t.offsets < 0) | (t.offsets + t.itemsize > trace.extents[t.tensor])
            if outside.any():
                where = f"byte {t.offsets[outside][0]} of {trace.extents[t.tensor]}"
                detail = f"{_verb(t)} by program {position} at {where}"
                yield Finding(trace.kernel, "bounds, traced", t.tensor, detail)


def races(trace: Trace) -> Iterator[Finding]:
    """Elements that one program writes and another reads or writes, or two lanes of one store write.

    The programs of a launch have no order, so each is a race whatever the values are.
    """
    writer = {name: np.full(size + 1, -1) for name, size in trace.extents.items()}
    programs = list(trace.programs.items())
    # All writes first: a reader may come before the writer in the trace and still race with it.
    for stores in (True, False):
        for number, (position, touches) in enumerate(programs):
            for t in touches:
                if t.store != stores:
                    continue
                lanes = t.offsets[(t.offsets >= 0) & (t.offsets < trace.extents[t.tensor])]
                others = writer[t.tensor][lanes]
                clash = (others != -1) & (others != number)
                if clash.any():
                    other = programs[others[clash][0]][0]
                    detail = f"{_verb(t)} by program {position} at byte {lanes[clash][0]}, written by program {other}"
                    yield Finding(trace.kernel, "race", t.tensor, detail)
                if t.store:
                    if len(np.unique(lanes)) < len(lanes):
                        yield Finding(trace.kernel, "race", t.tensor, f"two lanes of a store of program {position}")
                    writer[t.tensor][lanes] = number


def _verb(touch: Touch) -> str:
    return "store" if touch.store else "load"


def _name(tensor: str | None) -> str:
    return (tensor or "?").removesuffix("_ptr")
