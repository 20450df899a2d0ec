"""The block operations on the GPU: Triton kernels and their launchers.

There are two kernels. :func:`_block_multiply` is the forward and, reading blocks by column and not transposing them,
dX. :func:`_block_outer` is dW. Both may split their reduction over programs, so that enough of them run. The partial
sums are then added in a second launch, in a fixed order, so that results do not change between runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import device_of, input_precision, stored_dtype
from ..epilogue import activate, in_groups, launch_options, launch_reduce, multiply_loaded, rows_contiguous
from ..tables import choose
from .config import Config, grad_problem, matmul_problem
from .layout import BlockLayout


@triton.jit(do_not_specialize=["M"])
def _block_multiply(
    a_ptr,
    values_ptr,
    bias_ptr,
    out_ptr,
    segment_ptr,  # bounds of each segment: a block row (forward) or a block column (dX)
    block_ptr,  # storage position of a segment's blocks (dX); unused in the forward, where it is the identity
    tile_ptr,  # tile of a that each of a segment's blocks multiplies
    longest_ptr,  # segments, longest first
    M,
    SIZE_IN,
    SIZE_OUT,
    SEGMENTS,
    stride_am,
    stride_os,
    stride_om,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_IN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FENCED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    OUT: tl.constexpr = BK if TRANSPOSED else BN
    IN: tl.constexpr = BN if TRANSPOSED else BK
    STEPS: tl.constexpr = IN // BLOCK_IN

    pid_split = tl.program_id(1)
    pid_m, position = in_groups(tl.program_id(0), tl.cdiv(M, BLOCK_M), SEGMENTS, GROUP)
    segment = tl.load(longest_ptr + position)

    start = tl.load(segment_ptr + segment)
    count = tl.load(segment_ptr + segment + 1) - start
    stop = start + count * (pid_split + 1) // SPLIT
    start = start + count * pid_split // SPLIT

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_out = tl.arange(0, OUT)
    offs_in = tl.arange(0, BLOCK_IN)
    mask_m = offs_m[:, None] < M
    a_rows = a_ptr + offs_m[:, None].to(tl.int64) * stride_am
    # Blocks are stored [BN, BK]; the tile of weights is [BLOCK_IN, OUT] whichever way they are read.
    offs_v = offs_in[:, None] * BK + offs_out[None, :] if TRANSPOSED else offs_out[None, :] * BK + offs_in[:, None]
    STEP_V: tl.constexpr = BLOCK_IN * BK if TRANSPOSED else BLOCK_IN

    acc = tl.zeros([BLOCK_M, OUT], dtype=tl.float32)
    for step in range(start * STEPS, stop * STEPS):
        entry = step // STEPS
        inner = step % STEPS
        block = tl.load(block_ptr + entry) if TRANSPOSED else entry
        offs_k = tl.load(tile_ptr + entry) * IN + inner * BLOCK_IN + offs_in
        if EVEN_IN:
            a = tl.load(a_rows + offs_k[None, :], mask=mask_m, other=0.0)  # [BLOCK_M, BLOCK_IN]
        else:
            a = tl.load(a_rows + offs_k[None, :], mask=mask_m & (offs_k[None, :] < SIZE_IN), other=0.0)
        v = tl.load(values_ptr + block.to(tl.int64) * (BN * BK) + inner * STEP_V + offs_v)  # [BLOCK_IN, OUT]
        if UPCAST:
            a, v = a.to(tl.float32), v.to(tl.float32)
        acc = multiply_loaded(a, v, acc, FENCED, PRECISION)

    offs_n = segment * OUT + offs_out
    mask_n = offs_n[None, :] < SIZE_OUT
    if SPLIT == 1:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n[None, :], mask=mask_n, other=0.0).to(tl.float32)
        acc = activate(acc, ACTIVATION)
    out = out_ptr + pid_split.to(tl.int64) * stride_os + offs_m[:, None].to(tl.int64) * stride_om + offs_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_m & mask_n)


@triton.jit(do_not_specialize=["M"])
def _block_outer(
    dy_ptr,
    x_ptr,
    out_ptr,
    row_ptr,
    col_ptr,
    panel_ptr,  # the order in which programs take the blocks
    M,
    N,
    K,
    stride_dym,
    stride_xm,
    stride_os,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    FENCED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    block = tl.load(panel_ptr + tl.program_id(0))
    pid_split = tl.program_id(1)
    offs_n = tl.load(row_ptr + block) * BN + tl.arange(0, BN)
    offs_k = tl.load(col_ptr + block) * BK + tl.arange(0, BK)
    tiles_m = tl.cdiv(M, BLOCK_M)
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    for tile in range(tiles_m * pid_split // SPLIT, tiles_m * (pid_split + 1) // SPLIT):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m.to(tl.int64)
        mask_dy = mask_m[None, :] if EVEN_N else mask_m[None, :] & (offs_n[:, None] < N)
        mask_x = mask_m[:, None] if EVEN_K else mask_m[:, None] & (offs_k[None, :] < K)
        # Loaded as its transpose: tl.trans of a tile would send it through registers instead of shared memory.
        dy = tl.load(dy_ptr + rows[None, :] * stride_dym + offs_n[:, None], mask=mask_dy, other=0.0)  # [BN, BLOCK_M]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + offs_k[None, :], mask=mask_x, other=0.0)  # [BLOCK_M, BK]
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        acc = multiply_loaded(dy, x, acc, FENCED, PRECISION)
    offs_v = tl.arange(0, BN)[:, None] * BK + tl.arange(0, BK)[None, :]
    out = out_ptr + pid_split.to(tl.int64) * stride_os + block.to(tl.int64) * (BN * BK) + offs_v
    tl.store(out, acc.to(out_ptr.dtype.element_ty))


def block_matmul_triton(
    x: Tensor,
    values: Tensor,
    layout: BlockLayout,
    bias: Tensor | None = None,
    activation: str | None = None,
    config: Config | None = None,
) -> Tensor:
    """Forward on ``x[M, K]``; see :func:`fpe.kernels.block_matmul`. ``config`` overrides the chosen one."""
    with torch.cuda.device_of(x):
        return _launch_multiply(x, values, layout, False, bias, activation, config)


def block_matmul_t_triton(dy: Tensor, values: Tensor, layout: BlockLayout, config: Config | None = None) -> Tensor:
    """The gradient dX on ``dy[M, N]``; see :func:`fpe.kernels.block_matmul_t`."""
    with torch.cuda.device_of(dy):
        return _launch_multiply(dy, values, layout, True, None, None, config)


def block_grad_triton(dy: Tensor, x: Tensor, layout: BlockLayout, config: Config | None = None) -> Tensor:
    """The gradient dW of the kept blocks; see :func:`fpe.kernels.block_grad`."""
    with torch.cuda.device_of(x):
        return _launch_outer(dy, x, layout, config)


def _launch_outer(dy: Tensor, x: Tensor, layout: BlockLayout, config: Config | None) -> Tensor:
    dy, x = rows_contiguous(dy), rows_contiguous(x)
    m = x.shape[0]
    config = config or choose(grad_problem(layout, m, x.element_size()), device_of(x))
    values = x.new_empty(layout.values_shape, dtype=stored_dtype(x))
    if not values.numel():
        return values.to(x.dtype)
    out = values if config.split == 1 else x.new_empty((config.split, *values.shape), dtype=torch.float32)
    (n, k), (bn, bk) = layout.shape, layout.block
    _block_outer[(layout.rows.shape[0], config.split)](
        dy,
        x,
        out,
        layout.rows,
        layout.cols,
        layout.panels,
        M=m,
        N=n,
        K=k,
        stride_dym=dy.stride(0),
        stride_xm=x.stride(0),
        stride_os=values.numel(),
        BN=bn,
        BK=bk,
        EVEN_N=n % bn == 0,
        EVEN_K=k % bk == 0,
        FENCED=device_of(x).sets_fence,
        **launch_options(config, x),
    )
    if config.split > 1:
        launch_reduce(out, values)
    return values.to(x.dtype)


def _launch_multiply(
    a: Tensor,
    values: Tensor,
    layout: BlockLayout,
    transposed: bool,
    bias: Tensor | None,
    activation: str | None,
    config: Config | None,
) -> Tensor:
    a, values, bias = rows_contiguous(a), values.contiguous(), None if bias is None else bias.contiguous()
    m = a.shape[0]
    size_out, size_in = layout.shape[::-1] if transposed else layout.shape
    segments = layout.grid[1] if transposed else layout.grid[0]
    problem = matmul_problem(layout, transposed, m, a.element_size(), input_precision(a) == "tf32")
    config = config or choose(problem, device_of(a))
    result = a.new_empty(m, size_out, dtype=stored_dtype(a))
    if not result.numel():
        return result.to(a.dtype)
    out = result if config.split == 1 else a.new_empty(config.split, m, size_out, dtype=torch.float32)
    _block_multiply[(triton.cdiv(m, config.block_m) * segments, config.split)](
        a,
        values,
        bias,
        out,
        layout.col_ptr if transposed else layout.row_ptr,
        layout.col_order if transposed else None,
        layout.col_rows if transposed else layout.cols,
        layout.longest_cols if transposed else layout.longest_rows,
        M=m,
        SIZE_IN=size_in,
        SIZE_OUT=size_out,
        SEGMENTS=segments,
        stride_am=a.stride(0),
        stride_os=m * size_out,
        stride_om=size_out,
        BN=layout.block[0],
        BK=layout.block[1],
        TRANSPOSED=transposed,
        BLOCK_IN=config.block_in,
        GROUP=config.group,
        EVEN_IN=size_in % layout.block[0 if transposed else 1] == 0,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        FENCED=device_of(a).sets_fence,
        **launch_options(config, a),
    )
    if config.split > 1:
        launch_reduce(out, result, bias, activation)
    return result.to(a.dtype)


OPERATIONS = {
    "block_matmul": block_matmul_triton,
    "block_matmul_t": block_matmul_t_triton,
    "block_grad": block_grad_triton,
}
