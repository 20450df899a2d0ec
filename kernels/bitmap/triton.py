"""The bitmap operations on the GPU: a kernel moves values to their places or back, and helpers read tiles of them.

Holes of a seed have a kernel of their own (:mod:`.holes_triton`).

A program takes a tile. How many values stand before each of its rows is stored for runs of words
(:func:`values_before`), and the ones before a bit are counted. So no program waits for another, and nothing is added
atomically. Values are moved as integers, whatever their type.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import interpreting
from ..epilogue import rows_contiguous
from .existence import Kept
from .holes_triton import move_by_seed
from .layout import BASE, RUN, WORD, Bitmap

BLOCK_N, BLOCK_K = 8, 256
"""Rows and columns of a program that moves values."""


@triton.jit
def count_ones(words, INTERPRETED: tl.constexpr):
    """How many bits of each 32-bit word are set; the interpreter cannot run the instruction for it."""
    if INTERPRETED:
        words = words - ((words >> 1) & 0x55555555)
        words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
        count = (((words + (words >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    else:
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    return count


@triton.jit
def values_before(
    bits_ptr,
    starts_ptr,
    bases_ptr,
    rows,
    row_mask,
    word,
    WORDS,
    RUN: tl.constexpr,
    BASE: tl.constexpr,
    WORD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """How many values stand before a word of some rows, ``[rows]``: those before its run, and the run's ones."""
    at = rows.to(tl.int64) * WORDS + word
    inside = tl.where(word < WORDS, row_mask, False)  # Triton 3.9's interpreter takes no vector & scalar for a mask
    run = at // (RUN // WORD)
    bases = tl.load(bases_ptr + run // (BASE // RUN), mask=inside, other=0)
    starts = tl.load(starts_ptr + run, mask=inside, other=0).to(tl.int32) & 0xFFFF
    offs_w = (run * (RUN // WORD))[:, None] + tl.arange(0, RUN // WORD)[None, :]
    earlier = tl.load(bits_ptr + offs_w, mask=inside[:, None] & (offs_w < at[:, None]), other=0)
    return bases + starts + tl.sum(count_ones(earlier, INTERPRETED), 1)


@triton.jit
def two_follow(starts_ptr, bases_ptr, row, N, WORDS, NNZ, RUN: tl.constexpr, BASE: tl.constexpr, WORD: tl.constexpr):
    """Whether at least two values follow those of the rows before ``row``: true if two follow the run that it is in."""
    run = row.to(tl.int64) * WORDS // (RUN // WORD) + 1
    inside = run < tl.cdiv(tl.cast(N, tl.int64) * WORDS, RUN // WORD)
    base = tl.load(bases_ptr + run // (BASE // RUN), mask=inside, other=0)
    start = tl.load(starts_ptr + run, mask=inside, other=0).to(tl.int32) & 0xFFFF
    return inside & (base + start + 2 <= NNZ)


@triton.jit
def bits_of_tile(
    bits_ptr, rows, row_mask, word, WORDS, before, BLOCK_K: tl.constexpr, WORD: tl.constexpr, INTERPRETED: tl.constexpr
):
    """A tile's words of bits, the values before each of them (``[rows, BLOCK_K / WORD]``), and those up to its end.

    A value's number is the sum of the ones before the tile, which is given, in the words before its own, and below its
    bit. The tile begins with a word, and ``BLOCK_K`` is a power of two, ``WORD`` or more.
    """
    offs_w = word + tl.arange(0, BLOCK_K // WORD)
    words_at = bits_ptr + rows.to(tl.int64)[:, None] * WORDS + offs_w[None, :]
    words = tl.load(words_at, mask=row_mask[:, None] & (offs_w[None, :] < WORDS), other=0)
    counts = count_ones(words, INTERPRETED)
    return words, before[:, None] + (tl.cumsum(counts, 1) - counts), before + tl.sum(counts, 1)


@triton.jit
def kept_tile(
    bits_ptr, rows, row_mask, word, WORDS, before, BLOCK_K: tl.constexpr, WORD: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Which entries of a tile exist and which value each is, both ``[rows, BLOCK_K]``, and the values up to its end.

    Neighbouring lanes have neighbouring bits, so that they read neighbouring values.
    """
    words, firsts, after = bits_of_tile(
        bits_ptr, rows, row_mask, word, WORDS, before, BLOCK_K, WORD, INTERPRETED
    )  # fmt: skip
    bit = tl.arange(0, WORD)[None, None, :]
    numbers = firsts[:, :, None] + count_ones(words[:, :, None] & ((1 << bit) - 1), INTERPRETED)
    exists = ((words[:, :, None] >> bit) & 1) != 0  # [rows, BLOCK_K / WORD, WORD]
    ROWS: tl.constexpr = words.shape[0]
    return exists.reshape(ROWS, BLOCK_K), numbers.reshape(ROWS, BLOCK_K), after


@triton.jit
def in_place(first, second, pairs, INTERPRETED: tl.constexpr):
    """Words of two neighbours, from those that exist in order: ``pairs`` has bit 0 for the lower, 1 for the upper."""
    if INTERPRETED:
        words = tl.where(pairs % 2 == 1, first, 0) | (
            tl.where(pairs == 3, second, tl.where(pairs == 2, first, 0)) << 16
        )
    else:
        # One permutation of bytes for every case; bytes 2 and 3 of the first are zero.
        cases: tl.constexpr = 0x5410_1032_3210_3232
        case = (cases >> (pairs << 4).to(tl.int64)).to(tl.int32)
        operands = [first, second, case]
        words = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", operands, dtype=tl.int32, is_pure=True, pack=1
        )
    return words


@triton.jit
def kept_pairs(
    values_ptr,
    bits_ptr,
    rows,
    row_mask,
    word,
    WORDS,
    before,
    GUARDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile of 16-bit values in their places, two to a word ``[rows, BLOCK_K / 2]``, and the values up to its end.

    Two neighbours cost one count and one address: the first that exists is there and, if both do, the second behind it.
    Without ``GUARDED`` both places are read whatever exists, because a load that may be skipped costs more. Then two
    more values must follow those of the tile. The interpreter reads only what exists, so that its trace is exact.
    """
    words, firsts, after = bits_of_tile(
        bits_ptr, rows, row_mask, word, WORDS, before, BLOCK_K, WORD, INTERPRETED
    )  # fmt: skip
    bit = 2 * tl.arange(0, WORD // 2)[None, None, :]
    pairs = (words[:, :, None] >> bit) & 3  # [rows, BLOCK_K / WORD, WORD / 2]
    values_at = values_ptr + (firsts[:, :, None] + count_ones(words[:, :, None] & ((1 << bit) - 1), INTERPRETED))
    if GUARDED or INTERPRETED:
        first = tl.load(values_at, mask=pairs != 0, other=0)
        second = tl.load(values_at + 1, mask=pairs == 3, other=0)
    else:
        first = tl.load(values_at)
        second = tl.load(values_at + 1)
    first, second = first.to(tl.uint16, bitcast=True).to(tl.int32), second.to(tl.uint16, bitcast=True).to(tl.int32)
    ROWS: tl.constexpr = words.shape[0]
    return in_place(first, second, pairs, INTERPRETED).reshape(ROWS, BLOCK_K // 2), after


@triton.jit
def _bitmap_move(
    values_ptr,
    dense_ptr,
    bits_ptr,
    starts_ptr,
    bases_ptr,
    N,
    K,
    WORDS,
    stride_dn,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    BASE: tl.constexpr,
    WORD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    pid, tiles = tl.program_id(0), tl.cdiv(K, BLOCK_K)
    pid_n, pid_k = pid // tiles, pid % tiles
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, word = offs_n < N, pid_k * (BLOCK_K // WORD)
    before = values_before(
        bits_ptr, starts_ptr, bases_ptr, offs_n, mask_n, word, WORDS, RUN, BASE, WORD, INTERPRETED
    )  # fmt: skip
    exists, numbers, _ = kept_tile(bits_ptr, offs_n, mask_n, word, WORDS, before, BLOCK_K, WORD, INTERPRETED)

    values_at = values_ptr + numbers
    dense_at = dense_ptr + offs_n[:, None] * stride_dn + offs_k[None, :]
    if PACK:
        tl.store(values_at, tl.load(dense_at, mask=exists, other=0), mask=exists)  # [BLOCK_N, BLOCK_K]
    else:
        values = tl.load(values_at, mask=exists, other=0)  # [BLOCK_N, BLOCK_K]
        tl.store(dense_at, values, mask=mask_n[:, None] & (offs_k[None, :] < K))


def move_by_bits(values: Tensor, dense: Tensor, kept: Bitmap, pack: bool) -> None:
    """Takes kept values from the weight ``dense``, or writes them there; both are integers of their size."""
    n, k = dense.shape
    _bitmap_move[(triton.cdiv(n, BLOCK_N) * triton.cdiv(k, BLOCK_K),)](
        values,
        dense,
        *(t.contiguous() for t in kept.tensors),
        N=n,
        K=k,
        WORDS=kept.bits.shape[1],
        stride_dn=dense.stride(0),
        PACK=pack,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        RUN=RUN,
        BASE=BASE,
        WORD=WORD,
        INTERPRETED=interpreting(),
        num_warps=4,
    )


AS_BITS = {2: torch.int16, 4: torch.int32}
"""The integers as which values are moved, by their size in bytes."""


def _move(values: Tensor, dense: Tensor, kept: Kept, pack: bool) -> None:
    """Launches the kernel for this kind of ``kept``, if there is anything to move."""
    if not dense.numel():
        return
    integers = AS_BITS[values.element_size()]
    with torch.cuda.device_of(values):
        operands = values.view(integers), dense.view(integers)
        if isinstance(kept, Bitmap):
            move_by_bits(*operands, kept, pack)
        else:
            move_by_seed(*operands, kept, pack)


def unpack_values_triton(values: Tensor, kept: Kept) -> Tensor:
    """See :func:`fpe.kernels.unpack_values`; the result is in stored order, ``kept.shape``."""
    dense = values.new_empty(kept.shape)
    _move(values.contiguous(), dense, kept, pack=False)
    return dense


def pack_values_triton(w: Tensor, kept: Kept) -> Tensor:
    """See :func:`fpe.kernels.pack_values`; ``w`` is in stored order, ``kept.shape``."""
    values = w.new_empty(kept.nnz)
    _move(values, rows_contiguous(w), kept, pack=True)
    return values


OPERATIONS = {"unpack_values": unpack_values_triton, "pack_values": pack_values_triton}
