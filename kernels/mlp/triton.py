"""The expanded MLP on the GPU: one launch from the inputs to the outputs.

A program computes the whole hidden layer of its rows, every child from one read of the parents' weights, keeps it in
registers, and multiplies it by one tile of the second matrix. Programs of other outputs compute the same hidden rows
again; for small layers that is meant to cost less than a second launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import device_of, input_precision, interpreting, stored_dtype
from ..epilogue import activate, aligned_pairs, multiply, rows_contiguous
from ..partition.eager import Labels
from ..partition.labels import digits, row_bytes
from ..partition.tiles import bit_masks, child_share
from ..partition.triton import TYPES, StoredWeight, as_words, planes_strides, stored_weight, turns_ahead
from ..tables import choose
from .config import Config, Problem, warps_of


@triton.jit(do_not_specialize=["M", "KEY1", "KEY2"])
def _expanded_mlp(
    x_ptr,
    words1_ptr,
    planes1_ptr,
    bias1_ptr,
    words2_ptr,
    planes2_ptr,
    bias2_ptr,
    out_ptr,
    M,
    H,
    K,
    N,
    SIZE_WORDS1,
    SIZE_WORDS2,
    KEY1,
    KEY2,
    stride_xm,
    stride_1h,
    stride_p1,
    stride_2n,
    stride_p2,
    DTYPE: tl.constexpr,
    ALPHA: tl.constexpr,
    DIGITS: tl.constexpr,
    SEEDED1: tl.constexpr,
    SEEDED2: tl.constexpr,
    PER_WORD1: tl.constexpr,
    PER_WORD2: tl.constexpr,
    MERGED: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS1: tl.constexpr,
    HAS_BIAS2: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Offsets along M are expanded along this axis, those along the other axis of a tile along the other one.
    AXIS: tl.constexpr = 1 if TURNED else 0
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    mask_m, mask_n, mask_h = offs_m < M, offs_n < N, offs_h < H
    x_rows, rows = x_ptr + tl.expand_dims(offs_m.to(tl.int64) * stride_xm, AXIS), tl.expand_dims(mask_m, AXIS)

    accs = ()
    for _ in tl.static_range(ALPHA):
        accs += (tl.zeros([BLOCK_M, BLOCK_H] if TURNED else [BLOCK_H, BLOCK_M], dtype=tl.float32),)
    for first_k in range(0, K, BLOCK_K):
        offs_w = first_k // PER_WORD1 + tl.arange(0, BLOCK_K // PER_WORD1)
        words_at = words1_ptr + offs_h[:, None] * stride_1h + offs_w[None, :]
        words = tl.load(words_at, mask=mask_h[:, None] & (offs_w[None, :] < K // PER_WORD1), other=0)
        masks = ()
        for digit in tl.static_range(DIGITS):
            masks += (
                bit_masks(
                    planes1_ptr, stride_p1, SIZE_WORDS1, offs_h, mask_h, first_k, SIZE_WORDS1, KEY1, digit, ALPHA,
                    SEEDED1, BLOCK_K, PER_WORD1, True,
                ),
            )  # fmt: skip
        offs_k = tl.expand_dims(first_k + tl.arange(0, BLOCK_K), 1 - AXIS)
        x = tl.load(x_rows + offs_k, mask=rows & (offs_k < K), other=0.0)  # [BLOCK_M, BLOCK_K] if TURNED
        if UPCAST:
            x = x.to(tl.float32)
        sums = ()
        for child in tl.static_range(ALPHA):
            w = child_share(words, masks, child, DIGITS, PER_WORD1, DTYPE)  # [BLOCK_H, BLOCK_K]
            if UPCAST:
                w = w.to(tl.float32)
            sums += (multiply(w, x, accs[child], TURNED, PRECISION),)
        accs = sums

    offs_w = tl.arange(0, BLOCK_H // PER_WORD2)
    rows_2 = words2_ptr + offs_n[:, None].to(tl.int64) * stride_2n
    mask_w = mask_n[:, None] & (offs_w[None, :] < H // PER_WORD2)
    if MERGED:
        words = tl.load(rows_2 + offs_w[None, :], mask=mask_w, other=0)  # [BLOCK_N, BLOCK_H / PER_WORD2]
        masks = ()
        for digit in tl.static_range(DIGITS):
            masks += (
                bit_masks(
                    planes2_ptr, stride_p2, SIZE_WORDS2, offs_n, mask_n, 0, SIZE_WORDS2, KEY2, digit, ALPHA, SEEDED2,
                    BLOCK_H, PER_WORD2, True,
                ),
            )  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_N] if TURNED else [BLOCK_N, BLOCK_M], dtype=tl.float32)
    for child in tl.static_range(ALPHA):
        hidden = accs[child]
        if HAS_BIAS1:
            bias = tl.load(bias1_ptr + child * H + offs_h, mask=mask_h, other=0.0)
            hidden += tl.expand_dims(bias.to(tl.float32), 1 - AXIS)
        hidden = activate(hidden, ACTIVATION)  # [BLOCK_M, BLOCK_H] if TURNED
        if MERGED:
            w = child_share(words, masks, child, DIGITS, PER_WORD2, DTYPE)
        else:
            w = tl.load(rows_2 + child * H + offs_w[None, :], mask=mask_w, other=0.0)  # [BLOCK_N, BLOCK_H]
        if UPCAST:
            w = w.to(tl.float32)
        else:
            hidden = hidden.to(DTYPE)
        acc = multiply(w, hidden, acc, TURNED, PRECISION)
    if HAS_BIAS2:
        bias = tl.load(bias2_ptr + offs_n, mask=mask_n, other=0.0)
        acc += tl.expand_dims(bias.to(tl.float32), 1 - AXIS)
    out_at = out_ptr + tl.expand_dims(offs_m.to(tl.int64) * N, AXIS) + tl.expand_dims(offs_n, 1 - AXIS)
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=rows & tl.expand_dims(mask_n, 1 - AXIS))


def expanded_mlp_triton(
    x: Tensor,
    w1: Tensor,
    labels1: Labels,
    w2: Tensor,
    labels2: Labels | None,
    alpha: int,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str | None = "relu",
    config: Config | None = None,
) -> Tensor:
    """One launch on ``x[M, K]``; see :func:`fpe.kernels.expanded_mlp`. ``config`` overrides the chosen one."""
    x = rows_contiguous(x)
    (m, k), hidden, n = x.shape, w1.shape[0], w2.shape[0]
    result = x.new_empty(m, n, dtype=stored_dtype(x))
    if not result.numel():
        return result.to(x.dtype)
    first = stored_weight(w1, labels1, alpha, keep_order=True)
    second = None if labels2 is None else stored_weight(w2, labels2, alpha, keep_order=True)
    words2 = rows_contiguous(w2)
    pairs2, per_word2 = as_words(words2) if second is None else (second.words, second.per_word)
    pairs = first.per_word == per_word2 == 2 and hidden % 2 == 0 and not interpreting()
    config = config or choose(Problem(m, hidden, k, alpha, pairs), device_of(x))
    bias1, bias2 = (None if bias is None else bias.contiguous() for bias in (bias1, bias2))
    if config.direct:
        with torch.cuda.device_of(x):
            _launch_direct(x, first, bias1, pairs2, second, bias2, result, alpha, activation, config)
        return result
    # The kernel knows the planes' rows by their number of words.
    planes1, planes2 = (None if s is None or s.planes is None else s.planes.contiguous() for s in (first, second))
    words2 = words2 if second is None else second.words
    with torch.cuda.device_of(x):
        _expanded_mlp[(triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_o))](
            x,
            first.words,
            planes1,
            bias1,
            words2,
            planes2,
            bias2,
            result,
            M=m,
            H=hidden,
            K=k,
            N=n,
            SIZE_WORDS1=row_bytes(k) // 4,
            SIZE_WORDS2=row_bytes(hidden) // 4,
            KEY1=first.key,
            KEY2=0 if second is None else second.key,
            stride_xm=x.stride(0),
            stride_1h=first.words.stride(0),
            stride_p1=planes_strides(planes1)[0],
            stride_2n=words2.stride(0),
            stride_p2=planes_strides(planes2)[0],
            DTYPE=TYPES[x.dtype],
            ALPHA=alpha,
            DIGITS=digits(alpha),
            SEEDED1=first.planes is None,
            SEEDED2=second is not None and second.planes is None,
            PER_WORD1=first.per_word,
            PER_WORD2=1 if second is None else second.per_word,
            MERGED=second is not None,
            TURNED=device_of(x).computed_right,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_h,
            BLOCK_K=config.block_k,
            BLOCK_N=config.block_o,
            ACTIVATION=activation,
            HAS_BIAS1=bias1 is not None,
            HAS_BIAS2=bias2 is not None,
            PRECISION=input_precision(x),
            UPCAST=interpreting(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=255,
        )
    return result.to(x.dtype)


def _launch_direct(
    x: Tensor,
    first: StoredWeight,
    bias1: Tensor | None,
    words2: Tensor,
    second: StoredWeight | None,
    bias2: Tensor | None,
    out: Tensor,
    alpha: int,
    activation: str | None,
    config: Config,
) -> None:
    """Multiplies few rows into ``out[M, N]``.

    Args:
        x: ``[M, K]``, 16-bit activations, contiguous along the last dimension.
        first: The first weight in pairs, and its labels.
        bias1: Contiguous, or none.
        words2: The second weight in pairs.
        second: The second weight with its labels; none for a dense one.
        bias2: Contiguous, or none.
        out: Contiguous.
        alpha: Children.
        activation: As :func:`fpe.kernels.expanded_mlp` takes it.
        config: A direct one.
    """
    from .gluon import multiply_twice

    (m, k), n, hidden = x.shape, out.shape[1], first.shape[0]
    pairs = aligned_pairs(x, -(-k // 8) * 8)
    warps_in, warps_out = warps_of(config)
    units = [4 if words.stride(0) % 4 == 0 else 1 for words in (first.words, words2)]
    options: dict[str, Any] = {}
    for i, weight in ((1, first), (2, second)):
        planes = None if weight is None else weight.planes
        options |= {
            f"KEY{i}": 0 if weight is None else weight.key,
            f"stride_p{i}": 0 if planes is None else planes.stride(0),
            f"stride_l{i}": 0 if planes is None else planes.stride(1),
            f"SEEDED{i}": weight is not None and planes is None,
        }
    multiply_twice[(-(-m // config.block_m), -(-n // config.block_o))](
        pairs,
        first.words,
        first.planes,
        bias1,
        words2,
        None if second is None else second.planes,
        bias2,
        out,
        M=m,
        N=n,
        SIZE_WORDS=k // 2,
        STEPS_K=-(-k // config.block_k),
        stride_xm=pairs.stride(0) // 4,
        stride_w1=first.words.stride(0) // units[0],
        stride_w2=words2.stride(0) // units[1],
        H=hidden,
        ALPHA=alpha,
        DIGITS=digits(alpha),
        MERGED=second is not None,
        WARPS_IN=warps_in,
        WARPS_OUT=warps_out,
        BLOCK_M=config.block_m,
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_o,
        UNIT1=units[0],
        UNIT2=units[1],
        WHOLE=k % config.block_k == 0,
        AHEAD=turns_ahead(alpha, config.block_m, 8),
        KIND="bf16" if x.dtype == torch.bfloat16 else "f16",
        ACTIVATION=activation,
        HAS_BIAS1=bias1 is not None,
        HAS_BIAS2=bias2 is not None,
        **options,
        num_warps=config.num_warps,
        maxnreg=255,
    )


OPERATIONS = {
    "expanded_mlp": expanded_mlp_triton,
}
