"""Quads of four inputs, of which two are stored: moves their values to their places and back.

The two values of a quad are loaded as one integer, with one code. With two children the values of both are read once,
and the second child's code is computed from the first's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..epilogue import rows_contiguous
from .layout import SemiStructuredLayout


@triton.jit
def _complement(code):
    apart = ((code >> 3) ^ (code >> 1)) & 1
    return code ^ 10 ^ (apart * 15)


@triton.jit
def _load_codes(codes_ptr, offs_n, mask_n, quad, QUADS, stride_cn, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Codes of ``BLOCK_Q`` quads from ``quad`` on, each in an int32 ``[BLOCK_N, BLOCK_Q]``; 0 outside."""
    offs = quad // 2 + tl.arange(0, BLOCK_Q // 2)
    mask = mask_n[:, None] & (2 * offs < QUADS)[None, :]
    byte = tl.load(codes_ptr + offs_n[:, None].to(tl.int64) * stride_cn + offs[None, :], mask=mask, other=0)
    byte = byte.to(tl.int32)
    return tl.join(byte & 15, byte >> 4).reshape(BLOCK_N, BLOCK_Q)


@triton.jit
def _expand(pair, code, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Pairs of values ``[BLOCK_N, BLOCK_Q]`` at their places: a dense tile ``[BLOCK_N, 4 * BLOCK_Q]``.

    The four inputs of a quad are two pairs, ``low`` and ``high``. Each pair takes those of the two values that belong
    to it and shifts them to their place in it. These integer operations on pairs are fewer than choosing each element.
    """
    BITS: tl.constexpr = dtype.primitive_bitwidth
    wide: tl.constexpr = tl.uint32 if BITS == 16 else tl.uint64
    half: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    p = pair.to(wide, bitcast=True)
    c = code.to(wide)
    one = tl.full([1, 1], (1 << BITS) - 1, dtype=wide)
    both = tl.full([1, 1], (1 << 2 * BITS) - 1, dtype=wide)
    # The values of the low pair: both where the second's index is 0 or 1, none where the first's is 2 or 3.
    mine = tl.where((code & 8) == 0, both, tl.where((code & 2) == 0, one, tl.zeros_like(one)))
    low = (p & mine) << ((c & 1) * BITS)
    high = (p ^ (p & mine)) >> (((c & 4) ^ 4) * (BITS // 4))
    dense = tl.join(low, high).reshape(pair.shape[0], 2 * pair.shape[1])
    tile = tl.join(dense.to(half), (dense >> BITS).to(half)).reshape(pair.shape[0], 4 * pair.shape[1])
    tile = tile.to(dtype, bitcast=True)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _select(acc, code, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The two entries of each quad that are stored: ``[BLOCK_N, 4 * BLOCK_Q]`` to ``[BLOCK_N, 2 * BLOCK_Q]``."""
    even, odd = tl.split(acc.reshape(BLOCK_N, BLOCK_Q, 2, 2))
    e0, e2 = tl.split(even)
    e1, e3 = tl.split(odd)
    at_first = code & 3
    at_second = code >> 2
    first = tl.where(at_first == 0, e0, tl.where(at_first == 1, e1, e2))
    second = tl.where(at_second == 1, e1, tl.where(at_second == 2, e2, e3))
    return tl.join(first, second).reshape(BLOCK_N, 2 * BLOCK_Q)


@triton.jit
def _compress(
    w_ptr,
    codes_ptr,
    out_ptr,
    N,
    K,
    QUADS,
    stride_wn,
    stride_cn,
    stride_vc,
    CHILDREN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_K // 4
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = tl.program_id(1) * BLOCK_Q * 2 + tl.arange(0, 2 * BLOCK_Q)
    mask_n = offs_n < N
    w = tl.load(
        w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :],
        mask=mask_n[:, None] & (offs_k < K)[None, :],
        other=0,
    )  # [BLOCK_N, BLOCK_K]
    code = _load_codes(codes_ptr, offs_n, mask_n, tl.program_id(1) * BLOCK_Q, QUADS, stride_cn, BLOCK_N, BLOCK_Q)
    out = out_ptr + offs_n[:, None].to(tl.int64) * (2 * QUADS) + offs_v[None, :]
    mask = mask_n[:, None] & (offs_v < 2 * QUADS)[None, :]
    tl.store(out, _select(w, code, BLOCK_N, BLOCK_Q), mask=mask)
    if CHILDREN == 2:
        second = _select(w, _complement(code), BLOCK_N, BLOCK_Q)
        tl.store(out + stride_vc, second, mask=mask)


@triton.jit
def _spread(
    pair_ptr,
    codes_ptr,
    out_ptr,
    N,
    K,
    QUADS,
    stride_cn,
    stride_vc,
    CHILDREN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_K // 4
    quad = tl.program_id(1) * BLOCK_Q
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_q = quad + tl.arange(0, BLOCK_Q)
    mask_n = offs_n < N
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    code = _load_codes(codes_ptr, offs_n, mask_n, quad, QUADS, stride_cn, BLOCK_N, BLOCK_Q)
    pairs = pair_ptr + offs_n[:, None].to(tl.int64) * QUADS + offs_q[None, :]
    mask_q = mask_n[:, None] & (offs_q < QUADS)[None, :]
    tile = _expand(tl.load(pairs, mask=mask_q, other=0), code, dtype, False)  # [BLOCK_N, BLOCK_K]
    if CHILDREN == 2:
        # The children's places do not overlap: an OR of their bits adds the numbers.
        second = tl.load(pairs + stride_vc, mask=mask_q, other=0)  # [BLOCK_N, BLOCK_Q]
        tile = tile | _expand(second, _complement(code), dtype, False)
    out = out_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    tl.store(out, tile, mask=mask_n[:, None] & (offs_k < K)[None, :])


def semi_structured_compress_triton(w: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """Stored values of ``w[N, K]``; see :func:`fpe.kernels.semi_structured_compress`."""
    w = rows_contiguous(w)
    values = w.new_empty(layout.values_shape)
    if values.numel():
        _launch_copy(_compress, _bits(w), layout, _bits(values), 2, stride_wn=w.stride(0))
    return values


def semi_structured_expand_triton(values: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """The adjoint: the children's dense weights, added, ``[N, K]``."""
    w = values.new_empty(layout.shape)
    if w.numel():
        _launch_copy(_spread, pairs_of(values), layout, _bits(w), 1)
    return w


def _launch_copy(
    kernel: Any, source: Tensor, layout: SemiStructuredLayout, out: Tensor, per_quad: int, **strides: int
) -> None:
    block_n, block_k = 16, 256
    with torch.cuda.device_of(source):
        kernel[(triton.cdiv(layout.shape[0], block_n), triton.cdiv(layout.shape[1], block_k))](
            source,
            layout.codes.contiguous(),
            out,
            N=layout.shape[0],
            K=layout.shape[1],
            QUADS=layout.quads,
            stride_cn=layout.codes.shape[1],
            stride_vc=layout.shape[0] * layout.quads * per_quad,
            CHILDREN=layout.children,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=4,
            **strides,
        )


def _bits(t: Tensor) -> Tensor:
    """Returns the same memory as integers: values that are only moved need no arithmetic."""
    return t.view(torch.int16 if t.element_size() == 2 else torch.int32)


def pairs_of(values: Tensor) -> Tensor:
    """The two values of each quad as one integer, in one dimension: int32 for 16-bit values, int64 for float32."""
    flat = values.contiguous().view(-1)
    whole = flat if flat.storage_offset() % 2 == 0 else flat.clone()
    return whole.view(torch.int32 if values.element_size() == 2 else torch.int64)
