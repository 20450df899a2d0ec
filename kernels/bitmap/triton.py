"""The bitmap operations on the GPU: one kernel moves values to their places or back.

A program takes one run of 256 positions of some rows. A value's place is the run's start, which is stored, and the
ones before its bit, which a scan counts: no program waits for another, nothing is added atomically. What is moved are
bits, of any type.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..epilogue import rows_contiguous
from .layout import RUN, WORD, Bitmap

ROWS = 8
"""Rows to a program: a warp has two of them, and a lane 16 neighbouring positions."""


@triton.jit
def ranks(words, RUN: tl.constexpr, WORD: tl.constexpr):
    """The bits of words ``[rows, RUN / WORD]`` one by one, and how many ones stand before each: ``[rows, RUN]``."""
    bits = (words[:, :, None] >> tl.arange(0, WORD)[None, None, :]) & 1  # [rows, words, bits]
    bits = bits.reshape(words.shape[0], RUN)
    return bits, tl.cumsum(bits, 1) - bits


@triton.jit
def _bitmap_move(
    values_ptr,
    dense_ptr,
    bits_ptr,
    starts_ptr,
    N,
    K,
    RUNS,
    WORDS,
    stride_dn,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    WORD: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_n, run = pid // RUNS, pid % RUNS
    offs_n = pid_n.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_n = offs_n < N
    offs_w = run * (RUN // WORD) + tl.arange(0, RUN // WORD)
    mask_w = mask_n[:, None] & (offs_w[None, :] < WORDS)
    words = tl.load(bits_ptr + offs_n[:, None] * WORDS + offs_w[None, :], mask=mask_w, other=0)  # [ROWS, RUN / WORD]
    bits, before = ranks(words, RUN, WORD)
    starts = tl.load(starts_ptr + offs_n * RUNS + run, mask=mask_n, other=0).to(tl.int64)  # [ROWS]

    offs_k = run * RUN + tl.arange(0, RUN)
    values_at = values_ptr + starts[:, None] + before
    dense_at = dense_ptr + offs_n[:, None] * stride_dn + offs_k[None, :]
    if PACK:
        tl.store(values_at, tl.load(dense_at, mask=bits != 0, other=0), mask=bits != 0)  # [ROWS, RUN]
    else:
        values = tl.load(values_at, mask=bits != 0, other=0)  # [ROWS, RUN]
        tl.store(dense_at, values, mask=mask_n[:, None] & (offs_k[None, :] < K))


AS_BITS = {2: torch.int16, 4: torch.int32}
"""By size in bytes: what numbers are moved as."""


def _launch(values: Tensor, dense: Tensor, kept: Bitmap, pack: bool) -> None:
    (n, k), (words, runs) = dense.shape, (kept.bits.shape[1], kept.starts.shape[1])
    if not n * k:
        return
    integers = AS_BITS[values.element_size()]
    with torch.cuda.device_of(values):
        _bitmap_move[(triton.cdiv(n, ROWS) * runs,)](
            values.view(integers),
            dense.view(integers),
            kept.bits.contiguous(),
            kept.starts.contiguous(),
            N=n,
            K=k,
            RUNS=runs,
            WORDS=words,
            stride_dn=dense.stride(0),
            PACK=pack,
            ROWS=ROWS,
            RUN=RUN,
            WORD=WORD,
            num_warps=4,
        )


def unpack_values_triton(values: Tensor, kept: Bitmap) -> Tensor:
    """See :func:`fpe.kernels.unpack_values`; in stored order."""
    dense = values.new_empty(kept.shape)
    _launch(values.contiguous(), dense, kept, pack=False)
    return dense


def pack_values_triton(w: Tensor, kept: Bitmap) -> Tensor:
    """See :func:`fpe.kernels.pack_values`; in stored order."""
    values = w.new_empty(kept.nnz)
    _launch(values, rows_contiguous(w), kept, pack=True)
    return values


OPERATIONS = {"unpack_values": unpack_values_triton, "pack_values": pack_values_triton}
