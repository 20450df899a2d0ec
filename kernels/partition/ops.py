"""The partition operations on 2-D activations: their schemas, fakes and gradients, operations of the family."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import AUTO_ON_CPU, Backend, fastest, fastest_on_cpu
from ..library import define, implementation, save_operands
from ..structures import RANDOM, SEEDED
from .backends import MERGE, SPLIT, SPLIT_OF_SEED
from .eager import Labels
from .labels import PackedLabels
from .seeded import SeededLabels

Seed = Sequence[int] | None
"""A seed, and the row and the column at which the weight begins. Without a seed it is empty, or none in AOTInductor."""


def as_labels(labels: Tensor | None, seed: Seed, transposed: bool, n: int, k: int, alpha: int) -> Labels:
    """Labels of a weight ``[n, k]`` as the implementations take them; a table of bits has a third dimension.

    Without a table they are of a seed, which stands beside the row and the column at which the weight begins.
    """
    if labels is None:
        assert seed
        number, row, column = seed
        return SeededLabels(number, (k, n) if transposed else (n, k), alpha, (row, column), transposed)
    if labels.dim() == 2:
        return labels.T if transposed else labels
    return PackedLabels(labels, (k, n) if transposed else (n, k), alpha, transposed)


def _at_edges(w: Tensor, labels: Tensor | None, transposed: bool, alpha: int) -> Tensor:
    """``w[N, K]`` with zeros where packed labels have a hole: the kernels rely on these zeros."""
    if labels is None or labels.dim() == 2:
        return w
    packed = as_labels(labels, (), transposed, w.shape[0], w.shape[1], alpha)
    assert isinstance(packed, PackedLabels)
    if not packed.has_holes:
        return w
    owned = (packed.unpack() < alpha).to(w.device)  # moved to the meta device alone
    return torch.where(owned, w, w.new_zeros(()))


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    first, _, labels, ctx.seed, *_, ctx.transposed, _ = args
    save_operands(ctx, args, [labels])
    ctx.alpha = result.shape[1] if result.dim() == 3 else first.shape[1]


def _implementation(
    op: str,
    backends: Mapping[str, Backend],
    backend: str,
    sizes: tuple[int, int, int, int],
    operand: Tensor,
    constant: bool = True,
    transposed: bool = False,
    seeded: bool = False,
) -> Callable[..., Tensor]:
    """What runs an operation of sizes ``(m, n, k, alpha)``; ``"auto"`` takes what is fastest there."""
    if backend == AUTO_ON_CPU:
        backend = fastest_on_cpu(op, sizes, operand, backends, sizes[-1])
    if backend == "auto":
        structure = SEEDED if seeded else RANDOM
        backends = SPLIT if seeded else backends
        backend = fastest(
            op, sizes, operand, backends, sizes[-1], structure=structure, constant=constant, transposed=transposed
        )
    return implementation(backends[backend].module, op)


def _split_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (w, x, labels), backend = ctx.saved_tensors, ctx.backend
    if backend in SPLIT_OF_SEED and backend not in SPLIT:
        backend = "auto" if dy.is_cuda else "eager"
    dx = None if w is None else merge_matmul(dy, w.T, labels, ctx.seed, None, None, False, not ctx.transposed, backend)
    dw = None if x is None else partition_grad(dy, x, labels, ctx.seed, ctx.transposed, backend)
    return dx, dw, None, None, dy.sum(0) if ctx.needs_input_grad[4] else None, None, None, None, None


def run_split(
    x: Tensor,
    w: Tensor,
    labels: Tensor | None,
    seed: Seed,
    bias: Tensor | None,
    activation: str | None,
    alpha: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    """``split_matmul`` on plain tensors."""
    (n, k), seeded = w.shape, labels is None
    backends, sizes = SPLIT_OF_SEED if seeded else SPLIT, (x.shape[0], n, k, alpha)
    run = _implementation("split_matmul", backends, backend, sizes, w, True, transposed, seeded)
    return run(x, w, as_labels(labels, seed, transposed, n, k, alpha), alpha, bias, activation)


split_matmul = define(
    "split_matmul(Tensor x, Tensor w, Tensor? labels, int[]? seed, Tensor? bias, str? activation, SymInt alpha, "
    "bool transposed, str backend) -> Tensor",
    run_split,
    lambda x, w, labels, seed, bias, activation, alpha, *rest: x.new_empty(x.shape[0], alpha, w.shape[0]),
    _split_backward,
    _save,
    tangent_of_second=lambda w, *args: _at_edges(w, labels=args[2], transposed=args[7], alpha=args[6]),
)
"""``x[M, K], w[N, K], labels -> y[M, alpha, N]``. Its gradient is that of ``activation=None``.

``labels`` are uint8 ``[N, K]``, or planes of bits, or none: then ``seed`` is a seed and where the weight begins. With
``transposed`` they are those of ``w.T``.
"""


def _merge_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    w, z, labels = ctx.saved_tensors
    flipped, backend = not ctx.transposed, ctx.backend if ctx.backend in SPLIT else "auto"
    if backend == "auto" and not dy.is_cuda:
        backend = "eager"
    dz = None if w is None else split_matmul(dy, w.T, labels, ctx.seed, None, None, ctx.alpha, flipped, backend)
    dw = None if z is None else partition_grad(z, dy, labels, ctx.seed, flipped, backend).T
    return dz, dw, None, None, dy.sum(0) if ctx.needs_input_grad[4] else None, None, None, None, None


def run_merge(
    z: Tensor,
    w: Tensor,
    labels: Tensor | None,
    seed: Seed,
    bias: Tensor | None,
    activation: str | None,
    constant: bool,
    transposed: bool,
    backend: str,
) -> Tensor:
    """``merge_matmul`` on plain tensors."""
    (m, alpha, k), n = z.shape, w.shape[0]
    sizes, seeded = (m, n, k, alpha), labels is None
    run = _implementation("merge_matmul", MERGE, backend, sizes, w, constant, transposed, seeded)
    return run(z, w, as_labels(labels, seed, transposed, n, k, alpha), bias, activation)


merge_matmul = define(
    "merge_matmul(Tensor z, Tensor w, Tensor? labels, int[]? seed, Tensor? bias, str? activation, bool constant, "
    "bool transposed, str backend) -> Tensor",
    run_merge,
    lambda z, w, *rest: z.new_empty(z.shape[0], w.shape[0]),
    _merge_backward,
    _save,
    tangent_of_second=lambda w, z, *args: _at_edges(w, labels=args[1], transposed=args[6], alpha=z.shape[1]),
)
"""``z[M, alpha, K], w[N, K], labels -> y[M, N]``. Its gradient is that of ``activation=None``.

``constant``: whether the weights stay from call to call, so that ``"auto"`` may count on what is kept of them.
"""


def _partition_grad_fake(
    dy: Tensor, x: Tensor, labels: Tensor | None, seed: Seed, transposed: bool, backend: str
) -> Tensor:
    n, k = dy.shape[2], x.shape[1]
    return x.new_empty(k, n).T if transposed and (labels is None or labels.dim() == 3) else x.new_empty(n, k)


def _partition_grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, labels = ctx.saved_tensors
    g = _at_edges(g, labels, ctx.transposed, ctx.alpha)
    ddy = (
        None if x is None else split_matmul(x, g, labels, ctx.seed, None, None, ctx.alpha, ctx.transposed, ctx.backend)
    )
    dx = (
        None
        if dy is None
        else merge_matmul(dy, g.T, labels, ctx.seed, None, None, False, not ctx.transposed, ctx.backend)
    )
    return ddy, dx, None, None, None, None


def run_partition_grad(
    dy: Tensor, x: Tensor, labels: Tensor | None, seed: Seed, transposed: bool, backend: str
) -> Tensor:
    """``partition_grad`` on plain tensors."""
    (m, alpha, n), k = dy.shape, x.shape[1]
    run = _implementation("partition_grad", SPLIT, backend, (m, n, k, alpha), x, seeded=labels is None)
    return run(dy, x, as_labels(labels, seed, transposed, n, k, alpha))


partition_grad = define(
    "partition_grad(Tensor dy, Tensor x, Tensor? labels, int[]? seed, bool transposed, str backend) -> Tensor",
    run_partition_grad,
    _partition_grad_fake,
    _partition_grad_backward,
    _save,
    by_rows=False,
)
"""``dy[M, alpha, N], x[M, K], labels -> dw[N, K]``, by columns where packed or seeded labels are transposed."""
