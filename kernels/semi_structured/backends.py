"""Which implementation runs a semi-structured operation: a pure choice, never a silent fallback."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..device import arch_of
from ..dispatch import too_old, triton_installed, why_not_triton
from .layout import SemiStructuredLayout

SPARSE_DTYPES = (torch.float16, torch.bfloat16)
CUTLASS_ARCHS = range(80, 90)
SLOW_ARCHS = range(100, 120)
"""Data-centre Blackwell: it multiplies by ``tcgen05``, and runs ``mma`` at a fraction of its rate."""


def choose_backend(op: str, backend: str, operand: Tensor, layout: SemiStructuredLayout) -> str:
    """Resolves a requested backend to one that can run.

    Args:
        op: Name of the operation, for the message.
        backend: ``"auto"`` takes the first that can run on the GPU of sparse tensor cores, Triton and ``torch.sparse``,
            else the eager twin; every other name insists.
        operand: The activations: their device and dtype decide.
        layout: The weight's layout.

    Raises:
        ValueError: No such backend exists, or the one insisted on cannot run this call; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "eager" or (backend == "auto" and not operand.is_cuda):
        return "eager"
    if backend == "auto":
        slow = arch_of(operand.device) in SLOW_ARCHS
        able = (name for name, why_not in WHY_NOT.items() if why_not(operand, layout) is None)
        return next((name for name in able if not (slow and name == "sparse_tensor_core")), "eager")
    reason = WHY_NOT[backend](operand, layout)
    if reason:
        raise ValueError(f"{op}: backend {backend!r} cannot run here: {reason}")
    return backend


def _why_not_sparse_tensor_core(operand: Tensor, layout: SemiStructuredLayout) -> str | None:
    reason = _why_not_device(operand, SPARSE_DTYPES)
    if reason:
        return reason
    if not triton_installed():
        return "Triton is not installed"
    from .sparse_tensor_core import is_sound

    return None if is_sound(operand.device, operand.dtype) else "its self-check failed on this device"


def _why_not_triton(operand: Tensor, layout: SemiStructuredLayout) -> str | None:
    return why_not_triton(operand)


def _why_not_torch(operand: Tensor, layout: SemiStructuredLayout) -> str | None:
    reason = _why_not_device(operand, SPARSE_DTYPES)
    if reason:
        return reason
    from .torch import has_cusparselt, why_not_shape

    arch = arch_of(operand.device)
    if not has_cusparselt() and arch not in CUTLASS_ARCHS:
        return (
            "this build of PyTorch has no cuSPARSELt, and its CUTLASS kernels take compute capability 8.x only, got "
            f"{arch / 10}"
        )
    return why_not_shape(layout.children * layout.shape[0], layout.shape[1])


def _why_not_device(operand: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if not operand.is_cuda:
        return f"it needs a CUDA device, the tensors are on {operand.device}"
    if operand.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it takes {names}, got {str(operand.dtype).removeprefix('torch.')}"
    return too_old(operand.device)


WHY_NOT: dict[str, Callable[[Tensor, SemiStructuredLayout], str | None]] = {
    "sparse_tensor_core": _why_not_sparse_tensor_core,
    "triton": _why_not_triton,
    "torch": _why_not_torch,
}
"""For each backend, in the order of ``"auto"``: what keeps it from a call, in words; ``None`` where it can run."""

BACKENDS = ("auto", *WHY_NOT, "eager")
