"""Memory safety of the block kernels under the interpreter: out-of-bounds accesses and races between programs.

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

from .trace import Touch, Trace, tracing, watching

KERNELS = ("_multiply", "_outer", "_reduce")


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
class Case:
    """A small odd launch.

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

    def operands(self) -> tuple[Tensor, Tensor, Tensor, BlockLayout]:
        """Activations, output gradient, values and layout."""
        generator = torch.Generator().manual_seed(0)
        n, k = self.shape
        mask = torch.rand(grid(self.shape, self.block), generator=generator) < self.density
        layout = BlockLayout.from_mask(mask, self.shape, self.block)
        apart = 5 if self.strided else 0
        x, dy = (torch.ones(self.m, size + apart, dtype=self.dtype)[:, :size] for size in (k, n))
        return x, dy, torch.ones(layout.values_shape, dtype=self.dtype), layout


CASES = (
    Case("tails"),
    Case("one-row", m=1, bias=True),
    Case("square-blocks", block=(16, 16), bias=True, strided=True),
    Case("even", m=32, shape=(64, 96), block=(32, 32)),
    Case("split", m=3, shape=(20, 300), block=(16, 16), density=2.0, bias=True),
    Case("split-rows", m=530, shape=(17, 33), block=(16, 16), density=0.7),
    Case("inner-steps", m=5, shape=(65, 70), block=(64, 64), dtype=torch.float32, strided=True),
    Case("grouped", m=1100, shape=(33, 16), block=(16, 16), density=0.8),
    Case("sparse", block=(16, 16), density=0.1),
    Case("empty", density=0.0),
)


def check_block_kernels(cases: Iterable[Case] = CASES) -> list[Finding]:
    """Runs the forward, dX and dW of every case under all checks; needs ``TRITON_INTERPRET=1`` and TileLens.

    Returns:
        What was found; nothing, if all is well.
    """
    from fpe.kernels.block import triton as module

    return [finding for case in cases for run in runs(case, module) for finding in check(module, KERNELS, run)]


def runs(case: Case, module: Any) -> Iterator[Callable[[], Any]]:
    """The three operations of a case."""
    x, dy, values, layout = case.operands()
    bias = torch.ones(case.shape[0], dtype=case.dtype) if case.bias else None
    yield lambda: module.block_matmul_triton(x, values, layout, bias, "relu" if case.bias else None)
    yield lambda: module.block_matmul_t_triton(dy, values, layout)
    yield lambda: module.block_grad_triton(dy, x, layout)


def check(module: Any, kernels: tuple[str, ...], run: Callable[[], Any]) -> list[Finding]:
    """Runs launches twice, under the sanitizer and under the tracer.

    Args:
        module: Where the launchers find their kernels; an object with them as attributes.
        kernels: Names of the kernels in it.
        run: Makes the launches. Under the sanitizer nothing is computed: its results are not to be looked at.
    """
    from tilelens.clients import Sanitizer

    findings: list[Finding] = []

    def collect(kernel: str, sanitizer: Any) -> None:
        for r in sanitizer.records:
            line = r.user_code_tracebacks[-1].lineno if r.user_code_tracebacks else "?"
            access = r.op_type.__name__.lower()
            findings.append(Finding(kernel, "bounds", _name(r.tensor_name), f"{access} in line {line} may leave it"))

    with watching(module, kernels, lambda: Sanitizer(abort_on_error=False), collect):
        run()
    if any(finding.detail.startswith("store") for finding in findings):
        return findings  # the tracer would let it happen and take this process with it
    with tracing(module, kernels) as traces:
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
