"""Launches of the expanded MLP for few rows, whose weights go from memory to the tensor cores directly."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..epilogue import aligned_pairs
from ..partition.direct import turns_ahead
from ..partition.labels import digits
from .config import Config, warps_of

if TYPE_CHECKING:
    from ..partition.triton import StoredWeight


def launch_direct(
    x: Tensor,
    first: "StoredWeight",
    bias1: Tensor | None,
    words2: Tensor,
    second: "StoredWeight | None",
    bias2: Tensor | None,
    out: Tensor,
    alpha: int,
    activation: str | None,
    config: Config,
) -> None:
    """Multiplies into ``out[M, N]``.

    Args:
        x: ``[M, K]``, 16-bit activations, contiguous along the last dimension.
        first: The first weight in pairs, and its labels.
        bias1: Contiguous, or none.
        words2: The second weight in pairs.
        second: It with its labels; none of a dense one.
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
        AHEAD=turns_ahead(alpha, config.block_m, 2, False),
        KIND="bf16" if x.dtype == torch.bfloat16 else "f16",
        ACTIVATION=activation,
        HAS_BIAS1=bias1 is not None,
        HAS_BIAS2=bias2 is not None,
        **options,
        num_warps=config.num_warps,
        maxnreg=255,
    )
