"""Which implementation runs an operation: a pure choice, never a silent fallback."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .device import device_of, interpreting

BACKENDS = ("auto", "triton", "eager")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_ARCH = 80


def choose_backend(op: str, backend: str, operand: Tensor, limit: str | None = None) -> str:
    """Resolves a requested backend to one that can run.

    Args:
        op: Name of the operation, for the message.
        backend: ``"auto"`` takes Triton where it can run on the GPU, else the eager twin; ``"triton"`` insists;
            ``"eager"`` is the twin.
        operand: A tensor of the call: its device and dtype decide.
        limit: What of the call the operation's kernels do not take, in words; ``None`` where they take it.

    Raises:
        ValueError: No such backend exists, or the one insisted on cannot run this call; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "eager" or (backend == "auto" and not operand.is_cuda):
        return "eager"
    reason = _why_not_triton(operand, limit)
    if reason and backend == "triton":
        raise ValueError(f"{op}: backend 'triton' cannot run here: {reason}")
    return "eager" if reason else "triton"


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _why_not_triton(operand: Tensor, limit: str | None) -> str | None:
    """What keeps Triton from running a call, in words; ``None`` where it can."""
    if not _triton_installed():
        return "Triton is not installed"
    if not operand.is_cuda and not interpreting():
        return f"it needs a CUDA device (or TRITON_INTERPRET=1), the tensors are on {operand.device}"
    if operand.dtype not in TRITON_DTYPES:
        return f"it takes float16, bfloat16 and float32, got {operand.dtype}"
    if device_of(operand).arch < MIN_ARCH:
        return f"it needs compute capability {MIN_ARCH / 10} or newer, got {device_of(operand).arch / 10}"
    return limit
