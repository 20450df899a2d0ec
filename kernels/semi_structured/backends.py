"""Which implementation runs a semi-structured operation: a pure choice, never a silent fallback."""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..device import device_of, interpreting
from .layout import SemiStructuredLayout

BACKENDS = ("auto", "sparse_tensor_core", "triton", "torch", "eager")
SPARSE_DTYPES = (torch.float16, torch.bfloat16)
TRITON_DTYPES = (*SPARSE_DTYPES, torch.float32)


def choose_backend(op: str, backend: str, operand: Tensor, layout: SemiStructuredLayout) -> str:
    """Resolves a requested backend to one that can run.

    Args:
        op: Name of the operation, for the message.
        backend: ``"auto"`` or one of ``BACKENDS``, which insists.
        operand: The activations, rows first: their device, dtype and number decide.
        layout: The weight's layout.

    Raises:
        ValueError: No such backend exists, or the one insisted on cannot run this call; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "eager" or (backend == "auto" and not operand.is_cuda):
        return "eager"
    if backend == "auto":
        return "eager" if why_not_triton(operand) else "triton"
    reason = WHY_NOT[backend](operand)
    if reason:
        raise ValueError(f"{op}: backend {backend!r} cannot run here: {reason}")
    return backend


def why_not_triton(operand: Tensor) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not operand.is_cuda and not interpreting():
        return f"it needs a CUDA device (or TRITON_INTERPRET=1), the tensors are on {operand.device}"
    if operand.dtype not in TRITON_DTYPES:
        return f"it takes float16, bfloat16 and float32, got {operand.dtype}"
    if device_of(operand).arch < 80:
        return f"it needs compute capability 8.0 or newer, got {device_of(operand).arch / 10}"
    return None


WHY_NOT = {"triton": why_not_triton}
