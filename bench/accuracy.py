"""How far a result may be from the truth: bounds derived from the arithmetic that made it, for gate, suite and tuner.

A result of a matrix product is ``y = sum over k of a[k] * b[k]``, ``K`` terms, of operands that their type holds
exactly. Three things make it differ from the truth, and each is bounded for every element from two numbers: the true
``|y|`` and the *spread* ``s = sqrt(sum of (a[k] * b[k])^2)``, the size that a sum of so many terms of either sign has.

Operands
    Tensor cores read of a float32 operand in TF32 mode the upper 10 bits of its fraction and drop the others (Hopper's
    ``wgmma`` truncates; a unit or a library that rounds errs less). A product becomes smaller by a share between 0 and
    ``2 * 2^-10``. Its mean, at most ``2^-10``, changes the sum by ``2^-10 |y|``; what is left has either sign and a
    standard deviation of ``2^-10 / sqrt(6)`` (two uniform shares added): ``2^-10 s / sqrt(6)`` together. Operands of
    the other types are multiplied exactly, 16-bit ones in float32 and float32 ones inside a fused multiply-add.
Additions
    The partial sums of a chain in float32 wander to ``y`` and are of the size ``|y| + s``. Rounding errs by at most
    ``2^-24`` of each, either way, with a standard deviation of ``2^-24 / sqrt(3)``: ``sqrt(K / 3) * 2^-24 * (|y| + s)``
    together, whatever the order, the longest chain being one addition a term. Tensor cores truncate sums instead, once
    for at least 8 products: one way, ``2^-24`` on average, hence ``K / 8 * 2^-24 * (|y| + s)`` beside it.
The result
    Stored in its type it is off by at most half of the last bit: ``u |y|``. PyTorch's own products may also round the
    partial sums of a split reduction to that type (``allow_bf16_reduced_precision_reduction``), which adds
    ``u (|y| + s) / sqrt(3)``; this package's kernels keep them in float32.

The largest error may be :data:`TAIL` standard deviations of what has either sign; the root mean square over all
elements one of them (and ``TAIL / sqrt(elements)`` more, as few elements scatter).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

TAIL = 7.0
"""Standard deviations: of 10^10 normal errors less than one is expected beyond."""
FLOAT32 = 2.0**-24
"""Half of float32's last bit."""
TF32 = 2.0**-10
"""What truncation to TF32 may take from an operand."""
PER_STEP = 8
"""Products that a tensor core adds before it truncates, at least: the inner size of its TF32 instruction."""

OWN = ("triton", "sparse_tensor_core")
"""Backends whose products are all this package's own; ``by_torch`` is said of all others."""


def bound(truth: Tensor, spread: Tensor, terms: Tensor | float, dtype: str, by_torch: bool, tail: float) -> Tensor:
    """The error that each element may have, as the module derives it.

    Args:
        truth: ``y`` in float64.
        spread: ``s`` of each element, float64.
        terms: ``K``, a number or one for each element.
        dtype: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"fp32"``.
        by_torch: Whether the result may be one of PyTorch's own products.
        tail: Standard deviations that are granted.
    """
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    unit, size = torch.finfo(kind).eps / 2, truth.abs()
    partial = FLOAT32 * (size + spread)
    scattered = (torch.as_tensor(terms, dtype=torch.float64, device=truth.device) / 3).sqrt() * partial
    allowed = unit * size + torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
    if dtype != "fp32":
        allowed = allowed + terms / PER_STEP * partial
    if dtype == "tf32":
        allowed = allowed + TF32 * size
        scattered = scattered + TF32 / 6**0.5 * spread
    if by_torch:
        scattered = scattered + unit / 3**0.5 * (size + spread)
    return allowed + tail * scattered


def excess(
    ours: Tensor, truth: Tensor, spread: Tensor, terms: Tensor | float, dtype: str, by_torch: bool = False
) -> float:
    """How much too far a result is from the truth: at most 1 where all is well, infinite where it is not even a number.

    The larger of the largest error over its own bound and the root mean square of all errors over that of their bounds.
    """
    if ours.shape != truth.shape:
        return float("inf")
    if not truth.numel():
        return 0.0
    error = (ours.double() - truth).abs()
    if not bool(error.isfinite().all()):
        return float("inf")
    allowed = partial(bound, truth, spread, terms, dtype, by_torch)
    largest = (error / allowed(TAIL)).max()
    typical = allowed(1 + TAIL / truth.numel() ** 0.5)
    return float(torch.maximum(largest, error.square().mean().sqrt() / typical.square().mean().sqrt()))


def expected(twin: partial) -> tuple[Tensor, Tensor, Tensor]:
    """Truth, spread and terms of a product: its eager twin with its operands, their squares and ones, in float64.

    Args:
        twin: The twin with its operands; those that are no floating tensors are passed as they are.
    """

    def run(cast: Callable[[Tensor], Tensor]) -> Tensor:
        floating = (isinstance(a, Tensor) and a.is_floating_point() for a in twin.args)
        return twin.func(*(cast(a.double()) if f else a for a, f in zip(twin.args, floating, strict=True)))

    return run(lambda t: t), run(torch.square).sqrt(), run(lambda t: (t != 0).double())


def dtype_name(dtype: torch.dtype) -> str:
    """What a type's products are computed in, as :func:`bound` takes it."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def excess_of_triad(ours: Tensor, yardstick: Tensor, truth: Tensor, tf32: bool = False) -> float:
    """The same by a yardstick, for what is no single product: PyTorch's result in the same type.

    Twice its error is allowed, the largest and the root mean square one, and half of the last bit of the largest result
    on top: by so much is off what was right until it was stored, where PyTorch's own error may be zero.

    Args:
        ours: The result.
        yardstick: PyTorch's, of the same type.
        truth: In float64.
        tf32: Whether products may be computed in TF32, of which operands lose :data:`TF32` instead.
    """
    if ours.shape != truth.shape:
        return float("inf")
    if not truth.numel():
        return 0.0
    granted = (TF32 if tf32 else torch.finfo(ours.dtype).eps / 2) * float(truth.abs().max())
    found = []
    for size in (torch.Tensor.max, lambda e: e.square().mean().sqrt()):
        error, allowed = (float(size((t.double() - truth).abs())) for t in (ours, yardstick))
        found.append(error / max(2 * allowed + granted, 1e-300) if error == error else float("inf"))
    return max(found)
