"""The semi-structured products on dense tensor cores: weights stay compressed in memory, expanded in registers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import device_of, stored_dtype
from ..epilogue import in_groups, launch_options, multiply, multiply_loaded, rows_contiguous, summed
from ..tables import choose
from .config import Config, Problem
from .layout import SemiStructuredLayout
from .quads import (
    _complement,
    _expand,
    _load_codes,
    _select,
    pairs_of,
    semi_structured_compress_triton,
    semi_structured_expand_triton,
)


@triton.jit(do_not_specialize=["M"])
def _multiply(
    x_ptr,
    pair_ptr,  # values, two to an integer
    codes_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    QUADS,
    stride_xm,
    stride_cn,
    stride_vc,
    stride_os,
    CHILDREN: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_K // 4
    pid_m, pid_n = in_groups(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    pid_split = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    offs_q = tl.arange(0, BLOCK_Q)
    # Offsets along M are expanded along this axis, those along the other axis of a tile along the other one.
    AXIS: tl.constexpr = 1 if TURNED else 0
    x_rows, rows = x_ptr + tl.expand_dims(offs_m.to(tl.int64) * stride_xm, AXIS), tl.expand_dims(mask_m, AXIS)
    pair_rows = pair_ptr + offs_n[:, None].to(tl.int64) * QUADS
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    acc0 = tl.zeros([BLOCK_M, BLOCK_N] if TURNED else [BLOCK_N, BLOCK_M], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_N] if TURNED else [BLOCK_N, BLOCK_M], dtype=tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    for step in range(steps * pid_split // SPLIT, steps * (pid_split + 1) // SPLIT):
        quad = step * BLOCK_Q
        mask_x = rows
        mask_q = mask_n[:, None]
        offs_x = tl.expand_dims(step * BLOCK_K + offs_k, 1 - AXIS)
        if not EVEN_K:
            mask_x = mask_x & (offs_x < K)
            mask_q = mask_q & (quad + offs_q < QUADS)[None, :]
        x = tl.load(x_rows + offs_x, mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K] if TURNED
        if UPCAST:
            x = x.to(tl.float32)
        code = _load_codes(codes_ptr, offs_n, mask_n, quad, QUADS, stride_cn, BLOCK_N, BLOCK_Q)
        pair = tl.load(pair_rows + quad + offs_q[None, :], mask=mask_q, other=0)  # [BLOCK_N, BLOCK_Q]
        acc0 = multiply(_expand(pair, code, dtype, UPCAST), x, acc0, TURNED, PRECISION)
        if CHILDREN == 2:
            pair = tl.load(pair_rows + stride_vc + quad + offs_q[None, :], mask=mask_q, other=0)  # [BLOCK_N, BLOCK_Q]
            acc1 = multiply(_expand(pair, _complement(code), dtype, UPCAST), x, acc1, TURNED, PRECISION)

    if HAS_BIAS and SPLIT == 1:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        acc0 += tl.expand_dims(bias, 1 - AXIS)
        if CHILDREN == 2:
            bias = tl.load(bias_ptr + N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            acc1 += tl.expand_dims(bias, 1 - AXIS)
    row = tl.expand_dims(offs_m.to(tl.int64) * CHILDREN * N, AXIS)
    out = out_ptr + pid_split.to(tl.int64) * stride_os + row + tl.expand_dims(offs_n, 1 - AXIS)
    mask = rows & tl.expand_dims(mask_n, 1 - AXIS)
    tl.store(out, acc0.to(out_ptr.dtype.element_ty), mask=mask)
    if CHILDREN == 2:
        tl.store(out + N, acc1.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _multiply_t(
    dy_ptr,
    pair_ptr,  # values, two to an integer
    codes_ptr,
    out_ptr,
    M,
    N,
    K,
    QUADS,
    stride_dym,
    stride_dyc,
    stride_cn,
    stride_vc,
    stride_os,
    CHILDREN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_K // 4
    pid_m, pid_k = in_groups(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    pid_split = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    quad = pid_k * BLOCK_Q
    offs_q = quad + tl.arange(0, BLOCK_Q)
    dtype: tl.constexpr = dy_ptr.dtype.element_ty

    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    steps = tl.cdiv(N, BLOCK_N)
    for step in range(steps * pid_split // SPLIT, steps * (pid_split + 1) // SPLIT):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask_dy = mask_m[:, None] & mask_n[None, :]
        mask_q = mask_n[:, None] & (offs_q < QUADS)[None, :]
        code = _load_codes(codes_ptr, offs_n, mask_n, quad, QUADS, stride_cn, BLOCK_N, BLOCK_Q)
        dy_tile = dy_ptr + offs_m[:, None].to(tl.int64) * stride_dym + offs_n[None, :]
        pair_tile = pair_ptr + offs_n[:, None].to(tl.int64) * QUADS + offs_q[None, :]
        dy = tl.load(dy_tile, mask=mask_dy, other=0.0)  # [BLOCK_M, BLOCK_N]
        pair = tl.load(pair_tile, mask=mask_q, other=0)  # [BLOCK_N, BLOCK_Q]
        if UPCAST:
            dy = dy.to(tl.float32)
        acc = tl.dot(dy, _expand(pair, code, dtype, UPCAST), acc, input_precision=PRECISION)
        if CHILDREN == 2:
            dy = tl.load(dy_tile + stride_dyc, mask=mask_dy, other=0.0)  # [BLOCK_M, BLOCK_N]
            pair = tl.load(pair_tile + stride_vc, mask=mask_q, other=0)  # [BLOCK_N, BLOCK_Q]
            if UPCAST:
                dy = dy.to(tl.float32)
            acc = tl.dot(dy, _expand(pair, _complement(code), dtype, UPCAST), acc, input_precision=PRECISION)

    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    out = out_ptr + pid_split.to(tl.int64) * stride_os + offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_k < K)[None, :])


@triton.jit(do_not_specialize=["M"])
def _outer(
    dy_ptr,
    x_ptr,
    codes_ptr,
    out_ptr,
    M,
    N,
    K,
    QUADS,
    stride_dym,
    stride_dyc,
    stride_xm,
    stride_cn,
    stride_vc,
    stride_os,
    CHILDREN: tl.constexpr,
    FENCED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_K // 4
    pid_n, pid_k = in_groups(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP)
    pid_split = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K

    acc0 = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    steps = tl.cdiv(M, BLOCK_M)
    for step in range(steps * pid_split // SPLIT, steps * (pid_split + 1) // SPLIT):
        offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m.to(tl.int64)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        dy_tile = dy_ptr + rows[None, :] * stride_dym + offs_n[:, None]
        mask_dy = mask_m[None, :] & mask_n[:, None]
        dy = tl.load(dy_tile, mask=mask_dy, other=0.0)  # [BLOCK_N, BLOCK_M]
        if UPCAST:
            x, dy = x.to(tl.float32), dy.to(tl.float32)
        acc0 = multiply_loaded(dy, x, acc0, FENCED, PRECISION)
        if CHILDREN == 2:
            dy = tl.load(dy_tile + stride_dyc, mask=mask_dy, other=0.0)  # [BLOCK_N, BLOCK_M]
            if UPCAST:
                dy = dy.to(tl.float32)
            acc1 = multiply_loaded(dy, x, acc1, FENCED, PRECISION)

    code = _load_codes(codes_ptr, offs_n, mask_n, pid_k * BLOCK_Q, QUADS, stride_cn, BLOCK_N, BLOCK_Q)
    offs_v = pid_k * BLOCK_Q * 2 + tl.arange(0, 2 * BLOCK_Q)
    out = out_ptr + pid_split.to(tl.int64) * stride_os
    out += offs_n[:, None].to(tl.int64) * (2 * QUADS) + offs_v[None, :]
    mask = mask_n[:, None] & (offs_v < 2 * QUADS)[None, :]
    tl.store(out, _select(acc0, code, BLOCK_N, BLOCK_Q).to(out_ptr.dtype.element_ty), mask=mask)
    if CHILDREN == 2:
        chosen = _select(acc1, _complement(code), BLOCK_N, BLOCK_Q).to(out_ptr.dtype.element_ty)
        tl.store(out + stride_vc, chosen, mask=mask)


def semi_structured_matmul_triton(
    x: Tensor,
    values: Tensor,
    layout: SemiStructuredLayout,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Forward on ``x[M, K]``; see :func:`fpe.kernels.semi_structured_matmul`. ``config`` overrides the chosen one."""
    m, (n, k) = x.shape[0], layout.shape
    config = config or _chosen("semi_structured_matmul", m, layout, x)
    x, pairs, bias = rows_contiguous(x), pairs_of(values), None if bias is None else bias.contiguous()
    grid = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)

    def launch(out: Tensor) -> None:
        _multiply[(grid, config.split)](
            x,
            pairs,
            layout.codes.contiguous(),
            bias,
            out,
            stride_xm=x.stride(0),
            TURNED=device_of(x).computed_right,
            EVEN_K=k % config.block_k == 0,
            HAS_BIAS=bias is not None,
            **_shared_options(config, m, layout, x, out),
        )

    return _run(launch, (m, layout.children, n), config, x, bias)


def semi_structured_matmul_t_triton(
    dy: Tensor, values: Tensor, layout: SemiStructuredLayout, config: Config | None = None
) -> Tensor:
    """The gradient dX on ``dy[M, children, N]``; see :func:`fpe.kernels.semi_structured_matmul_t`."""
    m, k = dy.shape[0], layout.shape[1]
    config = config or _chosen("semi_structured_matmul_t", m, layout, dy)
    dy, pairs = rows_contiguous(dy), pairs_of(values)
    grid = triton.cdiv(m, config.block_m) * triton.cdiv(k, config.block_k)

    def launch(out: Tensor) -> None:
        _multiply_t[(grid, config.split)](
            dy,
            pairs,
            layout.codes.contiguous(),
            out,
            stride_dym=dy.stride(0),
            stride_dyc=dy.stride(1),
            **_shared_options(config, m, layout, dy, out),
        )

    return _run(launch, (m, k), config, dy)


def semi_structured_grad_triton(
    dy: Tensor, x: Tensor, layout: SemiStructuredLayout, config: Config | None = None
) -> Tensor:
    """The gradient dW of the stored values; see :func:`fpe.kernels.semi_structured_grad`."""
    m, (n, k) = x.shape[0], layout.shape
    config = config or _chosen("semi_structured_grad", m, layout, x)
    dy, x = rows_contiguous(dy), rows_contiguous(x)
    grid = triton.cdiv(n, config.block_n) * triton.cdiv(k, config.block_k)

    def launch(out: Tensor) -> None:
        _outer[(grid, config.split)](
            dy,
            x,
            layout.codes.contiguous(),
            out,
            stride_dym=dy.stride(0),
            stride_dyc=dy.stride(1),
            stride_xm=x.stride(0),
            FENCED=device_of(x).sets_fence,
            **_shared_options(config, m, layout, x, out, per_quad=2),
        )

    return _run(launch, layout.values_shape, config, x)


def _chosen(op: str, m: int, layout: SemiStructuredLayout, operand: Tensor) -> Config:
    problem = Problem(op, m, *layout.shape, layout.children, operand.element_size())
    return choose(problem, device_of(operand))


def _run(launch: Any, shape: tuple[int, ...], config: Config, operand: Tensor, bias: Tensor | None = None) -> Tensor:
    """Calls a launch with room for its result, and adds partial sums in a fixed order and then, if split, the bias."""
    dtype = torch.float32 if config.split > 1 else stored_dtype(operand)
    out = operand.new_empty((config.split, *shape), dtype=dtype)
    with torch.cuda.device_of(operand):
        if out.numel():
            launch(out)
        return summed(out, operand, bias if config.split > 1 else None)


def _shared_options(
    config: Config, m: int, layout: SemiStructuredLayout, operand: Tensor, out: Tensor, per_quad: int = 1
) -> dict[str, Any]:
    """Returns the launch options of all three kernels; a child has ``per_quad`` elements for each quad."""
    n, k = layout.shape
    return {
        "M": m,
        "N": n,
        "K": k,
        "QUADS": layout.quads,
        "stride_cn": layout.codes.shape[1],
        "stride_vc": n * layout.quads * per_quad,
        "stride_os": out.stride(0),
        "CHILDREN": layout.children,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        **launch_options(config, operand),
    }


OPERATIONS = {
    "semi_structured_matmul": semi_structured_matmul_triton,
    "semi_structured_matmul_t": semi_structured_matmul_t_triton,
    "semi_structured_grad": semi_structured_grad_triton,
    "semi_structured_compress": semi_structured_compress_triton,
    "semi_structured_expand": semi_structured_expand_triton,
}
