"""Packs 2:4 weights into the forms that sparse tensor cores take: one launch that reads and writes values once.

Values come from one of three places:

- stored values ``[children, N, 2 * quads]``: the forward of a 2:4 layer;
- a parent's weight, contiguous along rows or columns: a merge of children, whose values are the parent's in order;
- stored values of two children, transposed: dX of a 2:4 layer.

They go into one of three forms:

- ``"fragments"``: as ``mma.sp`` takes them (see ``fragments``);
- ``"rows"``: row after row, as CUTLASS takes them;
- ``"dense"``: the plain weight, zeros and all, of which cuSPARSELt makes its own form.

Values are only moved, as 16-bit integers: the result is bit for bit that of the eager packing, except for the sign of
zeros in dX. Codes and metadata follow from labels alone; they are made when labels change, not here.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fragments import TILE_QUADS, TILE_ROWS
from .quads import _complement, _expand, _load_codes

Form = Literal["fragments", "rows", "dense"]
ALONG, ACROSS = (64, 128), (128, 64)
"""Rows and stored columns of a tile where values are read along rows, and where they are read across them."""


@triton.jit
def _store(
    tile,  # stored values, int16 [BLOCK_R, BLOCK_C]
    codes_ptr,
    out_ptr,
    pid_r,
    pid_c,
    plane,
    N,
    STORED,
    INPUTS,
    stride_cn,
    stride_op,
    FORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    out = out_ptr + plane.to(tl.int64) * stride_op
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < N
    if FORM == "fragments":
        TILES: tl.constexpr = BLOCK_R // 32
        STEPS: tl.constexpr = BLOCK_C // 16  # instructions, 16 stored values of a row each
        tile = tile.reshape(TILES, 2, 2, 8, STEPS, 2, 4, 2)  # tile, half, row + 8, g, instruction, r, t, value
        tile = tl.permute(tile, (0, 4, 1, 3, 6, 5, 2, 7)).reshape(TILES, STEPS * 512)
        offs = pid_c * STEPS * 512 + tl.arange(0, STEPS * 512)
        first = (pid_r * TILES + tl.arange(0, TILES)).to(tl.int64) * (STORED * 32)
        tl.store(out + first[:, None] + offs[None, :], tile, mask=(offs < STORED * 32)[None, :])
    elif FORM == "rows":
        offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
        rows = out + offs_r.to(tl.int64)[:, None] * STORED
        tl.store(rows + offs_c[None, :], tile, mask=mask_r[:, None] & (offs_c < STORED)[None, :])
    else:
        BLOCK_Q: tl.constexpr = BLOCK_C // 2
        code = _load_codes(codes_ptr, offs_r, mask_r, pid_c * BLOCK_Q, STORED // 2, stride_cn, BLOCK_R, BLOCK_Q)
        code = tl.where(plane == 1, _complement(code), code)
        first, second = tl.split(tile.reshape(BLOCK_R, BLOCK_Q, 2))
        pair = (first.to(tl.int32) & 0xFFFF) | (second.to(tl.int32) << 16)
        offs_k = pid_c * BLOCK_C * 2 + tl.arange(0, BLOCK_C * 2)
        rows = out + offs_r.to(tl.int64)[:, None] * INPUTS
        mask = mask_r[:, None] & (offs_k < INPUTS)[None, :]
        tl.store(rows + offs_k[None, :], _expand(pair, code, tl.int16, False), mask=mask)


@triton.jit
def _pack(
    source_ptr,
    kept_ptr,
    codes_ptr,
    out_ptr,
    N,
    COLUMNS,
    STORED,
    INPUTS,
    stride_sp,
    stride_sn,
    stride_sc,
    stride_kn,
    stride_cn,
    stride_op,
    REPEAT: tl.constexpr,
    FORM: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCK_S: tl.constexpr = BLOCK_C // REPEAT
    pid_r, pid_c, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_s = pid_c * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = offs_r.to(tl.int64)[:, None]
    mask_r = (offs_r < N)[:, None]
    source = source_ptr + plane.to(tl.int64) * stride_sp + rows * stride_sn + offs_s.to(tl.int64)[None, :] * stride_sc
    tile = tl.load(source, mask=mask_r & (offs_s < COLUMNS)[None, :], other=0)  # [BLOCK_R, BLOCK_S]
    if REPEAT == 2:
        tile = tl.join(tile, tile).reshape(BLOCK_R, BLOCK_C)
    if HAS_KEPT:
        offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_k = mask_r & (offs_c < stride_kn)[None, :]
        kept = tl.load(kept_ptr + rows * stride_kn + offs_c[None, :], mask=mask_k, other=0)  # [BLOCK_R, BLOCK_C]
        tile = tl.where(kept != 0, tile, 0)
    _store(
        tile, codes_ptr, out_ptr, pid_r, pid_c, plane, N, STORED, INPUTS, stride_cn, stride_op, FORM, BLOCK_R, BLOCK_C
    )


@triton.jit
def _pack_transposed(
    pair_ptr,  # values of two children, two to an integer
    own_codes_ptr,
    codes_ptr,
    out_ptr,
    N,
    K,
    QUADS,
    STORED,
    INPUTS,
    stride_vc,
    stride_wn,
    stride_cn,
    FORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_R // 4
    pid_r, pid_c, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    quad = pid_r * BLOCK_Q
    offs_q = quad + tl.arange(0, BLOCK_Q)
    mask_n = offs_n < N
    code = _load_codes(own_codes_ptr, offs_n, mask_n, quad, QUADS, stride_wn, BLOCK_C, BLOCK_Q)
    pairs = pair_ptr + offs_n.to(tl.int64)[:, None] * QUADS + offs_q[None, :]
    mask = mask_n[:, None] & (offs_q < QUADS)[None, :]
    # The children's places are apart: their bits together are the parent's weight.
    tile = _expand(tl.load(pairs, mask=mask, other=0), code, tl.int16, False)  # [BLOCK_C, BLOCK_R]
    second = tl.load(pairs + stride_vc, mask=mask, other=0)  # [BLOCK_C, BLOCK_Q]
    tile = tile | _expand(second, _complement(code), tl.int16, False)
    tile = tl.trans(tl.where((offs_k < K)[None, :], tile, 0))
    _store(tile, codes_ptr, out_ptr, pid_r, pid_c, plane, K, STORED, INPUTS, stride_cn, 0, FORM, BLOCK_R, BLOCK_C)


def pack_values(values: Tensor, form: Form, codes: Tensor | None = None, k: int = 0) -> Tensor:
    """Packs stored values, child after child.

    Args:
        values: ``[children, N, 2 * quads]``, float16 or bfloat16.
        form: The form of the result.
        codes: The first child's, uint8 ``[N, ceil(quads / 2)]``; needed for form ``"dense"``.
        k: Number of inputs; needed for form ``"dense"``.

    Returns:
        ``"fragments"``: int32 ``[children, tiles, instructions, 2, 32, 4]``. ``"rows"``: ``[children * N, 2 * quads]``
        and ``"dense"``: ``[children * N, k]``, in the dtype of ``values``.

    Raises:
        TypeError: The values do not have 16 bits.
    """
    values = values.contiguous()
    children, n, stored = values.shape
    return _packed(values, (children, n, stored), values.stride(), None, form, codes, k, 1)


def pack_parent(
    w: Tensor, alpha: int, kept: Tensor | None, form: Form, codes: Tensor | None = None, k: int = 0
) -> Tensor:
    """Packs the weight that reads ``alpha`` children side by side.

    Args:
        w: The parent's ``[N, K]``, float16 or bfloat16, of any strides.
        alpha: 2, or 4, with which a zero is stored beside each value.
        kept: Which of the stored values are edges, bool ``[1, N, stored values]``; ``None`` where all are.
        form: The form of the result.
        codes: Of :meth:`~fpe.kernels.SemiStructuredLayout.interleaved`; needed for form ``"dense"``.
        k: Number of inputs, ``alpha * K``; needed for form ``"dense"``.

    Returns:
        What :func:`pack_values` returns for one child.

    Raises:
        TypeError: The weight does not have 16 bits.
    """
    n, columns = w.shape
    stored = alpha // 2 * columns + (columns % 2 if alpha == 2 else 0)
    return _packed(w, (1, n, stored), (0, *w.stride()), kept, form, codes, k, alpha // 2)


def pack_transposed(values: Tensor, codes: Tensor, k: int, form: Form, codes_t: Tensor | None = None) -> Tensor:
    """Packs the transposed weight of two children, ``[K, 2 * N]`` with a parent's children side by side.

    Args:
        values: ``[2, N, 2 * quads]``, float16 or bfloat16, zero where there is no edge.
        codes: The first child's codes of ``values``.
        k: Inputs of the children: rows of the result.
        form: The form of the result.
        codes_t: The codes of the result; needed for form ``"dense"``.

    Returns:
        What :func:`pack_values` returns for one child.

    Raises:
        TypeError: The values do not have 16 bits.
    """
    values = values.contiguous()
    _, n, width = values.shape
    stored = n + n % 2
    out, padded = _room(values, (1, k, stored), form, 2 * n)
    codes = codes.contiguous()
    beside = codes if codes_t is None else codes_t.contiguous()
    block_r, block_c = ACROSS
    with torch.cuda.device_of(values):
        if out.numel():
            _pack_transposed[_grid(form, 1, k, padded, ACROSS)](
                values.view(torch.int32),
                codes,
                beside,
                out.view(torch.int16),
                N=n,
                K=k,
                QUADS=width // 2,
                STORED=padded,
                INPUTS=2 * n,
                stride_vc=n * width // 2,
                stride_wn=codes.shape[1],
                stride_cn=beside.shape[1],
                FORM=form,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                num_warps=4,
            )
    return out


def _packed(
    source: Tensor,
    shape: tuple[int, int, int],
    strides: tuple[int, ...],
    kept: Tensor | None,
    form: Form,
    codes: Tensor | None,
    k: int,
    repeat: int,
) -> Tensor:
    """Packs a source into a form of ``shape`` stored values, to which each element of it goes ``repeat`` times."""
    planes, n, _ = shape
    out, padded = _room(source, shape, form, k)
    block_r, block_c = tile = ALONG if strides[2] == 1 else ACROSS
    kept = None if kept is None else kept.contiguous().view(torch.uint8)
    codes = None if codes is None else codes.contiguous()
    with torch.cuda.device_of(source):
        if out.numel():
            _pack[_grid(form, planes, n, padded, tile)](
                source.view(torch.int16),
                kept,
                codes,
                out.view(torch.int16),
                N=n,
                COLUMNS=source.shape[-1],
                STORED=padded,
                INPUTS=k,
                stride_sp=strides[0],
                stride_sn=strides[1],
                stride_sc=strides[2],
                stride_kn=0 if kept is None else kept.shape[2],
                stride_cn=0 if codes is None else codes.shape[1],
                stride_op=out.numel() * out.element_size() // 2 // planes,
                REPEAT=repeat,
                FORM=form,
                HAS_KEPT=kept is not None,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                num_warps=4,
            )
    return out


def _room(like: Tensor, shape: tuple[int, int, int], form: Form, k: int) -> tuple[Tensor, int]:
    """An empty result, and how many stored values one of its rows has, padding included."""
    planes, n, stored = shape
    if like.element_size() != 2:
        raise TypeError(f"pack: values must be float16 or bfloat16, got {like.dtype}")
    if form != "fragments":
        return like.new_empty(planes * n, stored if form == "rows" else k), stored
    whole = -(-stored // (2 * TILE_QUADS)) * 2 * TILE_QUADS
    tiles = -(-n // TILE_ROWS) * TILE_ROWS // 32
    return like.new_empty(planes, tiles, whole // 16, 2, 32, 4, dtype=torch.int32), whole


def _grid(form: Form, planes: int, n: int, stored: int, tile: tuple[int, int]) -> tuple[Any, ...]:
    """The grid of programs: tiles of rows (those of padding in fragments too), tiles of stored columns, children."""
    rows = -(-n // TILE_ROWS) * TILE_ROWS if form == "fragments" else n
    return triton.cdiv(rows, tile[0]), triton.cdiv(stored, tile[1]), planes
