"""Launches of the partition products for few rows, whose weights go from memory to the tensor cores directly."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..epilogue import aligned_pairs
from .config import Config, warps_of
from .labels import digits

if TYPE_CHECKING:
    from .triton import StoredWeight


REGISTERS = 168
"""Of a thread, where they suffice: three programs then fit a multiprocessor and hide the latency of their loads."""


def turns_ahead(alpha: int, block_m: int, unroll: int, merges: bool) -> int:
    """Turns of the loop by which L2 is asked for weights before they are loaded; none where enough loads are in flight.

    The sums of more children or rows leave registers for fewer loads, and for fewer programs on a multiprocessor.

    Args:
        alpha: Children.
        block_m: Rows of activations of a program.
        unroll: Loads of a turn, halved.
        merges: Whether it is a merge on the transpose, where four children of 32 rows leave no register for it.
    """
    if merges and alpha == 4 and block_m > 16:
        return 0
    return 4 // unroll if alpha > 2 or block_m > 16 else 0


def launch_direct(
    x: Tensor,
    weight: "StoredWeight",
    out: Tensor,
    bias: Tensor | None,
    activation: str | None,
    merge: bool,
    alpha: int,
    config: Config,
) -> None:
    """Multiplies into ``out``, or into its parts where the reduction is split.

    Args:
        x: ``[M, K]``, or ``[M, alpha, K]`` of a merge: 16-bit activations, contiguous along the last dimension.
        weight: The weight in pairs, and its labels.
        out: Contiguous; ``[split, ...]`` float32 where the reduction is split.
        bias: Contiguous, or none.
        activation: As :func:`fpe.kernels.split_matmul` takes it.
        merge: Whether ``x`` has children.
        alpha: Children.
        config: A direct one.
    """
    from .gluon import multiply_columns, multiply_rows

    words, labels, (n, k), transposed = weight.words, weight.planes, weight.shape, weight.transposed
    m, size_in, size_out = x.shape[0], (n if transposed else k), (k if transposed else n)
    step = config.block_n if transposed else config.block_k
    steps = -(-size_in // step)
    pairs = aligned_pairs(x, steps * step if transposed else -(-k // 8) * 8)
    sums = 1 if merge else alpha
    warps_in, warps_out = warps_of(config, transposed)
    unroll = config.block_n // (16 * warps_in)  # of a transposed one
    unit = 4 if words.stride(0) % 4 == 0 else 1
    common: dict[str, Any] = {
        "stride_xm": pairs.stride(0) // 4,
        "stride_xa": pairs.stride(1) // 4 if merge else 0,
        "stride_wn": words.stride(0) // unit,
        "KEY": weight.key,
        "stride_pp": 0 if labels is None else labels.stride(0),
        "stride_pn": 0 if labels is None else labels.stride(1),
        "stride_os": m * sums * size_out,
        "stride_om": sums * size_out,
        "stride_oa": size_out,
        "ALPHA": alpha,
        "DIGITS": digits(alpha),
        "SEEDED": labels is None,
        "MERGE": merge,
        "WARPS_IN": warps_in,
        "WARPS_OUT": warps_out,
        "BLOCK_M": config.block_m,
        "SPLIT": config.split,
        "UNIT": unit,
        "WHOLE": size_in % step == 0,
        "AHEAD": turns_ahead(alpha, config.block_m, unroll if transposed else 2, merge and transposed),
        "KIND": "bf16" if x.dtype == torch.bfloat16 else "f16",
        "ACTIVATION": activation if config.split == 1 else None,
        "HAS_BIAS": bias is not None and config.split == 1,
        "num_warps": config.num_warps,
        "maxnreg": 255 if config.block_m > 16 or alpha > (2 if transposed else 4 if merge else 8) else REGISTERS,
    }
    tiles = -(-m // config.block_m) * -(-size_out // (config.block_k if transposed else config.block_n))
    tensors = (pairs, words, labels, bias, out)
    if transposed:
        multiply_columns[(tiles, config.split)](
            *tensors, M=m, N=n, K=k, STEPS_N=steps, UNROLL=unroll, WHOLE_COLUMNS=k % 8 == 0, **common
        )
    else:
        multiply_rows[(tiles, config.split)](
            *tensors, M=m, N=n, SIZE_WORDS=k // 2, STEPS_K=steps, BLOCK_N=config.block_n, **common
        )
