"""What the launches of all families share: options, order of programs, products, activations, sums of parts."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .device import input_precision, interpreting, stored_dtype


def launch_options(config: Any, operand: Tensor) -> dict[str, Any]:
    """What every multiplying kernel is launched with, from its family's configuration.

    ``maxnreg`` is the most that a thread may have: without it the assembler stops at 64 or 128 and spills a few bytes.
    """
    return {
        "BLOCK_M": config.block_m,
        "SPLIT": config.split,
        "PRECISION": input_precision(operand),
        "UPCAST": interpreting(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": min(255, 65_536 // (32 * config.num_warps)),
    }


@triton.jit
def in_groups(pid, FIRST, SECOND, GROUP: tl.constexpr):
    """A program's place in a grid of ``FIRST`` x ``SECOND`` tiles that is walked in bands of ``GROUP``.

    What the programs of a band share along the first axis stays in L2 while the second axis streams by.
    """
    size = GROUP * SECOND
    start = pid // size * GROUP
    width = min(FIRST - start, GROUP)
    return start + pid % size % width, pid % size // width


@triton.jit
def activate(acc, ACTIVATION: tl.constexpr):
    """Applies ``"relu"``, ``"gelu"`` (exact), ``"silu"`` or nothing to a float32 tile."""
    if ACTIVATION == "relu":
        acc = tl.maximum(acc, 0.0)
    if ACTIVATION == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if ACTIVATION == "silu":
        acc = acc / (1.0 + tl.exp(-acc))
    return acc


@triton.jit(do_not_specialize=["SIZE"])
def _reduce(
    partial_ptr,
    bias_ptr,
    out_ptr,
    SIZE,
    COLUMNS,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(partial_ptr + SIZE.to(tl.int64) * split + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs % COLUMNS, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, activate(acc, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def multiply(w, x, acc, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the product of a computed weight ``w[OUT, IN]`` and activations to ``acc``.

    The weight is the left operand: ``x[IN, BLOCK_M]``, ``acc[OUT, BLOCK_M]``. With ``TURNED`` it is the right one, and
    both others are transposed (:attr:`Device.computed_right`).
    """
    if TURNED:
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def multiply_loaded(a, b, acc, FENCED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the product of two tiles that are multiplied as they were loaded to ``acc``.

    ``FENCED`` sets a fence between the copies that wrote them and the product (:attr:`Device.sets_fence`). Its place in
    the program, behind the loads, is kept: behind the wait for the copies. Below 64 rows no ``wgmma`` needs it.
    """
    if FENCED and acc.shape[0] >= 64:
        FENCE: tl.constexpr = "fence.proxy.async.shared::cta; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(FENCE, "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def launch_reduce(partial: Tensor, result: Tensor, bias: Tensor | None = None, activation: str | None = None) -> None:
    """Adds the parts ``partial[split, ...]`` in their order into ``result[...]``, then bias and activation.

    Args:
        partial: float32 ``[split, ...]``, contiguous.
        result: ``[...]``, contiguous; written.
        bias: Contiguous; its entries are repeated along the flattened ``result``. ``None`` adds nothing.
        activation: As :func:`activate` takes it.
    """
    block = 1024
    _reduce[(-(-result.numel() // block),)](
        partial,
        bias,
        result,
        SIZE=result.numel(),
        COLUMNS=1 if bias is None else bias.numel(),
        SPLIT=partial.shape[0],
        BLOCK=block,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )


def summed(parts: Tensor, like: Tensor, bias: Tensor | None = None) -> Tensor:
    """The float32 parts ``[split, ...]`` of a reduction and a bias added in their order, in the dtype of ``like``."""
    if parts.shape[0] == 1 and bias is None:
        return parts[0].to(like.dtype)
    result = parts.new_empty(parts.shape[1:], dtype=stored_dtype(like))
    if result.numel():
        launch_reduce(parts, result, None if bias is None else bias.contiguous())
    return result.to(like.dtype)


def rows_contiguous(x: Tensor) -> Tensor:
    """A tensor that is contiguous along its last dimension, as the kernels need it; a copy if ``x`` is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def aligned_pairs(x: Tensor, width: int) -> Tensor:
    """Rows of ``width`` 16-bit numbers as pairs, int32; each row begins at a multiple of 16 bytes.

    It is a copy, padded with zeros, if ``x`` has shorter rows or does not lie like that.
    """
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    whole = x.shape[-1] == width and x.stride(-1) == 1 and aligned
    return (x if whole else pad(x, (0, width - x.shape[-1])).contiguous()).view(torch.int32)
