"""The block operations on a CPU, for few rows of activations: compiled by Numba.

A row of a block is read once for up to four rows of activations. Activations are padded with zeros to whole blocks.
The transposed product reads float32 alone: weights of 16 bits are converted first, in every call.
"""

from typing import Any

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.functional import pad

from ..activations import finish
from ..cpu import compiled, numbers, padded, shared_out
from ..vectors import I32, I64, LANES, Emit
from .eager import block_grad_eager
from .layout import BlockLayout

TOGETHER = 4
"""Rows of activations that a row of a block is multiplied by at once."""


@intrinsic
def _dots(typing: Any, sums, values, at, step, ahead, cols, first, last, x, x_at, x_row, width, rows) -> Any:
    """Adds to ``sums[m]`` the products of one row of every block of a block row with rows of activations.

    Blocks lie ``step`` apart and their rows are ``width`` long, a multiple of a vector's. The sums stay in registers.
    """
    signature = types.void(sums, values, at, step, ahead, cols, first, last, x, x_at, x_row, width, rows)
    count = rows.count
    apart = max(1, 8 // count)

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, b, signature, args)
        _, _, at, step, ahead, _, first, last, _, x_at, x_row, width, _ = args
        acc = [emit.sums(apart) for _ in range(count)]

        def multiply(w_at: Any, k_at: Any, turn: int) -> None:
            weights = emit.weights(1, w_at, ahead)
            for m in range(count):
                to = acc[m][turn % apart]
                b.store(emit.multiply_add(weights, emit.load(8, emit.plus(k_at, (x_row, m))), b.load(to)), to)

        whole = b.sdiv(width, I64(4 * LANES))
        with cgutils.for_range(b, b.sub(last, first)) as block:
            number = b.add(first, block.index)
            column = b.sext(b.load(emit.at(5, number, I32)), I64)
            w_at = b.add(at, b.mul(number, step))
            k_at = b.add(x_at, b.mul(column, width))
            with cgutils.for_range(b, whole) as four:
                for turn in range(4):
                    place = emit.plus(I64(turn * LANES), (four.index, 4 * LANES))
                    multiply(b.add(w_at, place), b.add(k_at, place), turn)
            rest = b.mul(whole, I64(4))
            with cgutils.for_range(b, b.sub(b.sdiv(width, I64(LANES)), rest)) as one:
                place = b.mul(b.add(rest, one.index), I64(LANES))
                multiply(b.add(w_at, place), b.add(k_at, place), 0)
        for m in range(count):
            emit.add_total(0, I64(m), acc[m])
        return context.get_dummy_value()

    return signature, codegen


@compiled
def _along_rows(x, values, bn, bk, pointers, cols, rows, out, start, stop):
    """Multiplies block rows ``start .. stop``: float32 ``x[M, C * bk]`` into ``out[M, R * bn]``.

    ``values`` are flat; ``bk`` is a multiple of a vector's length, ``M`` of ``len(rows)``.
    """
    m, features = x.shape
    flat, count = x.reshape(-1), len(rows)
    sums = np.empty(count, np.float32)
    for r in range(start, stop):
        first, last = np.int64(pointers[r]), np.int64(pointers[r + 1])
        for j in range(0, m, count):
            for i in range(bn):
                sums[:] = 0
                _dots(
                    sums, values, i * bk, bn * bk, 2 * bk, cols, first, last, flat, j * features,
                    features, bk, rows,
                )  # fmt: skip
                for t in range(count):
                    out[j + t, r * bn + i] = sums[t]


@compiled
def _add(to, row, factor):
    """Adds a row of weights times a number."""
    for i in range(row.size):
        to[i] += row[i] * factor


@compiled
def _across_rows(x, values, pointers, order, rows, out, start, stop):
    """Multiplies block columns ``start .. stop``: float32 ``x[M, R * bn]`` into ``out[M, C * bk]`` of zeros."""
    _, bn, bk = values.shape
    for c in range(start, stop):
        for at in range(pointers[c], pointers[c + 1]):
            b, n = order[at], rows[at] * bn
            for i in range(bn):
                row = values[b, i]
                for j in range(x.shape[0]):
                    _add(out[j, c * bk : c * bk + bk], row, x[j, n + i])


def _in_vectors(values: Tensor) -> Tensor:
    """The blocks with rows of whole vectors; a copy where theirs are not."""
    return pad(values, (0, -values.shape[2] % LANES)).contiguous()


def block_matmul(
    x: Tensor, values: Tensor, layout: BlockLayout, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``block_matmul`` on ``x[M, K]``: returns ``y[M, N]``."""
    (rows, _), (bn, bk) = layout.grid, layout.block
    m = x.shape[0]
    together = 1 if m == 1 else TOGETHER
    ready = padded(x, together, bk)
    blocks = _in_vectors(values)
    width = blocks.shape[2]
    if width != bk:
        ready = pad(ready.unflatten(1, (-1, bk)), (0, width - bk)).flatten(1)
    y = x.new_zeros(ready.shape[0], rows * bn, dtype=torch.float32)
    if len(values) and m:
        x_in, w, out = ready.numpy(), numbers(blocks), y.numpy()
        pointers, cols, count = layout.row_ptr.numpy(), layout.cols.numpy(), (0,) * together
        shared_out(lambda i, j: _along_rows(x_in, w, bn, width, pointers, cols, count, out, i, j), rows, 1)
    y = y[:m, : layout.shape[0]]
    return finish(y if bias is None else y + bias, activation).to(x.dtype)


def block_matmul_t(dy: Tensor, values: Tensor, layout: BlockLayout) -> Tensor:
    """``block_matmul_t`` on ``dy[M, N]``: returns ``dx[M, K]``."""
    (_, columns), (bn, bk) = layout.grid, layout.block
    dx = dy.new_zeros(dy.shape[0], columns * bk, dtype=torch.float32)
    if len(values) and dy.shape[0]:
        ready, blocks, out = padded(dy, 1, bn).numpy(), values.float().contiguous().numpy(), dx.numpy()
        pointers, order, rows = layout.col_ptr.numpy(), layout.col_order.numpy(), layout.col_rows.numpy()
        shared_out(lambda i, j: _across_rows(ready, blocks, pointers, order, rows, out, i, j), columns, 1)
    return dx[:, : layout.shape[1]].contiguous().to(dy.dtype)


OPERATIONS = {"block_matmul": block_matmul, "block_matmul_t": block_matmul_t, "block_grad": block_grad_eager}
