"""``torch.library`` schemas, fakes and autograd of every operation, on 2-D activations.

This module imports torch alone; an implementation is imported when it first runs. The gradients are
operations of the same family, so they differentiate again.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Index = list[Tensor]


def _implementation(family: str, op: str, backend: str) -> Callable[..., Tensor]:
    return getattr(import_module(f".{family}.{backend}", __package__), f"{op}_{backend}")


@torch.library.custom_op("fpe::split_matmul", mutates_args=())
def split_matmul(x: Tensor, w: Tensor, labels: Tensor, alpha: int, backend: str) -> Tensor:
    """``x[M, K], w[N, K], labels[N, K] -> y[M, alpha, N]``."""
    return _implementation("partition", "split_matmul", backend)(x, w, labels, alpha)


@split_matmul.register_fake
def _(x: Tensor, w: Tensor, labels: Tensor, alpha: int, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], alpha, w.shape[0])


@torch.library.custom_op("fpe::merge_matmul", mutates_args=())
def merge_matmul(z: Tensor, w: Tensor, labels: Tensor, backend: str) -> Tensor:
    """``z[M, alpha, K], w[N, K], labels[N, K] -> y[M, N]``."""
    return _implementation("partition", "merge_matmul", backend)(z, w, labels)


@merge_matmul.register_fake
def _(z: Tensor, w: Tensor, labels: Tensor, backend: str) -> Tensor:
    return z.new_empty(z.shape[0], w.shape[0])


@torch.library.custom_op("fpe::partition_grad", mutates_args=())
def partition_grad(dy: Tensor, x: Tensor, labels: Tensor, backend: str) -> Tensor:
    """``dy[M, alpha, N], x[M, K], labels[N, K] -> dw[N, K]``."""
    return _implementation("partition", "partition_grad", backend)(dy, x, labels)


@partition_grad.register_fake
def _(dy: Tensor, x: Tensor, labels: Tensor, backend: str) -> Tensor:
    return x.new_empty(labels.shape)


@torch.library.custom_op("fpe::block_matmul", mutates_args=())
def block_matmul(x: Tensor, values: Tensor, index: Index, n: int, k: int, backend: str) -> Tensor:
    """``x[M, K], values[blocks, bn, bk] -> y[M, N]``."""
    layout = _layout(index, n, k, values.shape[1:])
    return _implementation("block", "block_matmul", backend)(x, values, layout)


@block_matmul.register_fake
def _(x: Tensor, values: Tensor, index: Index, n: int, k: int, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], n)


@torch.library.custom_op("fpe::block_matmul_t", mutates_args=())
def block_matmul_t(dy: Tensor, values: Tensor, index: Index, n: int, k: int, backend: str) -> Tensor:
    """``dy[M, N], values[blocks, bn, bk] -> dx[M, K]``."""
    layout = _layout(index, n, k, values.shape[1:])
    return _implementation("block", "block_matmul_t", backend)(dy, values, layout)


@block_matmul_t.register_fake
def _(dy: Tensor, values: Tensor, index: Index, n: int, k: int, backend: str) -> Tensor:
    return dy.new_empty(dy.shape[0], k)


@torch.library.custom_op("fpe::block_grad", mutates_args=())
def block_grad(dy: Tensor, x: Tensor, index: Index, bn: int, bk: int, backend: str) -> Tensor:
    """``dy[M, N], x[M, K] -> dvalues[blocks, bn, bk]``."""
    layout = _layout(index, dy.shape[1], x.shape[1], (bn, bk))
    return _implementation("block", "block_grad", backend)(dy, x, layout)


@block_grad.register_fake
def _(dy: Tensor, x: Tensor, index: Index, bn: int, bk: int, backend: str) -> Tensor:
    return x.new_empty(index[0].shape[0], bn, bk)


def _layout(index: Index, n: int, k: int, block: Any) -> Any:
    from .block.layout import BlockLayout

    return BlockLayout((n, k), (int(block[0]), int(block[1])), *index)


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


split_matmul.register_autograd(_split_backward, setup_context=_setup_partition)
merge_matmul.register_autograd(_merge_backward, setup_context=_setup_partition)
partition_grad.register_autograd(_partition_grad_backward, setup_context=_setup_partition)


NO_INDEX_GRAD = ([None] * 5, None, None, None)  # the index tensors, two sizes and the backend


def _setup_block(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, index, *sizes, _ = inputs
    _save(ctx, inputs, first, second, index)
    ctx.sizes, ctx.block = sizes, second.shape[1:]


def _setup_block_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, index, *block, _ = inputs
    _save(ctx, inputs, dy, x, index)
    ctx.sizes, ctx.block = (dy.shape[1], x.shape[1]), block


def _block_matmul_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    values, x, *index = ctx.saved_tensors
    dx = None if values is None else block_matmul_t(dy, values, index, *ctx.sizes, ctx.backend)
    dvalues = None if x is None else block_grad(dy, x, index, *ctx.block, ctx.backend)
    return dx, dvalues, *NO_INDEX_GRAD


def _block_matmul_t_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    values, dy, *index = ctx.saved_tensors
    ddy = None if values is None else block_matmul(g, values, index, *ctx.sizes, ctx.backend)
    dvalues = None if dy is None else block_grad(dy, g, index, *ctx.block, ctx.backend)
    return ddy, dvalues, *NO_INDEX_GRAD


def _block_grad_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, dy, *index = ctx.saved_tensors
    ddy = None if x is None else block_matmul(x, g, index, *ctx.sizes, ctx.backend)
    dx = None if dy is None else block_matmul_t(dy, g, index, *ctx.sizes, ctx.backend)
    return ddy, dx, *NO_INDEX_GRAD


block_matmul.register_autograd(_block_matmul_backward, setup_context=_setup_block)
block_matmul_t.register_autograd(_block_matmul_t_backward, setup_context=_setup_block)
block_grad.register_autograd(_block_grad_backward, setup_context=_setup_block_grad)
