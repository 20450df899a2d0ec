"""The block operations on a CPU, for few rows of activations: compiled by Numba.

A row of a block is read once for up to four rows of activations. Activations are padded with zeros to whole blocks.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..activations import finish
from ..cpu import compiled, numbers, padded, shared_out
from .eager import block_grad_eager
from .layout import BlockLayout

TOGETHER = 4
"""Rows of activations that a row of a block is multiplied by at once."""


@compiled
def _dots(row, x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    """The products of a row of weights with four rows of activations."""
    a = b = c = d = np.float32(0)
    for i in range(row.size):
        a += row[i] * x0[i]
        b += row[i] * x1[i]
        c += row[i] * x2[i]
        d += row[i] * x3[i]
    return a, b, c, d


@compiled
def _dot(row, x):  # type: ignore[no-untyped-def]
    """The product of a row of weights with a row of activations."""
    a = np.float32(0)
    for i in range(row.size):
        a += row[i] * x[i]
    return a


@compiled
def _along_rows(x, values, pointers, cols, out, start, stop):  # type: ignore[no-untyped-def]
    """Multiplies block rows ``start .. stop``: float32 ``x[M, C * bk]`` into ``out[M, R * bn]`` of zeros."""
    m = x.shape[0]
    _, bn, bk = values.shape
    for r in range(start, stop):
        for b in range(pointers[r], pointers[r + 1]):
            k = cols[b] * bk
            for i in range(bn):
                row, n = values[b, i], r * bn + i
                if m == 1:
                    out[0, n] += _dot(row, x[0, k : k + bk])
                else:
                    for j in range(0, m, TOGETHER):
                        sums = _dots(
                            row, x[j, k : k + bk], x[j + 1, k : k + bk], x[j + 2, k : k + bk], x[j + 3, k : k + bk]
                        )
                        for t in range(TOGETHER):
                            out[j + t, n] += sums[t]


@compiled
def _add(to, row, factor):  # type: ignore[no-untyped-def]
    """Adds a row of weights times a number."""
    for i in range(row.size):
        to[i] += row[i] * factor


@compiled
def _across_rows(x, values, pointers, order, rows, out, start, stop):  # type: ignore[no-untyped-def]
    """Multiplies block columns ``start .. stop``: float32 ``x[M, R * bn]`` into ``out[M, C * bk]`` of zeros."""
    _, bn, bk = values.shape
    for c in range(start, stop):
        for at in range(pointers[c], pointers[c + 1]):
            b, n = order[at], rows[at] * bn
            for i in range(bn):
                row = values[b, i]
                for j in range(x.shape[0]):
                    _add(out[j, c * bk : c * bk + bk], row, x[j, n + i])


def _stored(values: Tensor) -> Any:
    """The blocks in float32, the only type that these kernels read; others are converted, which reads them once more."""
    return numbers(values.float().contiguous()).reshape(values.shape)


def block_matmul(
    x: Tensor, values: Tensor, layout: BlockLayout, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``block_matmul`` on ``x[M, K]``: returns ``y[M, N]``."""
    (rows, _), (bn, bk) = layout.grid, layout.block
    rows_in = padded(x, 1 if x.shape[0] == 1 else TOGETHER, bk)
    y = x.new_zeros(rows_in.shape[0], rows * bn, dtype=torch.float32)
    if len(values) and x.shape[0]:
        ready, blocks, out = rows_in.numpy(), _stored(values), y.numpy()
        pointers, cols = layout.row_ptr.numpy(), layout.cols.numpy()
        shared_out(lambda i, j: _along_rows(ready, blocks, pointers, cols, out, i, j), rows, 1)
    y = y[: x.shape[0], : layout.shape[0]]
    return finish(y if bias is None else y + bias, activation).to(x.dtype)


def block_matmul_t(dy: Tensor, values: Tensor, layout: BlockLayout) -> Tensor:
    """``block_matmul_t`` on ``dy[M, N]``: returns ``dx[M, K]``."""
    (_, columns), (bn, bk) = layout.grid, layout.block
    dx = dy.new_zeros(dy.shape[0], columns * bk, dtype=torch.float32)
    if len(values) and dy.shape[0]:
        ready, blocks, out = padded(dy, 1, bn).numpy(), _stored(values), dx.numpy()
        pointers, order, rows = layout.col_ptr.numpy(), layout.col_order.numpy(), layout.col_rows.numpy()
        shared_out(lambda i, j: _across_rows(ready, blocks, pointers, order, rows, out, i, j), columns, 1)
    return dx[:, : layout.shape[1]].contiguous().to(dy.dtype)


OPERATIONS = {"block_matmul": block_matmul, "block_matmul_t": block_matmul_t, "block_grad": block_grad_eager}
