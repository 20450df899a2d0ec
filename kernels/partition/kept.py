"""The partition operations on weights stored as their kept values and a bitmap; one child needs no labels.

Few rows are multiplied by tiles that a kernel reads from values and bits (:func:`_reader`). Otherwise the weight is
decompressed to memory and multiplied as any other. Between forward and backward nothing is held but values and bits:
what was decompressed is decompressed again.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from ..activations import finish
from ..bitmap.backends import BACKENDS
from ..bitmap.layout import Bitmap
from ..device import device_of
from ..dispatch import AUTO_ON_CPU, fastest_on_cpu
from ..library import define, implementation, save_operands
from . import ops
from .backends import SPLIT
from .config import DIRECT_ROWS
from .holes import BACKENDS as OF_A_SEED
from .holes import SeededHoles
from .labels import PackedLabels
from .seeded import SeededLabels

FUSED_ROWS = DIRECT_ROWS
"""Rows up to which kept values are read by the kernel that multiplies."""


def _reader(
    op: str, sizes: tuple[int, int, int, int], operand: Tensor, labels: Tensor | None, bits: Tensor | None, backend: str
) -> str | None:
    """The backend whose kernel reads the kept values as it multiplies; none where the weight is decompressed.

    Those of CPUs do wherever they run. Those of Triton do for few rows, whose cost is the weight's bytes. A plain table
    of labels is packed in every call, which reads more than a decompressed weight. No kernel reads through holes of a
    seed. What Triton 3.7.1 compiles for ``tcgen05.mma`` lacks a fence between the gathered values and the product, as
    the lab finds; its cause is not known, and weights are decompressed there.
    """
    m, n, k, alpha = sizes
    packed = bits is not None and (labels is None or labels.dim() == 3)
    if backend == AUTO_ON_CPU:
        density = operand.numel() / max(n * k, 1) if packed else None
        backend = fastest_on_cpu(op, sizes, operand, SPLIT, alpha, density=density)
    if backend == "cpu":
        return "cpu" if packed and op != "partition_grad" else None
    able = backend == "triton" or (backend == "auto" and operand.is_cuda)
    if not (able and packed and m <= FUSED_ROWS) or SPLIT["triton"].why_not(operand, alpha):
        return None
    return "triton" if device_of(operand).matrix != "tcgen05.mma" else None


def _owners(
    labels: Tensor | None, seed: Sequence[int], alpha: int, kept: Bitmap | SeededHoles
) -> PackedLabels | SeededLabels | None:
    """Labels of kept values, packed as they are stored or of a seed; none of an only child."""
    if labels is None and not seed:
        return None
    made = ops.as_labels(labels, seed[:3], kept.transposed, *kept.sizes, alpha)
    assert not isinstance(made, Tensor)
    return made


def _existing(
    values: int, bits: Tensor | None, starts: Tensor | None, seed: Sequence[int], n: int, k: int, transposed: bool
) -> Bitmap | SeededHoles:
    """Which entries of a weight ``[n, k]`` exist."""
    shape = (k, n) if transposed else (n, k)
    if bits is None:
        return SeededHoles(seed[0], shape, seed[3], transposed)
    assert starts is not None
    return Bitmap(bits, starts, shape, values, transposed)


def _moved(op: str, operand: Tensor, kept: Bitmap | SeededHoles, backend: str) -> Tensor:
    """What a bitmap operation makes of values or of a weight, in stored order."""
    backends = BACKENDS if isinstance(kept, Bitmap) else OF_A_SEED
    wanted = backend == "triton" or (operand.is_cuda and backend != "eager")
    moves = "triton" if wanted and not backends["triton"].why_not(operand) else "eager"
    return implementation(backends[moves].module, op)(operand, kept)


def _weight(values: Tensor, kept: Bitmap | SeededHoles, transposed: bool, backend: str) -> Tensor:
    """The weight that is meant."""
    w = _moved("unpack_values", values, kept._replace(transposed=False), backend)
    return w.T if transposed else w


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    first, _, bits, starts, labels, ctx.seed, *_, ctx.transposed, _ = args
    save_operands(ctx, args, [bits, starts, labels])
    ctx.alpha = result.shape[1] if result.dim() == 3 else first.shape[1]
    ctx.inputs = first.shape[-1]
    ctx.nnz = args[1].shape[0]


def _split_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, x, *index = ctx.saved_tensors
    flipped, backend = not ctx.transposed, ctx.backend
    dx = None if values is None else kept_merge(dy, values, *index, ctx.seed, None, None, ctx.inputs, flipped, backend)
    dvalues = None if x is None else kept_grad(dy, x, *index, ctx.seed, ctx.nnz, ctx.transposed, backend)
    return dx, dvalues, *[None] * 4, dy.sum(0) if ctx.needs_input_grad[6] else None, *[None] * 5


def _run_split(
    x: Tensor,
    values: Tensor,
    bits: Tensor | None,
    starts: Tensor | None,
    labels: Tensor | None,
    seed: Sequence[int],
    bias: Tensor | None,
    activation: str | None,
    alpha: int,
    n: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    kept = _existing(values.shape[0], bits, starts, seed, n, x.shape[1], transposed)
    reader = _reader("split_matmul", (x.shape[0], n, x.shape[1], alpha), values, labels, bits, backend)
    if reader:
        run = implementation(SPLIT[reader].module, "split_matmul")
        return run(x, values, _owners(labels, seed, alpha, kept), alpha, bias, activation, kept=kept)
    w = _weight(values, kept, transposed, backend)
    if labels is None and not seed:
        return finish(linear(x, w, None if bias is None else bias[0]).unsqueeze(1), activation)
    return ops.run_split(x, w, labels, seed[:3], bias, activation, alpha, transposed, backend)


kept_split = define(
    "kept_split(Tensor x, Tensor values, Tensor? bits, Tensor? starts, Tensor? labels, int[] seed, Tensor? bias, "
    "str? activation, SymInt alpha, SymInt n, bool transposed, str backend) -> Tensor",
    _run_split,
    lambda x, values, *rest: x.new_empty(x.shape[0], rest[6], rest[7]),
    _split_backward,
    _save,
)
"""``x[M, K], values[nnz] -> y[M, alpha, N]``. Its gradient is that of ``activation=None``.

With ``transposed`` bits and labels are those of ``w.T``. Without a table labels are of a ``seed``, which stands beside
the row and the column at which the weight begins; without either there is one child. Without ``bits`` holes are of the
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
    return dz, dvalues, *[None] * 4, dy.sum(0) if ctx.needs_input_grad[6] else None, *[None] * 4


def _run_merge(
    z: Tensor,
    values: Tensor,
    bits: Tensor | None,
    starts: Tensor | None,
    labels: Tensor | None,
    seed: Sequence[int],
    bias: Tensor | None,
    activation: str | None,
    n: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    kept = _existing(values.shape[0], bits, starts, seed, n, z.shape[2], transposed)
    reader = _reader("merge_matmul", (z.shape[0], n, z.shape[2], z.shape[1]), values, labels, bits, backend)
    if reader:
        run = implementation(SPLIT[reader].module, "merge_matmul")
        return run(z, values, _owners(labels, seed, z.shape[1], kept), bias, activation, kept=kept)
    w = _weight(values, kept, transposed, backend)
    if labels is None and not seed:
        return finish(linear(z[:, 0], w, bias), activation)
    return ops.run_merge(z, w, labels, seed[:3], bias, activation, False, transposed, backend)


kept_merge = define(
    "kept_merge(Tensor z, Tensor values, Tensor? bits, Tensor? starts, Tensor? labels, int[] seed, Tensor? bias, "
    "str? activation, SymInt n, bool transposed, str backend) -> Tensor",
    _run_merge,
    lambda z, values, *rest: z.new_empty(z.shape[0], rest[6]),
    _merge_backward,
    _save,
)
"""``z[M, alpha, K], values[nnz] -> y[M, N]``. Its gradient is that of ``activation=None``."""


def _save_grad(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    dy, x, bits, starts, labels, ctx.seed, _, ctx.transposed, _ = args
    save_operands(ctx, args, [bits, starts, labels])
    ctx.sizes = dy.shape[1], dy.shape[2], x.shape[1]


def _grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, *index = ctx.saved_tensors
    alpha, n, k = ctx.sizes
    ddy = None if x is None else kept_split(x, g, *index, ctx.seed, None, None, alpha, n, ctx.transposed, ctx.backend)
    dx = None if dy is None else kept_merge(dy, g, *index, ctx.seed, None, None, k, not ctx.transposed, ctx.backend)
    return ddy, dx, *[None] * 7


def _run_grad(
    dy: Tensor,
    x: Tensor,
    bits: Tensor | None,
    starts: Tensor | None,
    labels: Tensor | None,
    seed: Sequence[int],
    nnz: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    alpha = dy.shape[1]
    kept = _existing(nnz, bits, starts, seed, dy.shape[2], x.shape[1], transposed)
    reader = _reader("partition_grad", (x.shape[0], dy.shape[2], x.shape[1], alpha), x, labels, bits, backend)
    if reader:
        owners = _owners(labels, seed, alpha, kept)
        return implementation(SPLIT[reader].module, "partition_grad")(dy, x, owners, kept=kept)
    if labels is None and not seed:
        dw = x.mT @ dy[:, 0] if transposed else dy[:, 0].mT @ x  # in stored order
    else:
        dw = ops.run_partition_grad(dy, x, labels, seed[:3], transposed, backend)
        dw = dw.T if transposed else dw
    return _moved("pack_values", dw, kept._replace(transposed=False), backend)


kept_grad = define(
    "kept_grad(Tensor dy, Tensor x, Tensor? bits, Tensor? starts, Tensor? labels, int[] seed, SymInt nnz, "
    "bool transposed, str backend) -> Tensor",
    _run_grad,
    lambda dy, x, bits, starts, labels, seed, nnz, transposed, backend: x.new_empty(nnz),
    _grad_backward,
    _save_grad,
    by_rows=False,
)
"""``dy[M, alpha, N], x[M, K] -> dvalues[nnz]``."""
