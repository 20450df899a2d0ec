"""The partition operations on weights stored as their kept values and a bitmap; one child needs no labels.

Few rows are multiplied by tiles that a kernel reads from values and bits (:func:`_way`). Otherwise the weight is
decompressed to memory and multiplied as any other. Between forward and backward nothing is held but values and bits:
what was decompressed is decompressed again.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from ..activations import finish
from ..bitmap.backends import BACKENDS
from ..bitmap.layout import Bitmap
from ..device import device_of
from ..dispatch import EAGER, fastest_of_kept
from ..gpus import reads_kept_values
from ..library import define, implementation, save_operands
from ..model import DECOMPRESSED, KEPT_VALUES
from . import ops
from .backends import SPLIT
from .config import DIRECT_ROWS
from .labels import PackedLabels

Index = tuple[Tensor, Tensor, Tensor]
"""Of a bitmap."""
FUSED_ROWS = DIRECT_ROWS
"""Rows up to which kept values are read by the kernel that multiplies."""


def _way(
    op: str, sizes: tuple[int, int, int, int], nnz: int, operand: Tensor, labels: Tensor | None, transposed: bool,
    backend: str,
) -> str:  # fmt: skip
    """How an operation of sizes ``(m, n, k, alpha)`` obtains its weight, or stores its gradient.

    Asked for, Triton reads the kept values as it multiplies for few rows, whose cost is the weight's bytes, and
    decompresses for more; ``"auto"`` takes what is predicted to be fastest. A plain table of labels is packed in every
    call, which reads more than a decompressed weight.
    """
    m, n, k, alpha = sizes
    asked = backend == "triton" or (backend == "auto" and operand.is_cuda)
    if not asked or SPLIT["triton"].why_not(operand, alpha):
        return EAGER
    packed = labels is None or labels.dim() == 3
    if not packed or m > FUSED_ROWS or not reads_kept_values(device_of(operand).arch):
        return DECOMPRESSED
    if backend == "triton" or not nnz:
        return KEPT_VALUES
    return fastest_of_kept(op, sizes, nnz / (n * k), operand, transposed)


def _owners(labels: Tensor | None, alpha: int, kept: Bitmap) -> PackedLabels | None:
    """Labels of kept values, packed as they are stored."""
    return None if labels is None else PackedLabels(labels, kept.shape, alpha, kept.transposed)


def _bitmap(nnz: int, index: Index, n: int, k: int, transposed: bool) -> Bitmap:
    """The bitmap of a weight ``[n, k]``."""
    return Bitmap(*index, (k, n) if transposed else (n, k), nnz, transposed)


def _moved(op: str, operand: Tensor, kept: Bitmap, backend: str) -> Tensor:
    """What a bitmap operation makes of values or of a weight, in stored order."""
    wanted = backend == "triton" or (operand.is_cuda and backend != "eager")
    moves = "triton" if wanted and not BACKENDS["triton"].why_not(operand) else "eager"
    return implementation(BACKENDS[moves].module, op)(operand, kept)


def _given(
    op: str, sizes: tuple[int, int, int, int], values: Tensor, index: Index, labels: Tensor | None, transposed: bool,
    backend: str,
) -> tuple[Bitmap, Tensor | None]:  # fmt: skip
    """The bitmap of a weight, and the weight itself; none where a kernel reads the kept values."""
    kept = _bitmap(values.shape[0], index, sizes[1], sizes[2], transposed)
    if _way(op, sizes, kept.nnz, values, labels, transposed, backend) == KEPT_VALUES:
        return kept, None
    return kept, _decompressed(values, kept, backend)


def _decompressed(values: Tensor, kept: Bitmap, backend: str) -> Tensor:
    """The weight that kept values are."""
    w = _moved("unpack_values", values, kept._replace(transposed=False), backend)
    return w.T if kept.transposed else w


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    first, _, bits, starts, bases, labels, *_, ctx.transposed, _ = args
    save_operands(ctx, args, [bits, starts, bases, labels])
    ctx.alpha = result.shape[1] if result.dim() == 3 else first.shape[1]
    ctx.inputs = first.shape[-1]
    ctx.nnz = args[1].shape[0]


def _split_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, x, *index = ctx.saved_tensors
    flipped, backend = not ctx.transposed, ctx.backend
    dx = None if values is None else kept_merge(dy, values, *index, None, None, ctx.inputs, flipped, backend)
    dvalues = None if x is None else kept_grad(dy, x, *index, ctx.nnz, ctx.transposed, backend)
    return dx, dvalues, *[None] * 4, dy.sum(0) if ctx.needs_input_grad[6] else None, *[None] * 5


def _run_split(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    starts: Tensor,
    bases: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    alpha: int,
    n: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    op, (m, k) = "split_matmul", x.shape
    kept, w = _given(op, (m, n, k, alpha), values, (bits, starts, bases), labels, transposed, backend)
    if w is None:
        run = implementation(SPLIT["triton"].module, op)
        return run(x, values, _owners(labels, alpha, kept), alpha, bias, activation, kept=kept)
    if labels is None:
        return finish(linear(x, w, None if bias is None else bias[0]).unsqueeze(1), activation)
    return ops.run_split(x, w, labels, [], bias, activation, alpha, transposed, backend)


kept_split = define(
    "kept_split(Tensor x, Tensor values, Tensor bits, Tensor starts, Tensor bases, Tensor? labels, Tensor? bias, "
    "str? activation, SymInt alpha, SymInt n, bool transposed, str backend) -> Tensor",
    _run_split,
    lambda x, values, *rest: x.new_empty(x.shape[0], rest[6], rest[7]),
    _split_backward,
    _save,
)
"""``x[M, K], values[nnz] -> y[M, alpha, N]``. Its gradient is that of ``activation=None``.

With ``transposed`` bits and labels are those of ``w.T``; without labels there is one child.
"""


def _merge_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, z, *index = ctx.saved_tensors
    flipped, backend = not ctx.transposed, ctx.backend if ctx.backend in SPLIT else "auto"
    if backend == "auto" and not dy.is_cuda:
        backend = "eager"
    dz = None
    if values is not None:
        dz = kept_split(dy, values, *index, None, None, ctx.alpha, ctx.inputs, flipped, backend)
    dvalues = None if z is None else kept_grad(z, dy, *index, ctx.nnz, flipped, backend)
    return dz, dvalues, *[None] * 4, dy.sum(0) if ctx.needs_input_grad[6] else None, *[None] * 4


def _run_merge(
    z: Tensor,
    values: Tensor,
    bits: Tensor,
    starts: Tensor,
    bases: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    n: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    op, (m, alpha, k) = "merge_matmul", z.shape
    kept, w = _given(op, (m, n, k, alpha), values, (bits, starts, bases), labels, transposed, backend)
    if w is None:
        run = implementation(SPLIT["triton"].module, op)
        return run(z, values, _owners(labels, alpha, kept), bias, activation, kept=kept)
    if labels is None:
        return finish(linear(z[:, 0], w, bias), activation)
    return ops.run_merge(z, w, labels, [], bias, activation, False, transposed, backend)


kept_merge = define(
    "kept_merge(Tensor z, Tensor values, Tensor bits, Tensor starts, Tensor bases, Tensor? labels, Tensor? bias, "
    "str? activation, SymInt n, bool transposed, str backend) -> Tensor",
    _run_merge,
    lambda z, values, *rest: z.new_empty(z.shape[0], rest[6]),
    _merge_backward,
    _save,
)
"""``z[M, alpha, K], values[nnz] -> y[M, N]``. Its gradient is that of ``activation=None``."""


def _save_grad(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    dy, x, bits, starts, bases, labels, _, ctx.transposed, _ = args
    save_operands(ctx, args, [bits, starts, bases, labels])
    ctx.sizes = dy.shape[1], dy.shape[2], x.shape[1]


def _grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, *index = ctx.saved_tensors
    alpha, n, k = ctx.sizes
    ddy = None if x is None else kept_split(x, g, *index, None, None, alpha, n, ctx.transposed, ctx.backend)
    dx = None if dy is None else kept_merge(dy, g, *index, None, None, k, not ctx.transposed, ctx.backend)
    return ddy, dx, *[None] * 7


def _run_grad(
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    starts: Tensor,
    bases: Tensor,
    labels: Tensor | None,
    nnz: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    op, (m, alpha, n), k = "partition_grad", dy.shape, x.shape[1]
    kept = _bitmap(nnz, (bits, starts, bases), n, k, transposed)
    if _way(op, (m, n, k, alpha), nnz, x, labels, transposed, backend) == KEPT_VALUES:
        return implementation(SPLIT["triton"].module, op)(dy, x, _owners(labels, alpha, kept), kept=kept)
    if labels is None:
        dw = x.mT @ dy[:, 0] if transposed else dy[:, 0].mT @ x  # in stored order
    else:
        dw = ops.run_partition_grad(dy, x, labels, [], transposed, backend)
        dw = dw.T if transposed else dw
    return _moved("pack_values", dw, kept._replace(transposed=False), backend)


kept_grad = define(
    "kept_grad(Tensor dy, Tensor x, Tensor bits, Tensor starts, Tensor bases, Tensor? labels, SymInt nnz, "
    "bool transposed, str backend) -> Tensor",
    _run_grad,
    lambda dy, x, bits, starts, bases, labels, nnz, transposed, backend: x.new_empty(nnz),
    _grad_backward,
    _save_grad,
    by_rows=False,
)
"""``dy[M, alpha, N], x[M, K] -> dvalues[nnz]``."""
