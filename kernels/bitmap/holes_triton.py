"""Holes of a seed on the GPU: one kernel moves kept values to their places or back.

A program takes 256 columns of eight rows. It computes their words of bits as :mod:`.holes` does. A value's place is the
sum of where its row begins, of the number of values in the words before its own, and of the ones below its bit. No
program waits for another.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..hashing import COLUMN, MIX, ROW, signed
from .holes import COLUMNS, SWAPS, SeededHoles

ROWS, WORDS = 8, 8
"""Rows and words of a program."""

_ROW, _COLUMN = signed(ROW), signed(COLUMN)
_FIRST, _SECOND = (signed(factor) for _, factor in MIX)
_LOWER = tuple(lower for _, lower in SWAPS)


@triton.jit
def hole_words(
    KEY,
    COUNT,
    K,
    rows,
    words,
    COLUMNS: tl.constexpr,
    LOWER: tl.constexpr = _LOWER,
    ROW: tl.constexpr = _ROW,
    COLUMN: tl.constexpr = _COLUMN,
    FIRST: tl.constexpr = _FIRST,
    SECOND: tl.constexpr = _SECOND,
):
    """The bits of some words of some rows, and how many values of a row come before each word; shapes are broadcast.

    Its constants are defaults: globals of a helper would enter the key of Triton's cache by the order of compilation.
    """
    first = tl.minimum(words * COLUMNS, K)
    size = tl.minimum(K - first, COLUMNS)
    before = first.to(tl.int64) * COUNT // K
    kept = ((first + size).to(tl.int64) * COUNT // K - before).to(tl.int32)
    x = rows * ROW + words * COLUMN + KEY
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 13) & 0x7FFFF)) * SECOND
    x = x ^ ((x >> 16) & 0xFFFF)
    bits = tl.where(kept == COLUMNS, -1, (1 << (kept & (COLUMNS - 1))) - 1)
    for i in tl.static_range(5):
        inside = (1 << tl.maximum(size - (16 >> i), 0)) - 1
        changed = (bits ^ (bits >> (16 >> i))) & x & LOWER[i] & inside
        bits = bits ^ changed ^ (changed << (16 >> i))
        x = (x ^ ((x >> 15) & 0x1FFFF)) * ROW
    return bits, before


@triton.jit(do_not_specialize=["KEY"])
def _holes_move(
    values_ptr,
    dense_ptr,
    N,
    K,
    COUNT,
    KEY,
    stride_dn,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    parts = tl.cdiv(K, WORDS * COLUMNS)
    pid_n, pid_k = tl.program_id(0) // parts, tl.program_id(0) % parts
    offs_n = pid_n * ROWS + tl.arange(0, ROWS)
    offs_w = pid_k * WORDS + tl.arange(0, WORDS)
    words, before = hole_words(KEY, COUNT, K, offs_n[:, None], offs_w[None, :], COLUMNS)
    bits = (words[:, :, None] >> tl.arange(0, COLUMNS)[None, None, :]) & 1  # [ROWS, WORDS, COLUMNS]
    places = before[:, :, None] + (tl.cumsum(bits, 2) - bits)
    exists = (bits != 0).reshape(ROWS, WORDS * COLUMNS) & (offs_n < N)[:, None]
    rows = offs_n.to(tl.int64)
    values_at = values_ptr + rows[:, None] * COUNT + places.reshape(ROWS, WORDS * COLUMNS)
    offs_k = pid_k * (WORDS * COLUMNS) + tl.arange(0, WORDS * COLUMNS)
    dense_at = dense_ptr + rows[:, None] * stride_dn + offs_k[None, :]
    if PACK:
        tl.store(values_at, tl.load(dense_at, mask=exists, other=0), mask=exists)
    else:
        values = tl.load(values_at, mask=exists, other=0)  # [ROWS, WORDS * COLUMNS]
        tl.store(dense_at, values, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def move_by_seed(values: Tensor, dense: Tensor, kept: SeededHoles, pack: bool) -> None:
    """Takes kept values from the weight ``dense``, or writes them there; both are integers of their size."""
    n, k = dense.shape
    _holes_move[(triton.cdiv(n, ROWS) * triton.cdiv(k, WORDS * COLUMNS),)](
        values,
        dense,
        N=n,
        K=k,
        COUNT=kept.per_row,
        KEY=kept.key,
        stride_dn=dense.stride(0),
        PACK=pack,
        ROWS=ROWS,
        WORDS=WORDS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
