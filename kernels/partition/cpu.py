"""The partition operations on a CPU, for few rows of activations: compiled by Numba, vectors written by hand.

A row of weights is read once for all of its children and for up to four rows of activations. Sixteen weights (eight
without AVX-512) are a vector, the word of labels beside it becomes one mask for each child, and a child's share, the
vector under its mask, is multiplied into that child's sums, which stay in registers. What Numba makes of loops over
bits is twenty times slower, so that the two inner steps are written as LLVM's vectors: :func:`_dots` where the
reduction runs along the rows in memory, :func:`_spread` where it runs across them. Both take weights and masks from
:class:`.cpu_storage.Stored`, which knows how they are stored.

How many children and rows there are, and whether it is a merge, are the lengths of tuples: Numba then compiles a kernel
for each. Memory is read ahead by hand, because the tiles jump from row to row.

Sixteen lanes add a product only where their mask says so: an activation that is infinite or no number reaches only the
children that own its edges. With eight lanes, as in the other backends, its product with the zeros of the other
children is no number either.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.functional import pad

from ..activations import finish
from ..bitmap.layout import BASE, RUN, WORD, Bitmap
from ..cpu import compiled, floats, numbers, padded, shared_out, threads_for
from ..vectors import F32, FLOATS, I64, LANES, Emit
from .cpu_storage import GROUP, Stored, make_labels
from .eager import Labels, partition_grad_eager
from .labels import PackedLabels, pack_planes
from .seeded import SEEDS, SeededLabels

STAMP = "02b7ab45"
"""Of the other files that these kernels are compiled from: see :mod:`fpe.kernels.vectors`."""
NEAR = 24 << 10
"""Bytes of activations that stay in the innermost cache."""
TOGETHER = 16
"""Rows of weights that a tile of activations is multiplied by before the next one."""
AHEAD = 2048
"""Values from one that is read to the one that is called from memory meanwhile."""
ACROSS = 4
"""Rows of weights that go into a sum at once where the reduction runs across them."""


@intrinsic
def _dots(
    typing: Any, sums, w, w_at, ahead, exists, exists_at, bits, bits_at, words_ahead, digit, x, x_at, x_row, x_child,
    groups, children, rows, merge,
) -> Any:  # fmt: skip
    """Adds to ``sums`` the products of whole groups of a row of weights with rows of activations.

    ``sums[a, m] += sum_k w_a[k] * x[m, k]``, or of a merge ``sums[m] += sum_a sum_k w_a[k] * x[m, a, k]``.
    """
    signature = types.void(
        sums, w, w_at, ahead, exists, exists_at, bits, bits_at, words_ahead, digit, x, x_at, x_row, x_child, groups,
        children, rows, merge,
    )  # fmt: skip
    alpha, count, merges = children.count, rows.count, bool(merge.count)
    own = 1 if merges else alpha
    apart = max(1, LANES // (own * count))  # sums that are added to in turns, to hide the latency of an addition

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, b, signature, args)
        _, _, w_at, ahead, _, exists_at, _, bits_at, words_ahead, digit, _, x_at, x_row, x_child, groups, *_ = args
        stored = Stored(emit, 1, 4, 6, digit, alpha)
        acc = {(a, m): emit.sums(apart) for a in range(own) for m in range(count)}
        place = stored.begin(w_at)
        with cgutils.for_range(b, groups) as loop:
            first = b.mul(loop.index, I64(GROUP))
            words = stored.words(bits_at, loop.index, words_ahead)
            for edge in range(0, GROUP, LANES):
                weights = stored.weights(place, exists_at, loop.index, edge, ahead)
                owners = stored.owners(words, edge)
                planes = range(alpha if merges else 1)
                start = b.add(x_at, b.add(first, I64(edge)))
                loaded = {
                    (a, m): emit.load(10, emit.plus(start, (x_row, m), (x_child, a)))
                    for a in planes
                    for m in range(count)
                }
                for a in range(alpha):
                    for m in range(count):
                        to = acc[0 if merges else a, m][edge // LANES % apart]
                        b.store(emit.multiply_add(weights, loaded[a if merges else 0, m], b.load(to), owners[a]), to)
        for (a, m), vectors in acc.items():
            emit.add_total(0, I64(a * count + m), vectors)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _spread(
    typing: Any, out, out_at, out_row, out_child, w, places, ahead, exists, exists_at, exists_row, bits, bits_at,
    bits_row, digit, x, x_at, groups, children, rows, merge, across,
) -> Any:  # fmt: skip
    """Adds to ``out`` the products of rows of weights, each with one activation of every row.

    ``out[m, a, k] += sum_n w_a[n, k] * x[n, 0, m]``, or of a merge ``out[m, k] += sum_n sum_a w_a[n, k] * x[n, a, m]``.
    Row ``n`` of the weights begins at ``places[n]``.
    """
    signature = types.void(
        out, out_at, out_row, out_child, w, places, ahead, exists, exists_at, exists_row, bits, bits_at, bits_row,
        digit, x, x_at, groups, children, rows, merge, across,
    )  # fmt: skip
    alpha, count, merges, depth = children.count, rows.count, bool(merge.count), across.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, b, signature, args)
        _, out_at, out_row, out_child, _, _, ahead, _, exists_at, exists_row, *others = args
        _, bits_at, bits_row, digit, _, x_at, groups, *_ = others
        stored = Stored(emit, 4, 7, 10, digit, alpha)
        planes = alpha if merges else 1
        factors = {}
        for n in range(depth):
            for a in range(planes):
                for m in range(count):
                    place = b.add(x_at, I64((n * planes + a) * count + m))
                    factors[n, a, m] = emit.splat(b.load(emit.at(14, place, F32)))
        exist = [emit.plus(exists_at, (exists_row, n)) for n in range(depth)]
        own = [emit.plus(bits_at, (bits_row, n)) for n in range(depth)]
        starts = [stored.begin(b.load(emit.at(5, I64(n), I64))) for n in range(depth)]
        with cgutils.for_range(b, groups) as loop:
            first = b.mul(loop.index, I64(GROUP))
            words = [stored.words(each, loop.index, b.mul(bits_row, I64(depth))) for each in own]
            for edge in range(0, GROUP, LANES):
                k = b.add(first, I64(edge))
                given = [stored.weights(starts[n], exist[n], loop.index, edge, ahead) for n in range(depth)]
                owners = [stored.owners(each, edge) for each in words]
                for m in range(count):
                    for plane in range(1 if merges else alpha):
                        to = emit.at(0, emit.plus(b.add(out_at, k), (out_row, m), (out_child, plane)), FLOATS)
                        acc = b.load(to, align=4)
                        for n in range(depth):
                            for a in range(planes):
                                owner = owners[n][a if merges else plane]
                                acc = emit.multiply_add(given[n], factors[n, a, m], acc, owner)
                        b.store(acc, to, align=4)
        return context.get_dummy_value()

    return signature, codegen


@compiled
def _digits(children):
    """Binary digits of a label, of which there are 2, 4 or 8 different ones here."""
    return len(children) // 2 - (len(children) == 8)


@intrinsic
def _ones(typing: Any, word) -> Any:
    """How many bits of a word are set."""
    return types.int64(word), lambda context, b, signature, args: b.zext(b.ctpop(args[0]), I64)


@compiled
def _place(starts, exists, row_words, row, k0, k):
    """Where the values of a row of the weight are, from a column on that is a multiple of 32."""
    if exists is None:
        return row * k + k0
    width = -(-k // WORD)
    at = row * width + min(k0 // WORD, width)
    run = at // (RUN // WORD)
    place = np.int64(starts[1][run // (BASE // RUN)]) + starts[0][run]
    for word in range(run * (RUN // WORD), at):
        # Runs go on from row to row, and the words here are padded at the end of each.
        place += _ones(exists[word if width == row_words else word // width * row_words + word % width])
    return place


@compiled
def _along_rows(x, w, starts, exists, bits, seed, k, row_words, digit, children, rows, merge, out, start, stop):
    """Multiplies rows ``start .. stop`` of the stored weight, the reduction along them.

    Args:
        x: float32 ``[M, planes, K]``, padded with zeros to whole groups and whole numbers of rows.
        w: The values of the stored weight, flat.
        starts: Those of a bitmap, and its bases; none where all entries exist.
        exists: uint32, the words of bits of the entries that exist, flat, whole groups; none where all do.
        bits: uint32, the planes of labels, flat, of which a seed has none; none for an only child.
        seed: uint32, its key; none where there is none.
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
    step = min(max(NEAR // (4 * count * planes) // GROUP * GROUP, GROUP), -(-k // GROUP) * GROUP)
    sums = np.empty((TOGETHER, m // count, own * count), np.float32)
    last = np.zeros(step + GROUP, w.dtype)
    table, across, plane = bits, row_words, digit
    if seed is not None:  # a tile's, made as it is begun
        plane = step // WORD
        made = np.empty((TOGETHER, _digits(children), plane), np.uint32)
        table, across = made.reshape(-1), _digits(children) * plane
    for n0 in range(start, stop, TOGETHER):
        together = min(TOGETHER, stop - n0)
        sums[:] = 0
        for k0 in range(0, k, step):
            groups, rest = min(step, k - k0) // GROUP, min(step, k - k0) % GROUP
            if exists is not None:  # bits of whole groups say where a row ends
                groups, rest = -(-min(step, k - k0) // GROUP), 0
            if seed is not None:
                for i in range(together):
                    make_labels(made[i], seed, n0 + i, k0 // WORD, children)
            for b in range(m // count):
                x_at = b * count * planes * width + k0
                for i in range(together):
                    n = n0 + i
                    w_at = _place(starts, exists, row_words, n, k0, k)
                    exists_at = bits_at = n * row_words + k0 // WORD
                    if seed is not None:
                        bits_at = i * across
                    ahead, words_ahead = AHEAD, AHEAD // WORD
                    if step < k:
                        # The next row of this tile; after the last one the first row, of the next tile after the last.
                        after, column = n + 1, k0
                        if i == together - 1:
                            after, column = n0, k0 + step if b == m // count - 1 and k0 + step < k else k0
                        ahead = _place(starts, exists, row_words, min(after, stop - 1), column, k) - w_at
                        words_ahead = row_words
                    # Groups that are read where they lie, and those that are copied first, with so many values: what is
                    # left of a row, and kept values behind which there may be less than the vector that is read.
                    there, copied, values = groups, min(rest, 1), rest
                    if exists is not None and w_at + groups * GROUP > len(w) - LANES:
                        there, copied, values = 0, groups, len(w) - w_at
                    if there:
                        _dots(
                            sums[i, b], w, w_at, ahead, exists, exists_at, table, bits_at, words_ahead, plane, flat,
                            x_at, planes * width, width, there, children, rows, merge,
                        )  # fmt: skip
                    if copied:
                        done = there * GROUP
                        for j in range(values):
                            last[j] = w[w_at + done + j]
                        _dots(
                            sums[i, b], last, 0, 0, exists, exists_at, table, bits_at + done // WORD, 0, plane, flat,
                            x_at + done, planes * width, width, copied, children, rows, merge,
                        )  # fmt: skip
        for b in range(m // count):
            for a in range(own):
                for j in range(count):
                    for i in range(together):
                        out[b * count + j, a, n0 + i] = sums[i, b, a * count + j]


@compiled
def _across_rows(
    x, w, starts, exists, bits, seed, n, k, row_words, digit, children, rows, merge, across, out, start, stop
):
    """Multiplies columns ``start .. stop`` of the stored weight, the reduction across its rows.

    Args:
        x: float32 ``[blocks of rows, N, planes, rows]``.
        w: The values of the stored weight, flat.
        starts: As in :func:`_along_rows`.
        exists: As there.
        bits: As there.
        seed: As there.
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
    step = min(max(NEAR // (4 * depth) // GROUP * GROUP, GROUP), -(-(stop - start) // GROUP) * GROUP)
    places, first = np.empty(depth, np.int64), np.zeros(1, np.int64)
    last = np.zeros(step + GROUP, w.dtype)
    one = (0,)
    table, bits_row, plane = bits, row_words, digit
    if seed is not None:  # of the rows that are multiplied together
        plane = step // WORD
        made = np.empty((depth, _digits(children), plane), np.uint32)
        table, bits_row = made.reshape(-1), _digits(children) * plane
    for k0 in range(start, stop, step):
        groups, rest = min(step, stop - k0) // GROUP, min(step, stop - k0) % GROUP
        if exists is not None:
            groups, rest = -(-min(step, stop - k0) // GROUP), 0
        whole = n // depth * depth
        done = groups * GROUP
        if exists is not None:  # the last rows go one by one, copied: there may be less than the vectors that are read
            while whole and _place(starts, exists, row_words, whole - 1, k0, k) + done > len(w) - LANES:
                whole -= depth
        for b in range(blocks):
            out_at = b * count * own * width + k0
            for i in range(n):
                # Several rows at once; those that are left, and what is left of a row, one by one.
                alone = i >= whole
                if alone or i % depth == 0:
                    exists_at = bits_at = i * row_words + k0 // WORD
                    if seed is not None:
                        bits_at = 0
                    for j in range(1 if alone else depth):
                        places[j] = _place(starts, exists, row_words, i + j, k0, k)
                        if seed is not None:
                            make_labels(made[j], seed, i + j, k0 // WORD, children)
                    x_at = (b * n + i) * planes * count
                    if groups and alone:
                        values = w
                        if exists is not None and places[0] + done > len(w) - LANES:
                            last[: len(w) - places[0]] = w[places[0] :]
                            values, places[0] = last, 0
                        _spread(
                            to, out_at, own * width, width, values, places, 0, exists, exists_at, row_words, table,
                            bits_at, bits_row, plane, flat, x_at, groups, children, rows, merge, one,
                        )  # fmt: skip
                    elif groups:
                        ahead = _place(starts, exists, row_words, min(i + depth, n - 1), k0, k) - places[0]
                        _spread(
                            to, out_at, own * width, width, w, places, ahead, exists, exists_at, row_words, table,
                            bits_at, bits_row, plane, flat, x_at, groups, children, rows, merge, across,
                        )  # fmt: skip
                if exists is None and rest:
                    bits_at = i * row_words + (k0 + done) // WORD
                    if seed is not None:  # made with those of the whole groups
                        bits_at = (0 if alone else i % depth) * bits_row + done // WORD
                    for j in range(rest):
                        last[j] = w[i * k + k0 + done + j]
                    _spread(
                        to, out_at + done, own * width, width, last, first, 0, exists, 0, row_words, table, bits_at,
                        bits_row, plane, flat, (b * n + i) * planes * count, 1, children, rows, merge, one,
                    )  # fmt: skip


def _together(m: int, alpha: int) -> int:
    """Rows of activations whose sums the registers hold."""
    return 1 if m == 1 else 2 if m == 2 or alpha > 4 else 4


class _Weight(NamedTuple):
    """A weight and its labels as the kernels take them: see :func:`_along_rows`."""

    shape: tuple[int, int]
    transposed: bool
    values: np.ndarray
    starts: tuple[np.ndarray, np.ndarray] | None
    exists: np.ndarray | None
    bits: np.ndarray | None
    seed: np.uint32 | None

    @classmethod
    def of(cls, w: Tensor, labels: Labels | None, alpha: int, kept: Bitmap | None) -> "_Weight":
        """From what an operation is given; a plain table is packed, and the edges that nobody owns become zeros."""
        bits: np.ndarray | None = None
        seed, transposed = None, False
        if isinstance(labels, SeededLabels):
            bits, seed, transposed = np.empty(0, np.uint32), np.uint32(labels.key % SEEDS), labels.transposed
        elif isinstance(labels, PackedLabels):
            bits, transposed = _words(labels.planes), labels.transposed
        elif labels is not None:
            w, bits = torch.where(labels < alpha, w, w.new_zeros(())), _words(pack_planes(labels, alpha))
        if kept is not None:
            missing = -kept.bits.shape[1] % (GROUP // WORD)
            exists = pad(kept.bits, (0, missing)) if missing else kept.bits  # it would be copied
            starts = kept.starts.contiguous().numpy().view(np.uint16), kept.bases.contiguous().numpy()
            return cls(kept.shape, kept.transposed, numbers(w), starts, _words(exists), bits, seed)
        stored = (w.T if transposed else w).contiguous()
        return cls((stored.shape[0], stored.shape[1]), transposed, numbers(stored), None, None, bits, seed)

    def arguments(self) -> tuple[Any, ...]:
        """What both kernels take of it, sizes left out."""
        return self.values, self.starts, self.exists, self.bits, self.seed


def _words(bits: Tensor) -> np.ndarray:
    """Bits in any integers as 32-bit words, flat."""
    return numbers(bits.contiguous()).view(np.uint32)


def _multiply(
    x: np.ndarray, w: Tensor, labels: Labels | None, alpha: int, merge: bool, kept: Bitmap | None = None
) -> Tensor:
    """The sums: float32 ``x[M, planes, K]`` and ``w[N, K]`` to ``[M, alpha, N]``, or ``[M, 1, N]`` of a merge."""
    (m, planes, inputs), own = x.shape, 1 if merge else alpha
    outputs = w.shape[0] if kept is None else kept.sizes[0]
    if min(m, inputs, outputs) == 0:
        return torch.from_numpy(np.zeros((m, own, outputs), np.float32))
    weight = _Weight.of(w, labels, alpha, kept)
    (n, k), parts = weight.shape, weight.arguments()
    row_words = -(-k // GROUP) * (GROUP // WORD)
    together, threads = _together(m, alpha), threads_for(n * k * m)
    counted = (0,) * alpha, (0,) * together, (0,) * merge
    if not weight.transposed:
        ready = padded(x, together, GROUP)
        y = torch.empty(len(ready), own, n, dtype=torch.float32)
        to = y.numpy()
        shared_out(
            lambda i, j: _along_rows(ready, *parts, k, row_words, n * row_words, *counted, to, i, j),
            n,
            TOGETHER,
            threads,
        )
        return y if len(to) == m else y[:m]
    whole = padded(x, together, 1)
    by_row = np.ascontiguousarray(whole.reshape(-1, together, planes, inputs).transpose(0, 3, 2, 1))
    out = np.zeros((len(whole), own, -(-k // GROUP) * GROUP), np.float32)
    across = (0,) * ACROSS
    shared_out(
        lambda i, j: _across_rows(by_row, *parts, n, k, row_words, n * row_words, *counted, across, out, i, j),
        k,
        GROUP,
        threads,
    )
    return torch.from_numpy(out[:m, :, :k])


def split_matmul(
    x: Tensor,
    w: Tensor,
    labels: Labels | None,
    alpha: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    kept: Bitmap | None = None,
) -> Tensor:
    """``split_matmul`` on ``x[M, K]``: returns ``y[M, alpha, N]``."""
    y = _multiply(floats(x)[:, None], w, labels, alpha, False, kept)
    return finish(y if bias is None else y + bias, activation).to(x.dtype)


def merge_matmul(
    z: Tensor,
    w: Tensor,
    labels: Labels | None,
    bias: Tensor | None = None,
    activation: str | None = None,
    kept: Bitmap | None = None,
) -> Tensor:
    """``merge_matmul`` on ``z[M, alpha, K]``: returns ``y[M, N]``."""
    y = _multiply(floats(z), w, labels, z.shape[1], True, kept)[:, 0]
    return finish(y if bias is None else y + bias, activation).to(z.dtype)


OPERATIONS = {"split_matmul": split_matmul, "merge_matmul": merge_matmul, "partition_grad": partition_grad_eager}
