"""The block operations on a CPU, for few rows of activations: compiled by Numba.

A row of a block is read once for up to four rows of activations. Activations are padded with zeros to whole blocks.
Blocks whose rows are no whole number of vectors are padded too, in every call.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.functional import pad

from ..activations import finish
from ..cpu import compiled, floats, numbers, padded, shared_out, threads_for
from ..vectors import F32, FLOATS, I64, LANES, Emit
from .eager import block_grad_eager
from .layout import BlockLayout

STAMP = "02e3da86"
"""Of the other files that these kernels are compiled from: see :mod:`fpe.kernels.vectors`."""
TOGETHER = 4
"""Rows of activations that a row of a block is multiplied by at once."""
AHEAD = 1024
"""Values from one that is read to the one that is called from memory meanwhile."""


def _by_columns(b: Any, width: Any, add: Callable[[Any, int], None]) -> None:
    """Writes ``add(column, vectors)`` for four vectors of a block's columns at a time, then for each that is left."""
    whole = b.sdiv(width, I64(4 * LANES))
    with cgutils.for_range(b, whole) as four:
        add(b.mul(four.index, I64(4 * LANES)), 4)
    done = b.mul(whole, I64(4))
    with cgutils.for_range(b, b.sub(b.sdiv(width, I64(LANES)), done)) as one:
        add(b.mul(b.add(done, one.index), I64(LANES)), 1)


@intrinsic
def _dots(typing: Any, sums, values, at, ahead, bn, width, x, x_at, x_row, rows) -> Any:
    """Adds to ``sums[i, m]``, each a vector, the products of row ``i`` of a block with rows of activations.

    The block is read from its first value to its last, in four columns of vectors at a time, whose activations stay in
    registers.
    """
    signature = types.void(sums, values, at, ahead, bn, width, x, x_at, x_row, rows)
    count = rows.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, b, signature, args)
        _, _, at, ahead, bn, width, _, x_at, x_row, _ = args

        def add(k: Any, vectors: int) -> None:
            """Adds the products of so many vectors of columns, from one on."""
            first = b.add(x_at, k)
            given = [
                [emit.load(6, b.add(emit.plus(first, (x_row, m)), I64(v * LANES))) for v in range(vectors)]
                for m in range(count)
            ]
            with cgutils.for_range(b, bn) as row:
                w_at = b.add(b.add(at, k), b.mul(row.index, width))
                weights = [emit.weights(1, b.add(w_at, I64(v * LANES)), ahead) for v in range(vectors)]
                for m in range(count):
                    to = emit.at(0, emit.plus(I64(m * LANES), (row.index, count * LANES)), FLOATS)
                    total = b.load(to, align=4)
                    for v in range(vectors):
                        total = emit.multiply_add(weights[v], given[m][v], total)
                    b.store(total, to, align=4)

        _by_columns(b, width, add)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _totals(typing: Any, out, out_at, out_row, sums, bn, rows) -> Any:
    """Writes the totals of the vectors ``sums[i, m]`` to ``out[m, i]``."""
    signature = types.void(out, out_at, out_row, sums, bn, rows)
    count = rows.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, b, signature, args)
        _, out_at, out_row, _, bn, _ = args
        total = cgutils.alloca_once(b, FLOATS)
        with cgutils.for_range(b, bn) as row:
            for m in range(count):
                b.store(emit.load(3, emit.plus(I64(m * LANES), (row.index, count * LANES))), total)
                emit.add_total(0, b.add(emit.plus(out_at, (out_row, m)), row.index), [total])
        return context.get_dummy_value()

    return signature, codegen


@compiled
def _along_rows(x, values, bn, bk, pointers, cols, rows, out, start, stop):
    """Multiplies block rows ``start .. stop``: float32 ``x[M, C * bk]`` into ``out[M, R * bn]`` of zeros.

    ``values`` are flat; ``bk`` is a multiple of a vector's length, ``M`` of ``len(rows)``.
    """
    m, features = x.shape
    flat, to, count, width = x.reshape(-1), out.reshape(-1), len(rows), out.shape[1]
    sums = np.empty(bn * count * LANES, np.float32)
    for r in range(start, stop):
        first, last = np.int64(pointers[r]), np.int64(pointers[r + 1])
        for j in range(0, m, count):
            sums[:] = 0
            for block in range(first, last):
                _dots(
                    sums, values, block * bn * bk, AHEAD, bn, bk, flat, j * features + np.int64(cols[block]) * bk,
                    features, rows,
                )  # fmt: skip
            _totals(to, j * width + r * bn, width, sums, bn, rows)


@intrinsic
def _spread(typing: Any, out, out_at, out_row, values, at, ahead, bn, width, x, x_at, x_row, rows) -> Any:
    """Adds to ``out[m, k]`` the products ``w[n, k] * x[m, n]`` of a block's rows with rows of activations.

    The sums of four vectors of columns stay in registers.
    """
    signature = types.void(out, out_at, out_row, values, at, ahead, bn, width, x, x_at, x_row, rows)
    count = rows.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, b, signature, args)
        _, out_at, out_row, _, at, ahead, bn, width, _, x_at, x_row, _ = args

        def add(k: Any, vectors: int) -> None:
            """Adds to so many vectors of columns, from one on."""
            acc = [emit.sums(count) for _ in range(vectors)]
            with cgutils.for_range(b, bn) as row:
                w_at = b.add(b.add(at, k), b.mul(row.index, width))
                first = b.add(x_at, row.index)
                factors = [emit.splat(b.load(emit.at(8, emit.plus(first, (x_row, m)), F32))) for m in range(count)]
                for v in range(vectors):
                    weights = emit.weights(3, b.add(w_at, I64(v * LANES)), ahead)
                    for m in range(count):
                        b.store(emit.multiply_add(weights, factors[m], b.load(acc[v][m])), acc[v][m])
            for v in range(vectors):
                start = b.add(b.add(out_at, k), I64(v * LANES))
                for m in range(count):
                    to = emit.at(0, emit.plus(start, (out_row, m)), FLOATS)
                    b.store(b.fadd(b.load(to, align=4), b.load(acc[v][m])), to, align=4)

        _by_columns(b, width, add)
        return context.get_dummy_value()

    return signature, codegen


@compiled
def _across_rows(x, values, bn, bk, pointers, order, block_rows, rows, out, start, stop):
    """Multiplies block columns ``start .. stop``: float32 ``x[M, R * bn]`` into ``out[M, C * bk]`` of zeros.

    ``values`` are flat; ``bk`` is a multiple of a vector's length, ``M`` of ``len(rows)``.
    """
    m, features = x.shape
    flat, to, count = x.reshape(-1), out.reshape(-1), len(rows)
    width = out.shape[1]
    for c in range(start, stop):
        first, last = np.int64(pointers[c]), np.int64(pointers[c + 1])
        for j in range(0, m, count):
            for at in range(first, last):
                block, after = np.int64(order[at]), np.int64(order[min(at + 1, last - 1)])
                _spread(
                    to, j * width + c * bk, width, values, block * bn * bk, (after - block) * bn * bk, bn, bk,
                    flat, j * features + np.int64(block_rows[at]) * bn, features, rows,
                )  # fmt: skip


def _in_vectors(values: Tensor) -> tuple[np.ndarray, int]:
    """The blocks, flat, with rows of whole vectors, and how long these are: a copy where theirs are not."""
    missing = -values.shape[2] % LANES
    blocks = pad(values, (0, missing)) if missing else values.contiguous()
    return numbers(blocks), blocks.shape[2]


def block_matmul(
    x: Tensor, values: Tensor, layout: BlockLayout, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``block_matmul`` on ``x[M, K]``: returns ``y[M, N]``."""
    (rows, columns), (bn, bk), m = layout.grid, layout.block, x.shape[0]
    together = 1 if m == 1 else TOGETHER
    ready = padded(floats(x), together, bk)
    w, width = _in_vectors(values)
    if width != bk:
        ready = padded(ready.reshape(len(ready), columns, bk), 1, width).reshape(len(ready), columns * width)
    out = np.zeros((len(ready), rows * bn), np.float32)
    if len(w) and m:
        pointers, cols, count = layout.row_ptr.numpy(), layout.cols.numpy(), (0,) * together
        threads = threads_for(values.numel() * m)
        shared_out(lambda i, j: _along_rows(ready, w, bn, width, pointers, cols, count, out, i, j), rows, 1, threads)
    y = torch.from_numpy(out[:m, : layout.shape[0]])
    return finish(y if bias is None else y + bias, activation).to(x.dtype)


def block_matmul_t(dy: Tensor, values: Tensor, layout: BlockLayout) -> Tensor:
    """``block_matmul_t`` on ``dy[M, N]``: returns ``dx[M, K]``."""
    (_, columns), (bn, bk), m = layout.grid, layout.block, dy.shape[0]
    together = 1 if m == 1 else TOGETHER
    ready = padded(floats(dy), together, bn)
    w, width = _in_vectors(values)
    out = np.zeros((len(ready), columns * width), np.float32)
    if len(w) and m:
        pointers, order, rows = layout.col_ptr.numpy(), layout.col_order.numpy(), layout.col_rows.numpy()
        count, threads = (0,) * together, threads_for(values.numel() * m)
        shared_out(
            lambda i, j: _across_rows(ready, w, bn, width, pointers, order, rows, count, out, i, j), columns, 1, threads
        )
    own = out[:m].reshape(m, columns, width)[..., :bk].reshape(m, columns * bk)  # a copy where blocks were padded
    return torch.from_numpy(own[:, : layout.shape[1]]).contiguous().to(dy.dtype)


OPERATIONS = {"block_matmul": block_matmul, "block_matmul_t": block_matmul_t, "block_grad": block_grad_eager}
