"""The block operations on 2-D activations: their schemas, fakes and gradients, operations of the family."""

from typing import Any

from torch import Tensor

from ..library import define, implementation, save_operands
from .backends import BACKENDS
from .layout import BlockLayout

INDEX = ("rows", "cols", "row_ptr", "col_ptr", "col_order", "col_rows", "longest_rows", "longest_cols", "panels")
"""The tensors of a block layout, which its operations take one by one: PyTorch has no batching of lists."""
_INDEX = ", ".join(f"Tensor {name}" for name in INDEX)
_NO_INDEX_GRAD = (None,) * len(INDEX)


def _run(
    op: str, backend: str, first: Tensor, second: Tensor, index: Any, sizes: Any, block: Any, *rest: Any
) -> Tensor:
    layout = BlockLayout((sizes[0], sizes[1]), (block[0], block[1]), *index)
    return implementation(BACKENDS[backend].module, op)(first, second, layout, *rest)


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    _, values, *rest = args
    save_operands(ctx, args, rest[: len(INDEX)])
    ctx.sizes, ctx.block = rest[-3:-1], values.shape[1:]


def _save_of_grad(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    dy, x, *rest = args
    save_operands(ctx, args, rest[: len(INDEX)])
    ctx.sizes, ctx.block = (dy.shape[1], x.shape[1]), rest[-3:-1]


def _block_matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, x, *index = ctx.saved_tensors
    dx = None if values is None else block_matmul_t(dy, values, *index, *ctx.sizes, ctx.backend)
    dvalues = None if x is None else block_grad(dy, x, *index, *ctx.block, ctx.backend)
    dbias = dy.sum(0) if ctx.needs_input_grad[2 + len(INDEX)] else None
    return dx, dvalues, *_NO_INDEX_GRAD, dbias, None, None, None, None


def _run_block_matmul(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    *index, bias, activation, n, k, backend = rest
    return _run("block_matmul", backend, x, values, index, (n, k), values.shape[1:], bias, activation)


block_matmul = define(
    f"block_matmul(Tensor x, Tensor values, {_INDEX}, Tensor? bias, str? activation, SymInt n, SymInt k, str backend) "
    "-> Tensor",
    _run_block_matmul,
    lambda x, values, *rest: x.new_empty(x.shape[0], rest[-3]),
    _block_matmul_backward,
    _save,
)
"""``x[M, K], values[blocks, bn, bk] -> y[M, N]``. Its gradient is that of ``activation=None``."""


def _block_matmul_t_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    values, dy, *index = ctx.saved_tensors
    ddy = None if values is None else block_matmul(g, values, *index, None, None, *ctx.sizes, ctx.backend)
    dvalues = None if dy is None else block_grad(dy, g, *index, *ctx.block, ctx.backend)
    return ddy, dvalues, *_NO_INDEX_GRAD, None, None, None


def _run_block_matmul_t(dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
    *index, n, k, backend = rest
    return _run("block_matmul_t", backend, dy, values, index, (n, k), values.shape[1:])


block_matmul_t = define(
    f"block_matmul_t(Tensor dy, Tensor values, {_INDEX}, SymInt n, SymInt k, str backend) -> Tensor",
    _run_block_matmul_t,
    lambda dy, values, *rest: dy.new_empty(dy.shape[0], rest[-2]),
    _block_matmul_t_backward,
    _save,
)
"""``dy[M, N], values[blocks, bn, bk] -> dx[M, K]``."""


def _block_grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, *index = ctx.saved_tensors
    ddy = None if x is None else block_matmul(x, g, *index, None, None, *ctx.sizes, ctx.backend)
    dx = None if dy is None else block_matmul_t(dy, g, *index, *ctx.sizes, ctx.backend)
    return ddy, dx, *_NO_INDEX_GRAD, None, None, None


def _run_block_grad(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *index, bn, bk, backend = rest
    return _run("block_grad", backend, dy, x, index, (dy.shape[1], x.shape[1]), (bn, bk))


block_grad = define(
    f"block_grad(Tensor dy, Tensor x, {_INDEX}, SymInt bn, SymInt bk, str backend) -> Tensor",
    _run_block_grad,
    lambda dy, x, rows, *rest: x.new_empty(rows.shape[0], *rest[-3:-1]),
    _block_grad_backward,
    _save_of_grad,
    by_rows=False,
)
"""``dy[M, N], x[M, K] -> dvalues[blocks, bn, bk]``."""
