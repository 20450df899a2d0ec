"""The partition operations on weights stored as their kept values and a bitmap; one child needs no labels.

Few rows are multiplied by tiles that a kernel reads from values and bits (:func:`_reader`). Otherwise the weight is
decompressed to memory and multiplied as any other. Between forward and backward nothing is held but values and bits:
what was decompressed is decompressed again.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from ..activations import finish
from ..bitmap.backends import BACKENDS
from ..bitmap.existence import Index, Kept, existing
from ..device import device_of
from ..dispatch import AUTO_ON_CPU, fastest_of_kept, fastest_on_cpu
from ..gpus import reads_kept_values
from ..library import define, implementation, save_operands
from ..model import KEPT_VALUES
from . import ops
from .backends import SPLIT
from .config import DIRECT_ROWS
from .labels import PackedLabels
from .seeded import SeededLabels

FUSED_ROWS = DIRECT_ROWS
"""Rows up to which kept values are read by the kernel that multiplies."""


def _reader(
    op: str,
    sizes: tuple[int, int, int, int],
    nnz: int,
    operand: Tensor,
    labels: Tensor | None,
    bits: Tensor | None,
    transposed: bool,
    backend: str,
) -> str | None:
    """The backend whose kernel reads the kept values as it multiplies; none where the weight is decompressed.

    The CPU kernels read kept values of a bitmap in both products, not in ``partition_grad``. The Triton kernels read
    them for few rows, whose cost is the weight's bytes; ``"auto"`` takes them where they are predicted to be faster
    than decompressing. With a plain table of labels the weight is decompressed: the table is packed in every call,
    which reads more than the decompressed weight. With holes of a seed ``"auto"`` decompresses, because computing the
    words of bits takes many more instructions than loading them.

    Args:
        op: ``"split_matmul"``, ``"merge_matmul"`` or ``"partition_grad"``.
        sizes: ``(m, n, k, alpha)``.
        nnz: Number of kept values.
        operand: A tensor of the call: its device and dtype decide.
        labels: A table, planes of bits, or none.
        bits: Of a bitmap; none of holes of a seed.
        transposed: Whether the weight is stored as its transpose.
        backend: As the operation was given it.
    """
    m, n, k, alpha = sizes
    packed = labels is None or labels.dim() == 3
    if backend == AUTO_ON_CPU:
        density = nnz / max(n * k, 1) if packed and bits is not None else None
        backend = fastest_on_cpu(op, sizes, operand, SPLIT, alpha, density=density)
    if backend == "cpu":
        return "cpu" if packed and bits is not None and op != "partition_grad" else None
    able = backend == "triton" or (backend == "auto" and operand.is_cuda)
    if not (able and packed and m <= FUSED_ROWS) or SPLIT["triton"].why_not(operand, alpha):
        return None
    if not reads_kept_values(device_of(operand).arch):
        return None
    if backend == "triton" or not nnz:
        return "triton"
    if bits is None:
        return None
    return "triton" if fastest_of_kept(op, sizes, nnz / (n * k), operand, transposed) == KEPT_VALUES else None


def _owners(labels: Tensor | None, seed: ops.Seed, alpha: int, kept: Kept) -> PackedLabels | SeededLabels | None:
    """Returns the labels of kept values, packed as they are stored or of a seed; an only child has none."""
    if labels is None and not seed:
        return None
    made = ops.as_labels(labels, (seed or ())[:3], kept.transposed, *kept.sizes, alpha)
    assert not isinstance(made, Tensor)
    return made


def _existing(nnz: int, index: Index, seed: ops.Seed, n: int, k: int, transposed: bool) -> Kept:
    """Which entries of a weight ``[n, k]`` exist; of holes the fourth number of ``seed`` says how many a row keeps."""
    return existing(index, (seed or ())[::3], (k, n) if transposed else (n, k), nnz, transposed)


def _moved(op: str, operand: Tensor, kept: Kept, backend: str) -> Tensor:
    """What ``unpack_values`` or ``pack_values`` makes of values or of a weight, in stored order."""
    wanted = backend == "triton" or (operand.is_cuda and backend != "eager")
    moves = "triton" if wanted and not BACKENDS["triton"].why_not(operand) else "eager"
    return implementation(BACKENDS[moves].module, op)(operand, kept)


def _given(
    op: str,
    sizes: tuple[int, int, int, int],
    values: Tensor,
    index: Index,
    labels: Tensor | None,
    seed: ops.Seed,
    transposed: bool,
    backend: str,
) -> tuple[Kept, str, Tensor | None]:
    """Returns which entries exist, the backend that reads kept values and, where there is none, the whole weight."""
    kept = _existing(values.shape[0], index, seed, sizes[1], sizes[2], transposed)
    reader = _reader(op, sizes, kept.nnz, values, labels, index[0], transposed, backend)
    return kept, reader or "", None if reader else _decompressed(values, kept, backend)


def _decompressed(values: Tensor, kept: Kept, backend: str) -> Tensor:
    """Returns the weight that the kept values stand for."""
    w = _moved("unpack_values", values, kept._replace(transposed=False), backend)
    return w.T if kept.transposed else w


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    first, _, bits, starts, bases, labels, ctx.seed, *_, ctx.transposed, _ = args
    save_operands(ctx, args, [bits, starts, bases, labels])
    ctx.alpha = result.shape[1] if result.dim() == 3 else first.shape[1]
    ctx.inputs = first.shape[-1]
    ctx.nnz = args[1].shape[0]


def _split_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, x, *index = ctx.saved_tensors
    flipped, backend = not ctx.transposed, ctx.backend
    dx = None if values is None else kept_merge(dy, values, *index, ctx.seed, None, None, ctx.inputs, flipped, backend)
    dvalues = None if x is None else kept_grad(dy, x, *index, ctx.seed, ctx.nnz, ctx.transposed, backend)
    return dx, dvalues, *[None] * 5, dy.sum(0) if ctx.needs_input_grad[7] else None, *[None] * 5


def _run_split(
    x: Tensor,
    values: Tensor,
    bits: Tensor | None,
    starts: Tensor | None,
    bases: Tensor | None,
    labels: Tensor | None,
    seed: ops.Seed,
    bias: Tensor | None,
    activation: str | None,
    alpha: int,
    n: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    op, (m, k) = "split_matmul", x.shape
    kept, reader, w = _given(op, (m, n, k, alpha), values, (bits, starts, bases), labels, seed, transposed, backend)
    if w is None:
        owners = _owners(labels, seed, alpha, kept)
        return implementation(SPLIT[reader].module, op)(x, values, owners, alpha, bias, activation, kept=kept)
    if labels is None and not seed:
        return finish(linear(x, w, None if bias is None else bias[0]).unsqueeze(1), activation)
    return ops.run_split(x, w, labels, (seed or ())[:3], bias, activation, alpha, transposed, backend)


kept_split = define(
    "kept_split(Tensor x, Tensor values, Tensor? bits, Tensor? starts, Tensor? bases, Tensor? labels, int[]? seed, "
    "Tensor? bias, str? activation, SymInt alpha, SymInt n, bool transposed, str backend) -> Tensor",
    _run_split,
    lambda x, values, *rest: x.new_empty(x.shape[0], rest[7], rest[8]),
    _split_backward,
    _save,
)
"""``x[M, K], values[nnz] -> y[M, alpha, N]``. Its gradient is that of ``activation=None``.

With ``transposed`` bits and labels are those of ``w.T``. Without a table labels are of a ``seed``, behind which stand
the row and the column at which the weight begins; without both there is one child. Without ``bits`` holes are of the
same seed, and a fourth number says how many entries a row keeps.
"""


def _merge_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, z, *index = ctx.saved_tensors
    flipped, backend = not ctx.transposed, ctx.backend if ctx.backend in SPLIT else "auto"
    if backend == "auto" and not dy.is_cuda:
        backend = "eager"
    dz = None
    if values is not None:
        dz = kept_split(dy, values, *index, ctx.seed, None, None, ctx.alpha, ctx.inputs, flipped, backend)
    dvalues = None if z is None else kept_grad(z, dy, *index, ctx.seed, ctx.nnz, flipped, backend)
    return dz, dvalues, *[None] * 5, dy.sum(0) if ctx.needs_input_grad[7] else None, *[None] * 4


def _run_merge(
    z: Tensor,
    values: Tensor,
    bits: Tensor | None,
    starts: Tensor | None,
    bases: Tensor | None,
    labels: Tensor | None,
    seed: ops.Seed,
    bias: Tensor | None,
    activation: str | None,
    n: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    op, (m, alpha, k) = "merge_matmul", z.shape
    kept, reader, w = _given(op, (m, n, k, alpha), values, (bits, starts, bases), labels, seed, transposed, backend)
    if w is None:
        owners = _owners(labels, seed, alpha, kept)
        return implementation(SPLIT[reader].module, op)(z, values, owners, bias, activation, kept=kept)
    if labels is None and not seed:
        return finish(linear(z[:, 0], w, bias), activation)
    return ops.run_merge(z, w, labels, (seed or ())[:3], bias, activation, False, transposed, backend)


kept_merge = define(
    "kept_merge(Tensor z, Tensor values, Tensor? bits, Tensor? starts, Tensor? bases, Tensor? labels, int[]? seed, "
    "Tensor? bias, str? activation, SymInt n, bool transposed, str backend) -> Tensor",
    _run_merge,
    lambda z, values, *rest: z.new_empty(z.shape[0], rest[7]),
    _merge_backward,
    _save,
)
"""``z[M, alpha, K], values[nnz] -> y[M, N]``. Its gradient is that of ``activation=None``."""


def _save_grad(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    dy, x, bits, starts, bases, labels, ctx.seed, _, ctx.transposed, _ = args
    save_operands(ctx, args, [bits, starts, bases, labels])
    ctx.sizes = dy.shape[1], dy.shape[2], x.shape[1]


def _grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, *index = ctx.saved_tensors
    alpha, n, k = ctx.sizes
    ddy = None if x is None else kept_split(x, g, *index, ctx.seed, None, None, alpha, n, ctx.transposed, ctx.backend)
    dx = None if dy is None else kept_merge(dy, g, *index, ctx.seed, None, None, k, not ctx.transposed, ctx.backend)
    return ddy, dx, *[None] * 8


def _run_grad(
    dy: Tensor,
    x: Tensor,
    bits: Tensor | None,
    starts: Tensor | None,
    bases: Tensor | None,
    labels: Tensor | None,
    seed: ops.Seed,
    nnz: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    op, (m, alpha, n), k = "partition_grad", dy.shape, x.shape[1]
    kept = _existing(nnz, (bits, starts, bases), seed, n, k, transposed)
    reader = _reader(op, (m, n, k, alpha), nnz, x, labels, bits, transposed, backend)
    if reader:
        return implementation(SPLIT[reader].module, op)(dy, x, _owners(labels, seed, alpha, kept), kept=kept)
    if labels is None and not seed:
        dw = x.mT @ dy[:, 0] if transposed else dy[:, 0].mT @ x  # in stored order
    else:
        dw = ops.run_partition_grad(dy, x, labels, (seed or ())[:3], transposed, backend)
        dw = dw.T if transposed else dw
    return _moved("pack_values", dw, kept._replace(transposed=False), backend)


kept_grad = define(
    "kept_grad(Tensor dy, Tensor x, Tensor? bits, Tensor? starts, Tensor? bases, Tensor? labels, int[]? seed, "
    "SymInt nnz, bool transposed, str backend) -> Tensor",
    _run_grad,
    lambda dy, x, bits, starts, bases, labels, seed, nnz, transposed, backend: x.new_empty(nnz),
    _grad_backward,
    _save_grad,
    by_rows=False,
)
"""``dy[M, alpha, N], x[M, K] -> dvalues[nnz]``."""
