"""The operations on 2-D activations: their schemas, fakes and gradients.

This module imports torch alone; an implementation is imported when it first runs. The gradients are
operations of the same family, so they differentiate again. Operations are defined on a ``Library`` rather than
by ``custom_op``, whose Python wrapper costs 80 microseconds more a call: more than a small matmul.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import flops
from .library import define


@cache
def _implementation(family: str, op: str, backend: str) -> Callable[..., Tensor]:
    return getattr(import_module(f".{family}.{backend}", __package__), f"{op}_{backend}")


def _layout(index: Sequence[Tensor], n: int, k: int, block: Sequence[int]) -> Any:
    from .block.layout import BlockLayout

    return BlockLayout((n, k), (block[0], block[1]), *index)


def _labels(labels: Tensor, transposed: bool, n: int, k: int, alpha: int) -> Any:
    """Labels of a weight ``[n, k]`` as the implementations take them; a table of bits has a third dimension."""
    if labels.dim() == 2:
        return labels.T if transposed else labels
    from .partition.labels import PackedLabels

    return PackedLabels(labels, (k, n) if transposed else (n, k), alpha, transposed)


def _partition_grad_fake(dy: Tensor, x: Tensor, labels: Tensor, transposed: bool, backend: str) -> Tensor:
    n, k = dy.shape[2], x.shape[1]
    return x.new_empty(k, n).T if transposed and labels.dim() == 3 else x.new_empty(n, k)


def _semi_structured_layout(codes: Tensor, k: int, children: int) -> Any:
    from .semi_structured.layout import SemiStructuredLayout

    return SemiStructuredLayout((codes.shape[0], k), codes, None, children)


def _at_edges(w: Tensor, labels: Tensor, transposed: bool, alpha: int) -> Tensor:
    """``w[N, K]`` with zeros where packed labels have a hole: the kernels take for granted that they are there."""
    if labels.dim() == 2:
        return w
    packed = _labels(labels, transposed, w.shape[0], w.shape[1], alpha)
    if not packed.has_holes:
        return w
    owned = (packed.unpack() < alpha).to(w.device)  # moved to the meta device alone
    return torch.where(owned, w, w.new_zeros(()))


# Autograd. Only the operands that a wanted gradient needs are saved.


def _save(ctx: Any, inputs: tuple[Any, ...], first: Tensor, second: Tensor, index: Sequence[Tensor]) -> None:
    """Saves of two multiplied operands the one that the other's gradient needs."""
    wants_first, wants_second = ctx.needs_input_grad[:2]
    ctx.save_for_backward(second if wants_first else None, first if wants_second else None, *index)
    ctx.backend = "auto" if inputs[-1].startswith("auto") else inputs[-1]  # what is saved is another tensor object


def _setup_partition(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, labels, *_, ctx.transposed, _ = inputs
    _save(ctx, inputs, first, second, [labels])
    ctx.alpha = output.shape[1] if output.dim() == 3 else first.shape[1]


def _split_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    w, x, labels = ctx.saved_tensors
    dx = None if w is None else merge_matmul(dy, w.T, labels, None, None, not ctx.transposed, ctx.backend)
    dw = None if x is None else partition_grad(dy, x, labels, ctx.transposed, ctx.backend)
    return dx, dw, None, dy.sum(0) if ctx.needs_input_grad[3] else None, None, None, None, None


def _merge_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    w, z, labels = ctx.saved_tensors
    from .partition import interleaved

    flipped, backend = not ctx.transposed, ctx.backend
    if backend in interleaved.BACKENDS:  # they multiply merged layers alone
        backend = interleaved.choose_backend("merge_matmul", "auto", dy, ctx.alpha)
    dz = None if w is None else split_matmul(dy, w.T, labels, None, None, ctx.alpha, flipped, backend)
    dw = None if z is None else partition_grad(z, dy, labels, flipped, backend).T
    return dz, dw, None, dy.sum(0) if ctx.needs_input_grad[3] else None, None, None, None


def _partition_grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, labels = ctx.saved_tensors
    g = _at_edges(g, labels, ctx.transposed, ctx.alpha)
    ddy = None if x is None else split_matmul(x, g, labels, None, None, ctx.alpha, ctx.transposed, ctx.backend)
    dx = None if dy is None else merge_matmul(dy, g.T, labels, None, None, not ctx.transposed, ctx.backend)
    return ddy, dx, None, None, None


INDEX = ("rows", "cols", "row_ptr", "col_ptr", "col_order", "col_rows", "longest_rows", "longest_cols", "panels")
"""The tensors of a block layout, which its operations take one by one: PyTorch has no batching of lists."""
_INDEX = ", ".join(f"Tensor {name}" for name in INDEX)
_NO_INDEX_GRAD = (None,) * len(INDEX)


def _setup_block(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *rest = inputs
    _save(ctx, inputs, first, second, rest[: len(INDEX)])
    ctx.sizes, ctx.block = rest[-3:-1], second.shape[1:]


def _setup_block_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, *rest = inputs
    _save(ctx, inputs, dy, x, rest[: len(INDEX)])
    ctx.sizes, ctx.block = (dy.shape[1], x.shape[1]), rest[-3:-1]


def _block_matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, x, *index = ctx.saved_tensors
    dx = None if values is None else block_matmul_t(dy, values, *index, *ctx.sizes, ctx.backend)
    dvalues = None if x is None else block_grad(dy, x, *index, *ctx.block, ctx.backend)
    dbias = dy.sum(0) if ctx.needs_input_grad[2 + len(INDEX)] else None
    return dx, dvalues, *_NO_INDEX_GRAD, dbias, None, None, None, None


def _block_matmul_t_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    values, dy, *index = ctx.saved_tensors
    ddy = None if values is None else block_matmul(g, values, *index, None, None, *ctx.sizes, ctx.backend)
    dvalues = None if dy is None else block_grad(dy, g, *index, *ctx.block, ctx.backend)
    return ddy, dvalues, *_NO_INDEX_GRAD, None, None, None


def _block_grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, *index = ctx.saved_tensors
    ddy = None if x is None else block_matmul(x, g, *index, None, None, *ctx.sizes, ctx.backend)
    dx = None if dy is None else block_matmul_t(dy, g, *index, *ctx.sizes, ctx.backend)
    return ddy, dx, *_NO_INDEX_GRAD, None, None, None


def _setup_semi_structured(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, codes, *_ = inputs
    _save(ctx, inputs, first, second, [codes])
    ctx.k = second.shape[1] if len(inputs) == 4 else inputs[-2]


def _semi_structured_matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, x, codes = ctx.saved_tensors
    dx = None if values is None else semi_structured_matmul_t(dy, values, codes, ctx.k, ctx.backend)
    dvalues = None if x is None else semi_structured_grad(dy, x, codes, ctx.backend)
    return dx, dvalues, None, dy.sum(0) if ctx.needs_input_grad[3] else None, None, None


def _semi_structured_matmul_t_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    values, dy, codes = ctx.saved_tensors
    ddy = None if values is None else semi_structured_matmul(g, values, codes, None, ctx.k, ctx.backend)
    dvalues = None if dy is None else semi_structured_grad(dy, g, codes, ctx.backend)
    return ddy, dvalues, None, None, None


def _setup_semi_structured_compress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.k, ctx.children, ctx.backend = inputs[0].shape[-1], output.shape[0], inputs[-1]


def _semi_structured_compress_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return semi_structured_expand(g, *ctx.saved_tensors, ctx.k, ctx.backend), None, None, None


def _setup_semi_structured_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.children, ctx.backend = inputs[0].shape[0], inputs[-1]


def _semi_structured_expand_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return semi_structured_compress(g, *ctx.saved_tensors, ctx.children, ctx.backend), None, None, None


def _semi_structured_grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, codes = ctx.saved_tensors
    ddy = None if x is None else semi_structured_matmul(x, g, codes, None, ctx.k, ctx.backend)
    dx = None if dy is None else semi_structured_matmul_t(dy, g, codes, ctx.k, ctx.backend)
    return ddy, dx, None, None


# The operations.


def _run_partition(op: str, backend: str, m: int, n: int, k: int, alpha: int, operand: Tensor) -> Callable[..., Tensor]:
    """The implementation of a partition operation; ``"auto"`` takes the one that is fastest at this size."""
    if backend.startswith("auto"):
        from .dispatch import ranked_here

        backend = ranked_here(op, m, n, k, alpha, operand)[0]
    return _implementation("partition", op, backend)


def _run_split(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    activation: str | None,
    alpha: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    n, k = w.shape
    run = _run_partition("split_matmul", backend, x.shape[0], n, k, alpha, w)
    return run(x, w, _labels(labels, transposed, n, k, alpha), alpha, bias, activation)


split_matmul = define(
    "split_matmul(Tensor x, Tensor w, Tensor labels, Tensor? bias, str? activation, SymInt alpha, bool transposed, "
    "str backend) -> Tensor",
    _run_split,
    lambda x, w, labels, bias, activation, alpha, transposed, backend: x.new_empty(x.shape[0], alpha, w.shape[0]),
    _split_backward,
    _setup_partition,
    tangent_of_second=lambda w, *args: _at_edges(w, labels=args[2], transposed=args[6], alpha=args[5]),
)
"""``x[M, K], w[N, K], labels -> y[M, alpha, N]``. Its gradient is that of ``activation=None``.

``labels`` are uint8 ``[N, K]``, or planes of bits; with ``transposed`` they are those of ``w.T``.
"""


def _run_merge(
    z: Tensor, w: Tensor, labels: Tensor, bias: Tensor | None, activation: str | None, transposed: bool, backend: str
) -> Tensor:
    from .partition import interleaved

    (m, alpha, k), n = z.shape, w.shape[0]
    if backend.startswith("auto"):
        from .dispatch import CONSTANT, ranked_here

        backend = next(
            name
            for name in ranked_here("merge_matmul", m, n, k, alpha, w, constant=backend == CONSTANT)
            if name not in interleaved.BACKENDS or interleaved.why_not(name, w, n, k, alpha) is None
        )
    if backend in interleaved.BACKENDS:
        return interleaved.merge_matmul_interleaved(z, w, labels, transposed, bias, activation, backend)
    run = _implementation("partition", "merge_matmul", backend)
    return run(z, w, _labels(labels, transposed, n, k, alpha), bias, activation)


merge_matmul = define(
    "merge_matmul(Tensor z, Tensor w, Tensor labels, Tensor? bias, str? activation, bool transposed, str backend) "
    "-> Tensor",
    _run_merge,
    lambda z, w, labels, bias, activation, transposed, backend: z.new_empty(z.shape[0], w.shape[0]),
    _merge_backward,
    _setup_partition,
    tangent_of_second=lambda w, z, *args: _at_edges(w, labels=args[1], transposed=args[4], alpha=z.shape[1]),
)
"""``z[M, alpha, K], w[N, K], labels -> y[M, N]``. Its gradient is that of ``activation=None``."""


def _run_partition_grad(dy: Tensor, x: Tensor, labels: Tensor, transposed: bool, backend: str) -> Tensor:
    (m, alpha, n), k = dy.shape, x.shape[1]
    run = _run_partition("partition_grad", backend, m, n, k, alpha, x)
    return run(dy, x, _labels(labels, transposed, n, k, alpha))


partition_grad = define(
    "partition_grad(Tensor dy, Tensor x, Tensor labels, bool transposed, str backend) -> Tensor",
    _run_partition_grad,
    _partition_grad_fake,
    _partition_grad_backward,
    _setup_partition,
    by_rows=False,
)
"""``dy[M, alpha, N], x[M, K], labels -> dw[N, K]``, by columns where a table of bits is transposed."""


def _run_block_matmul(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    *index, bias, activation, n, k, backend = rest
    layout = _layout(index, n, k, values.shape[1:])
    return _implementation("block", "block_matmul", backend)(x, values, layout, bias, activation)


block_matmul = define(
    f"block_matmul(Tensor x, Tensor values, {_INDEX}, Tensor? bias, str? activation, SymInt n, SymInt k, str backend) "
    "-> Tensor",
    _run_block_matmul,
    lambda x, values, *rest: x.new_empty(x.shape[0], rest[-3]),
    _block_matmul_backward,
    _setup_block,
)
"""``x[M, K], values[blocks, bn, bk] -> y[M, N]``. Its gradient is that of ``activation=None``."""


def _run_block_matmul_t(dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
    *index, n, k, backend = rest
    return _implementation("block", "block_matmul_t", backend)(dy, values, _layout(index, n, k, values.shape[1:]))


block_matmul_t = define(
    f"block_matmul_t(Tensor dy, Tensor values, {_INDEX}, SymInt n, SymInt k, str backend) -> Tensor",
    _run_block_matmul_t,
    lambda dy, values, *rest: dy.new_empty(dy.shape[0], rest[-2]),
    _block_matmul_t_backward,
    _setup_block,
)
"""``dy[M, N], values[blocks, bn, bk] -> dx[M, K]``."""


def _run_block_grad(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *index, bn, bk, backend = rest
    return _implementation("block", "block_grad", backend)(dy, x, _layout(index, dy.shape[1], x.shape[1], (bn, bk)))


block_grad = define(
    f"block_grad(Tensor dy, Tensor x, {_INDEX}, SymInt bn, SymInt bk, str backend) -> Tensor",
    _run_block_grad,
    lambda dy, x, rows, *rest: x.new_empty(rows.shape[0], *rest[-3:-1]),
    _block_grad_backward,
    _setup_block_grad,
    by_rows=False,
)
"""``dy[M, N], x[M, K] -> dvalues[blocks, bn, bk]``."""


def _run_expanded_mlp(
    x: Tensor,
    w1: Tensor,
    labels1: Tensor,
    transposed1: bool,
    w2: Tensor,
    labels2: Tensor | None,
    transposed2: bool,
    alpha: int,
    bias1: Tensor | None,
    bias2: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    hidden, k = w1.shape
    first = _labels(labels1, transposed1, hidden, k, alpha)
    second = None if labels2 is None else _labels(labels2, transposed2, w2.shape[0], hidden, alpha)
    run = _implementation("mlp", "expanded_mlp", backend)
    return run(x, w1, first, w2, second, alpha, bias1, bias2, activation)


def _expanded_mlp_composed(
    x: Tensor,
    w1: Tensor,
    labels1: Tensor,
    transposed1: bool,
    w2: Tensor,
    labels2: Tensor | None,
    transposed2: bool,
    alpha: int,
    bias1: Tensor | None,
    bias2: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    h = split_matmul(x, w1, labels1, bias1, activation, alpha, transposed1, backend)
    if labels2 is None:
        return linear(h.flatten(1), w2, bias2)
    return merge_matmul(h, w2, labels2, bias2, None, transposed2, backend)


expanded_mlp = define(
    "expanded_mlp(Tensor x, Tensor w1, Tensor labels1, bool transposed1, Tensor w2, Tensor? labels2, bool transposed2, "
    "SymInt alpha, Tensor? bias1, Tensor? bias2, str? activation, str backend) -> Tensor",
    _run_expanded_mlp,
    lambda x, w1, labels1, transposed1, w2, *rest: x.new_empty(x.shape[0], w2.shape[0]),
    composed=_expanded_mlp_composed,
)
"""``x[M, K], w1[H, K], w2[N, alpha * H] or w2[N, H] -> y[M, N]``. Where a gradient is wanted it is two operations."""


def _run_semi_structured(
    op: str, backend: str, first: Tensor, second: Tensor, layout: Any, *bias: Tensor | None
) -> Tensor:
    """Runs a semi-structured operation; ``"auto"`` takes the backend that is fastest for so many rows."""
    if backend.startswith("auto"):
        from .dispatch import CONSTANT
        from .semi_structured.backends import fastest_here

        backend = fastest_here(op, first, layout, backend == CONSTANT)
    return _implementation("semi_structured", op, backend)(first, second, layout, *bias)


semi_structured_matmul = define(
    "semi_structured_matmul(Tensor x, Tensor values, Tensor codes, Tensor? bias, SymInt k, str backend) -> Tensor",
    lambda x, values, codes, bias, k, backend: _run_semi_structured(
        "semi_structured_matmul", backend, x, values, _semi_structured_layout(codes, k, values.shape[0]), bias
    ),
    lambda x, values, codes, bias, k, backend: x.new_empty(x.shape[0], *values.shape[:2]),
    _semi_structured_matmul_backward,
    _setup_semi_structured,
)
"""``x[M, K], values[children, N, 2 * quads] -> y[M, children, N]``."""

semi_structured_matmul_t = define(
    "semi_structured_matmul_t(Tensor dy, Tensor values, Tensor codes, SymInt k, str backend) -> Tensor",
    lambda dy, values, codes, k, backend: _run_semi_structured(
        "semi_structured_matmul_t", backend, dy, values, _semi_structured_layout(codes, k, values.shape[0])
    ),
    lambda dy, values, codes, k, backend: dy.new_empty(dy.shape[0], k),
    _semi_structured_matmul_t_backward,
    _setup_semi_structured,
)
"""``dy[M, children, N], values[children, N, 2 * quads] -> dx[M, K]``."""

semi_structured_grad = define(
    "semi_structured_grad(Tensor dy, Tensor x, Tensor codes, str backend) -> Tensor",
    lambda dy, x, codes, backend: _run_semi_structured(
        "semi_structured_grad", backend, dy, x, _semi_structured_layout(codes, x.shape[1], dy.shape[1])
    ),
    lambda dy, x, codes, backend: x.new_empty(dy.shape[1], codes.shape[0], (x.shape[1] + 3) // 4 * 2),
    _semi_structured_grad_backward,
    _setup_semi_structured,
    by_rows=False,
)
"""``dy[M, children, N], x[M, K] -> dvalues[children, N, 2 * quads]``."""

semi_structured_compress = define(
    "semi_structured_compress(Tensor w, Tensor codes, SymInt children, str backend) -> Tensor",
    lambda w, codes, children, backend: _implementation("semi_structured", "semi_structured_compress", backend)(
        w, _semi_structured_layout(codes, w.shape[1], children)
    ),
    lambda w, codes, children, backend: w.new_empty(children, w.shape[0], (w.shape[1] + 3) // 4 * 2),
    _semi_structured_compress_backward,
    _setup_semi_structured_compress,
    operands=1,
    by_rows=False,
)
"""``w[N, K] -> values[children, N, 2 * quads]``."""

semi_structured_expand = define(
    "semi_structured_expand(Tensor values, Tensor codes, SymInt k, str backend) -> Tensor",
    lambda values, codes, k, backend: _implementation("semi_structured", "semi_structured_expand", backend)(
        values, _semi_structured_layout(codes, k, values.shape[0])
    ),
    lambda values, codes, k, backend: values.new_empty(values.shape[1], k),
    _semi_structured_expand_backward,
    _setup_semi_structured_expand,
    operands=1,
    by_rows=False,
)
"""``values[children, N, 2 * quads] -> w[N, K]``, the children's sum."""

flops.register()
