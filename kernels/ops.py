"""``torch.library`` schemas, fakes and autograd of every operation, on 2-D activations.

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

Index = list[Tensor]

_LIBRARY = torch.library.Library("fpe", "DEF")


def _define(
    schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor], backward: Callable, save: Callable
) -> Callable[..., Tensor]:
    """Registers an operation with its shape inference and gradient; returns it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fpe::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"fpe::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.fpe, name).default


@cache
def _implementation(family: str, op: str, backend: str) -> Callable[..., Tensor]:
    return getattr(import_module(f".{family}.{backend}", __package__), f"{op}_{backend}")


def _layout(index: Index, n: int, k: int, block: Sequence[int]) -> Any:
    from .block.layout import BlockLayout

    return BlockLayout((n, k), (block[0], block[1]), *index)


def _semi_structured_layout(codes: Tensor, k: int, children: int) -> Any:
    from .semi_structured.layout import SemiStructuredLayout

    return SemiStructuredLayout((codes.shape[0], k), codes, None, children)


# Autograd. Only the operands that a wanted gradient needs are saved.


def _save(ctx: Any, inputs: tuple[Any, ...], first: Tensor, second: Tensor, index: Index) -> None:
    """Saves of two multiplied operands the one that the other's gradient needs."""
    wants_first, wants_second = ctx.needs_input_grad[:2]
    ctx.save_for_backward(second if wants_first else None, first if wants_second else None, *index)
    ctx.backend = inputs[-1]


def _setup_partition(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, inputs[0], inputs[1], [inputs[2]])
    ctx.alpha = output.shape[1] if output.dim() == 3 else inputs[0].shape[1]


def _split_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    w, x, labels = ctx.saved_tensors
    dx = None if w is None else merge_matmul(dy, w.T, labels.T, ctx.backend)
    dw = None if x is None else partition_grad(dy, x, labels, ctx.backend)
    return dx, dw, None, None, None


def _merge_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    w, z, labels = ctx.saved_tensors
    dz = None if w is None else split_matmul(dy, w.T, labels.T, ctx.alpha, ctx.backend)
    dw = None if z is None else partition_grad(z, dy, labels.T, ctx.backend).T
    return dz, dw, None, None


def _partition_grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, labels = ctx.saved_tensors
    ddy = None if x is None else split_matmul(x, g, labels, ctx.alpha, ctx.backend)
    dx = None if dy is None else merge_matmul(dy, g.T, labels.T, ctx.backend)
    return ddy, dx, None, None


NO_INDEX_GRAD = ([None] * 9, None, None, None)  # the index tensors, two sizes and the backend


def _setup_block(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, index, *_, n, k, _ = inputs
    _save(ctx, inputs, first, second, index)
    ctx.sizes, ctx.block = (n, k), second.shape[1:]


def _setup_block_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, index, *block, _ = inputs
    _save(ctx, inputs, dy, x, index)
    ctx.sizes, ctx.block = (dy.shape[1], x.shape[1]), block


def _block_matmul_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    values, x, *index = ctx.saved_tensors
    dx = None if values is None else block_matmul_t(dy, values, index, *ctx.sizes, ctx.backend)
    dvalues = None if x is None else block_grad(dy, x, index, *ctx.block, ctx.backend)
    index_grad, *rest = NO_INDEX_GRAD
    return dx, dvalues, index_grad, dy.sum(0) if ctx.needs_input_grad[3] else None, None, *rest


def _block_matmul_t_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    values, dy, *index = ctx.saved_tensors
    ddy = None if values is None else block_matmul(g, values, index, None, None, *ctx.sizes, ctx.backend)
    dvalues = None if dy is None else block_grad(dy, g, index, *ctx.block, ctx.backend)
    return ddy, dvalues, *NO_INDEX_GRAD


def _block_grad_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, dy, *index = ctx.saved_tensors
    ddy = None if x is None else block_matmul(x, g, index, None, None, *ctx.sizes, ctx.backend)
    dx = None if dy is None else block_matmul_t(dy, g, index, *ctx.sizes, ctx.backend)
    return ddy, dx, *NO_INDEX_GRAD


def _setup_semi_structured(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, codes, *_ = inputs
    _save(ctx, inputs, first, second, [codes])
    ctx.k = inputs[3] if len(inputs) == 5 else second.shape[1]


def _semi_structured_matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, x, codes = ctx.saved_tensors
    dx = None if values is None else semi_structured_matmul_t(dy, values, codes, ctx.k, ctx.backend)
    dvalues = None if x is None else semi_structured_grad(dy, x, codes, ctx.backend)
    return dx, dvalues, None, None, None


def _semi_structured_matmul_t_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    values, dy, codes = ctx.saved_tensors
    ddy = None if values is None else semi_structured_matmul(g, values, codes, ctx.k, ctx.backend)
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
    ddy = None if x is None else semi_structured_matmul(x, g, codes, ctx.k, ctx.backend)
    dx = None if dy is None else semi_structured_matmul_t(dy, g, codes, ctx.k, ctx.backend)
    return ddy, dx, None, None


# The operations.

split_matmul = _define(
    "split_matmul(Tensor x, Tensor w, Tensor labels, SymInt alpha, str backend) -> Tensor",
    lambda x, w, labels, alpha, backend: _implementation("partition", "split_matmul", backend)(x, w, labels, alpha),
    lambda x, w, labels, alpha, backend: x.new_empty(x.shape[0], alpha, w.shape[0]),
    _split_backward,
    _setup_partition,
)
"""``x[M, K], w[N, K], labels[N, K] -> y[M, alpha, N]``."""

merge_matmul = _define(
    "merge_matmul(Tensor z, Tensor w, Tensor labels, str backend) -> Tensor",
    lambda z, w, labels, backend: _implementation("partition", "merge_matmul", backend)(z, w, labels),
    lambda z, w, labels, backend: z.new_empty(z.shape[0], w.shape[0]),
    _merge_backward,
    _setup_partition,
)
"""``z[M, alpha, K], w[N, K], labels[N, K] -> y[M, N]``."""

partition_grad = _define(
    "partition_grad(Tensor dy, Tensor x, Tensor labels, str backend) -> Tensor",
    lambda dy, x, labels, backend: _implementation("partition", "partition_grad", backend)(dy, x, labels),
    lambda dy, x, labels, backend: x.new_empty(labels.shape),
    _partition_grad_backward,
    _setup_partition,
)
"""``dy[M, alpha, N], x[M, K], labels[N, K] -> dw[N, K]``."""

block_matmul = _define(
    "block_matmul(Tensor x, Tensor values, Tensor[] index, Tensor? bias, str? activation, SymInt n, SymInt k, "
    "str backend) -> Tensor",
    lambda x, values, index, bias, activation, n, k, backend: _implementation("block", "block_matmul", backend)(
        x, values, _layout(index, n, k, values.shape[1:]), bias, activation
    ),
    lambda x, values, index, bias, activation, n, k, backend: x.new_empty(x.shape[0], n),
    _block_matmul_backward,
    _setup_block,
)
"""``x[M, K], values[blocks, bn, bk] -> y[M, N]``. Its gradient is that of ``activation=None``."""

block_matmul_t = _define(
    "block_matmul_t(Tensor dy, Tensor values, Tensor[] index, SymInt n, SymInt k, str backend) -> Tensor",
    lambda dy, values, index, n, k, backend: _implementation("block", "block_matmul_t", backend)(
        dy, values, _layout(index, n, k, values.shape[1:])
    ),
    lambda dy, values, index, n, k, backend: dy.new_empty(dy.shape[0], k),
    _block_matmul_t_backward,
    _setup_block,
)
"""``dy[M, N], values[blocks, bn, bk] -> dx[M, K]``."""

block_grad = _define(
    "block_grad(Tensor dy, Tensor x, Tensor[] index, SymInt bn, SymInt bk, str backend) -> Tensor",
    lambda dy, x, index, bn, bk, backend: _implementation("block", "block_grad", backend)(
        dy, x, _layout(index, dy.shape[1], x.shape[1], (bn, bk))
    ),
    lambda dy, x, index, bn, bk, backend: x.new_empty(index[0].shape[0], bn, bk),
    _block_grad_backward,
    _setup_block_grad,
)
"""``dy[M, N], x[M, K] -> dvalues[blocks, bn, bk]``."""

semi_structured_matmul = _define(
    "semi_structured_matmul(Tensor x, Tensor values, Tensor codes, SymInt k, str backend) -> Tensor",
    lambda x, values, codes, k, backend: _implementation("semi_structured", "semi_structured_matmul", backend)(
        x, values, _semi_structured_layout(codes, k, values.shape[0])
    ),
    lambda x, values, codes, k, backend: x.new_empty(x.shape[0], *values.shape[:2]),
    _semi_structured_matmul_backward,
    _setup_semi_structured,
)
"""``x[M, K], values[children, N, 2 * quads] -> y[M, children, N]``."""

semi_structured_matmul_t = _define(
    "semi_structured_matmul_t(Tensor dy, Tensor values, Tensor codes, SymInt k, str backend) -> Tensor",
    lambda dy, values, codes, k, backend: _implementation("semi_structured", "semi_structured_matmul_t", backend)(
        dy, values, _semi_structured_layout(codes, k, values.shape[0])
    ),
    lambda dy, values, codes, k, backend: dy.new_empty(dy.shape[0], k),
    _semi_structured_matmul_t_backward,
    _setup_semi_structured,
)
"""``dy[M, children, N], values[children, N, 2 * quads] -> dx[M, K]``."""

semi_structured_grad = _define(
    "semi_structured_grad(Tensor dy, Tensor x, Tensor codes, str backend) -> Tensor",
    lambda dy, x, codes, backend: _implementation("semi_structured", "semi_structured_grad", backend)(
        dy, x, _semi_structured_layout(codes, x.shape[1], dy.shape[1])
    ),
    lambda dy, x, codes, backend: x.new_empty(dy.shape[1], codes.shape[0], (x.shape[1] + 3) // 4 * 2),
    _semi_structured_grad_backward,
    _setup_semi_structured,
)
"""``dy[M, children, N], x[M, K] -> dvalues[children, N, 2 * quads]``."""

semi_structured_compress = _define(
    "semi_structured_compress(Tensor w, Tensor codes, SymInt children, str backend) -> Tensor",
    lambda w, codes, children, backend: _implementation("semi_structured", "semi_structured_compress", backend)(
        w, _semi_structured_layout(codes, w.shape[1], children)
    ),
    lambda w, codes, children, backend: w.new_empty(children, w.shape[0], (w.shape[1] + 3) // 4 * 2),
    _semi_structured_compress_backward,
    _setup_semi_structured_compress,
)
"""``w[N, K] -> values[children, N, 2 * quads]``."""

semi_structured_expand = _define(
    "semi_structured_expand(Tensor values, Tensor codes, SymInt k, str backend) -> Tensor",
    lambda values, codes, k, backend: _implementation("semi_structured", "semi_structured_expand", backend)(
        values, _semi_structured_layout(codes, k, values.shape[0])
    ),
    lambda values, codes, k, backend: values.new_empty(values.shape[1], k),
    _semi_structured_expand_backward,
    _setup_semi_structured_expand,
)
"""``values[children, N, 2 * quads] -> w[N, K]``, the children's sum."""
