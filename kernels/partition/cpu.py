"""The partition operations on a CPU, for few rows of activations: compiled by Numba, vectors written by hand.

A row of weights is read once for all of its children and for up to four rows of activations. Sixteen weights (eight
without AVX-512) are a vector, the word of labels beside it becomes one mask for each child, and a child's share, the
vector under its mask, is multiplied into that child's sums, which stay in registers. What Numba makes of loops over
bits is twenty times slower, so that the two inner steps are written as LLVM's vectors
(:mod:`..vectors`): :func:`_dots` where the
reduction runs along the rows in memory, :func:`_spread` where it runs across them. Both take a row's weights from
:meth:`Emit.weights` and its masks from :meth:`_Emit.owners`; another way of storing them is another of these two.

How many children and rows there are, and whether it is a merge, are the lengths of tuples: Numba then compiles a kernel
for each. Memory is read ahead by hand, because the tiles jump from row to row.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..activations import finish
from ..cpu import compiled, numbers, padded, shared_out
from ..vectors import F32, FLOATS, I32, I64, LANES, WORDS, Emit
from .eager import Labels, partition_grad_eager, table
from .labels import PackedLabels, digits, pack_planes

GROUP = 128
"""Edges whose labels lie together: see :class:`PackedLabels`."""
NEAR = 24 << 10
"""Bytes of activations that stay in the innermost cache."""
TOGETHER = 16
"""Rows of weights that a tile of activations is multiplied by before the next one."""
ACROSS = 4
"""Rows of weights that go into a sum at once where the reduction runs across them."""


def _bit(edge: int) -> int:
    """The bit of its word in which the label of an edge of a group stands."""
    pair = edge % 8
    return pair // 4 + 8 * (2 * (pair % 2) + pair // 2 % 2) + 2 * (edge // 32)


class _Emit(Emit):
    """Instructions that read labels."""

    def words(self, array: int, place: Any, stride: Any, children: int) -> list[Any]:
        """The four words of a group of labels, for each binary digit; none for an only child."""
        four = ir.VectorType(I32, 4)
        places = [self.plus(place, (stride, digit)) for digit in range(digits(children))] if children > 1 else []
        return [self.b.load(self.at(array, each, four), align=4) for each in places]

    def owners(self, words: list[Any], edge: int, children: int) -> list[Any]:
        """Masks of the weights of each child, for the vector that begins at an edge of the group."""
        b, edges = self.b, range(edge, edge + LANES)
        which = ir.Constant(WORDS, [e % 32 // 8 for e in edges])
        bits = ir.Constant(WORDS, [1 << _bit(e) for e in edges])
        zero = ir.Constant(WORDS, [0] * LANES)
        ones = [b.icmp_unsigned("!=", b.and_(b.shuffle_vector(word, word, which), bits), zero) for word in words]
        masks = []
        for child in range(children):
            mask = None
            for digit, one in enumerate(ones):
                own = one if child >> digit & 1 else b.not_(one)
                mask = own if mask is None else b.and_(mask, own)
            masks.append(mask)
        return masks


@intrinsic
def _dots(
    typing: Any, sums, w, w_at, ahead, bits, bits_at, digit, x, x_at, x_row, x_child, groups, children, rows, merge
) -> Any:
    """Adds to ``sums`` the products of whole groups of a row of weights with rows of activations.

    ``sums[a, m] += sum_k w_a[k] * x[m, k]``, or of a merge ``sums[m] += sum_a sum_k w_a[k] * x[m, a, k]``.
    """
    signature = types.void(
        sums, w, w_at, ahead, bits, bits_at, digit, x, x_at, x_row, x_child, groups, children, rows, merge
    )
    alpha, count, merges = children.count, rows.count, bool(merge.count)
    own = 1 if merges else alpha
    apart = max(1, 8 // (own * count))  # sums that are added to in turns, to hide the latency of an addition

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emit = _Emit(context, b, signature, args)
        _, _, w_at, ahead, _, bits_at, digit, _, x_at, x_row, x_child, groups, *_ = args
        acc = {(a, m): emit.sums(apart) for a in range(own) for m in range(count)}
        with cgutils.for_range(b, groups) as loop:
            first = b.mul(loop.index, I64(GROUP))
            words = emit.words(4, emit.plus(bits_at, (loop.index, 4)), digit, alpha)
            for edge in range(0, GROUP, LANES):
                k = b.add(first, I64(edge))
                masks = emit.owners(words, edge, alpha) if alpha > 1 else [None]
                shares = emit.shares(emit.weights(1, b.add(w_at, k), ahead), masks)
                planes = range(alpha if merges else 1)
                start = b.add(x_at, k)
                loaded = {
                    (a, m): emit.load(7, emit.plus(start, (x_row, m), (x_child, a)))
                    for a in planes
                    for m in range(count)
                }
                for a in range(alpha):
                    for m in range(count):
                        to = acc[0 if merges else a, m][edge // LANES % apart]
                        b.store(emit.multiply_add(shares[a], loaded[a if merges else 0, m], b.load(to)), to)
        for (a, m), vectors in acc.items():
            emit.add_total(0, I64(a * count + m), vectors)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _spread(
    typing: Any, out, out_at, out_row, out_child, w, w_at, w_row, ahead, bits, bits_at, bits_row, digit, x, x_at,
    groups, children, rows, merge, across,
) -> Any:  # fmt: skip
    """Adds to ``out`` the products of rows of weights, each with one activation of every row.

    ``out[m, a, k] += sum_n w_a[n, k] * x[n, 0, m]``, or of a merge ``out[m, k] += sum_n sum_a w_a[n, k] * x[n, a, m]``.
    """
    signature = types.void(
        out, out_at, out_row, out_child, w, w_at, w_row, ahead, bits, bits_at, bits_row, digit, x, x_at, groups,
        children, rows, merge, across,
    )  # fmt: skip
    alpha, count, merges, depth = children.count, rows.count, bool(merge.count), across.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emit = _Emit(context, b, signature, args)
        _, out_at, out_row, out_child, _, w_at, w_row, ahead, _, bits_at, bits_row, digit, _, x_at, groups, *_ = args
        planes = alpha if merges else 1
        factors = {}
        for n in range(depth):
            for a in range(planes):
                for m in range(count):
                    place = b.add(x_at, I64((n * planes + a) * count + m))
                    factors[n, a, m] = emit.splat(b.load(emit.at(12, place, F32)))
        with cgutils.for_range(b, groups) as loop:
            first = b.mul(loop.index, I64(GROUP))
            start = emit.plus(bits_at, (loop.index, 4))
            words = [emit.words(8, emit.plus(start, (bits_row, n)), digit, alpha) for n in range(depth)]
            for edge in range(0, GROUP, LANES):
                k = b.add(first, I64(edge))
                shares = []
                for n in range(depth):
                    masks = emit.owners(words[n], edge, alpha) if alpha > 1 else [None]
                    shares.append(emit.shares(emit.weights(4, emit.plus(b.add(w_at, k), (w_row, n)), ahead), masks))
                for m in range(count):
                    for plane in range(1 if merges else alpha):
                        to = emit.at(0, emit.plus(b.add(out_at, k), (out_row, m), (out_child, plane)), FLOATS)
                        acc = b.load(to, align=4)
                        for n in range(depth):
                            for a in range(planes):
                                share = shares[n][a if merges else plane]
                                acc = emit.multiply_add(share, factors[n, a, m], acc)
                        b.store(acc, to, align=4)
        return context.get_dummy_value()

    return signature, codegen


@compiled
def _along_rows(x, w, bits, k, row_words, digit, children, rows, merge, out, start, stop):
    """Multiplies rows ``start .. stop`` of the stored weight, the reduction along them.

    Args:
        x: float32 ``[M, planes, K]``, padded with zeros to whole groups and whole numbers of rows.
        w: The stored weight, flat.
        bits: uint32, the planes of labels, flat.
        k: Columns of the weight.
        row_words: Words of a row of labels.
        digit: Words of a plane of labels.
        children: A tuple as long as there are children.
        rows: A tuple as long as there are rows in registers.
        merge: A tuple of one for a merge, else empty.
        out: float32 ``[M, sums, N]``.
        start: First row of the weight.
        stop: Row after the last one.
    """
    m, planes, width = x.shape
    count, own = len(rows), out.shape[1]
    flat = x.reshape(-1)
    step = max(NEAR // (4 * count * planes) // GROUP * GROUP, GROUP)
    sums = np.empty((TOGETHER, m // count, own * count), np.float32)
    last = np.zeros(2 * GROUP, w.dtype)
    for n0 in range(start, stop, TOGETHER):
        together = min(TOGETHER, stop - n0)
        sums[:] = 0
        for k0 in range(0, k, step):
            groups, rest = min(step, k - k0) // GROUP, min(step, k - k0) % GROUP
            for b in range(m // count):
                x_at = b * count * planes * width + k0
                for i in range(together):
                    w_at, bits_at = (n0 + i) * k + k0, (n0 + i) * row_words + k0 // 32
                    # The next row of this tile; after the last one the first row, of the next tile after the last pass.
                    ahead = k
                    if i == together - 1:
                        ahead = (step if b == m // count - 1 else 0) - i * k
                    _dots(
                        sums[i, b], w, w_at, ahead, bits, bits_at, digit, flat, x_at, planes * width, width, groups,
                        children, rows, merge,
                    )  # fmt: skip
                    if rest:
                        done = groups * GROUP
                        for j in range(rest):
                            last[j] = w[w_at + done + j]
                        _dots(
                            sums[i, b], last, 0, 0, bits, bits_at + done // 32, digit, flat, x_at + done,
                            planes * width, width, 1, children, rows, merge,
                        )  # fmt: skip
        for b in range(m // count):
            for a in range(own):
                for j in range(count):
                    for i in range(together):
                        out[b * count + j, a, n0 + i] = sums[i, b, a * count + j]


@compiled
def _across_rows(x, w, bits, n, k, row_words, digit, children, rows, merge, across, out, start, stop):
    """Multiplies columns ``start .. stop`` of the stored weight, the reduction across its rows.

    Args:
        x: float32 ``[blocks of rows, N, planes, rows]``.
        w: The stored weight, flat.
        bits: uint32, the planes of labels, flat.
        n: Rows of the weight.
        k: Its columns.
        row_words: Words of a row of labels.
        digit: Words of a plane of labels.
        children: A tuple as long as there are children.
        rows: A tuple as long as there are rows of activations together.
        merge: A tuple of one for a merge, else empty.
        across: A tuple as long as there are rows of weights together.
        out: float32 ``[M, sums, K]`` of zeros, ``K`` padded to whole groups.
        start: First column, a multiple of the group's size.
        stop: Column after the last one.
    """
    blocks, _, planes, count = x.shape
    _, own, width = out.shape
    flat, to = x.reshape(-1), out.reshape(-1)
    depth = len(across)
    step = max(NEAR // (4 * depth) // GROUP * GROUP, GROUP)
    last = np.zeros(2 * GROUP, w.dtype)
    one = (0,)
    for k0 in range(start, stop, step):
        groups, rest = min(step, stop - k0) // GROUP, min(step, stop - k0) % GROUP
        whole = n // depth * depth
        for b in range(blocks):
            out_at = b * count * own * width + k0
            done = groups * GROUP
            for i in range(0, whole, depth):
                _spread(
                    to, out_at, own * width, width, w, i * k + k0, k, depth * k, bits, i * row_words + k0 // 32,
                    row_words, digit, flat, (b * n + i) * planes * count, groups, children, rows, merge, across,
                )  # fmt: skip
            for i in range(n):
                x_at, bits_at = (b * n + i) * planes * count, i * row_words + k0 // 32
                if i >= whole:
                    _spread(
                        to, out_at, own * width, width, w, i * k + k0, k, 0, bits, bits_at, row_words, digit, flat,
                        x_at, groups, children, rows, merge, one,
                    )  # fmt: skip
                if rest:
                    for j in range(rest):
                        last[j] = w[i * k + k0 + done + j]
                    _spread(
                        to, out_at + done, own * width, width, last, 0, 0, 0, bits, bits_at + done // 32, row_words,
                        digit, flat, x_at, 1, children, rows, merge, one,
                    )  # fmt: skip


def _together(m: int, alpha: int) -> int:
    """Rows of activations whose sums the registers hold."""
    return 1 if m == 1 else 2 if m == 2 or alpha > 4 else 4


def _multiply(x: Tensor, w: Tensor, labels: Labels, alpha: int, merge: bool) -> Tensor:
    """The sums in float32: ``x[M, planes, K]`` and ``w[N, K]`` to ``[M, alpha, N]``, or ``[M, 1, N]`` of a merge."""
    if isinstance(labels, PackedLabels):
        planes, transposed = labels.planes, labels.transposed
    else:
        plain = table(labels, w.device)
        w, planes = torch.where(plain < alpha, w, w.new_zeros(())), pack_planes(plain, alpha)
        transposed = False
    (m, inputs), outputs, own = (x.shape[0], x.shape[2]), w.shape[0], 1 if merge else alpha
    if min(m, inputs, outputs) == 0:
        return x.new_zeros(m, own, outputs, dtype=torch.float32)
    stored = (w.T if transposed else w).contiguous()
    n, k = stored.shape
    bits = numbers(planes.contiguous()).view(np.uint32)
    row_words = planes.shape[2] // 4
    weights, together = numbers(stored), _together(m, alpha)
    children, rows, merges = (0,) * alpha, (0,) * together, (0,) * merge
    if not transposed:
        rows_in = padded(x, together, GROUP)
        out = x.new_empty(rows_in.shape[0], own, n, dtype=torch.float32)
        ready, to = rows_in.numpy(), out.numpy()
        shared_out(
            lambda i, j: _along_rows(
                ready, weights, bits, k, row_words, n * row_words, children, rows, merges, to, i, j
            ),
            n,
            TOGETHER,
        )
        return out[:m]
    by_row = padded(x, together, 1).unflatten(0, (-1, together)).permute(0, 3, 2, 1).contiguous().numpy()
    out = x.new_zeros(by_row.shape[0] * together, own, -(-k // GROUP) * GROUP, dtype=torch.float32)
    across, to = (0,) * ACROSS, out.numpy()
    shared_out(
        lambda i, j: _across_rows(
            by_row, weights, bits, n, k, row_words, n * row_words, children, rows, merges, across, to, i, j
        ),
        k,
        GROUP,
    )
    return out[:m, :, :k]


def split_matmul(
    x: Tensor, w: Tensor, labels: Labels, alpha: int, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``split_matmul`` on ``x[M, K]``: returns ``y[M, alpha, N]``."""
    y = _multiply(x.unsqueeze(1), w, labels, alpha, merge=False)
    return finish(y if bias is None else y + bias, activation).to(x.dtype)


def merge_matmul(
    z: Tensor, w: Tensor, labels: Labels, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``merge_matmul`` on ``z[M, alpha, K]``: returns ``y[M, N]``."""
    y = _multiply(z, w, labels, z.shape[1], merge=True)[:, 0]
    return finish(y if bias is None else y + bias, activation).to(z.dtype)


OPERATIONS = {"split_matmul": split_matmul, "merge_matmul": merge_matmul, "partition_grad": partition_grad_eager}
