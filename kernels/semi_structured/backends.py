"""Which implementation runs a semi-structured operation: a pure choice, never a silent fallback.

:func:`choose_backend` says what can run, when an operation is called; which of several is fastest depends on the batch,
so :func:`fastest_here` decides when it runs, by the cost model.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..device import arch_of
from ..dispatch import TRITON_DTYPES, UnsupportedError, ranked_here, too_old, triton_installed, why_not_triton
from .layout import SemiStructuredLayout

SPARSE_DTYPES = (torch.float16, torch.bfloat16)
CUTLASS_ARCHS = range(80, 90)


def choose_backend(op: str, backend: str, operand: Tensor, layout: SemiStructuredLayout) -> str:
    """Resolves a requested backend to one that can run.

    Args:
        op: Name of the operation, for the message.
        backend: ``"auto"`` stays open on a GPU, for :func:`fastest_here` to decide; every other name insists.
        operand: The activations: their device and dtype decide.
        layout: The weight's layout.

    Raises:
        ValueError: No such backend exists.
        UnsupportedError: The one insisted on cannot run this call; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "eager" or (backend == "auto" and not operand.is_cuda):
        return "eager"
    if backend == "auto":
        return "auto"
    reason = WHY_NOT[backend](operand, layout.children * layout.shape[0], layout.shape[1])
    if reason:
        raise UnsupportedError(f"{op}: backend {backend!r} cannot run here: {reason}")
    return backend


def as_partition(op: str, m: int, layout: SemiStructuredLayout) -> tuple[str, int, int, int, int]:
    """The partition operation that costs as much, and its sizes as the cost model takes them."""
    n, k = layout.shape[0] * layout.children // 2, layout.shape[1]  # one child alone: half the rows of two
    if op == "semi_structured_matmul_t":
        return "merge_matmul", m, k, n, 2
    return {"semi_structured_matmul": "split_matmul", "semi_structured_grad": "partition_grad"}[op], m, n, k, 2


def fastest_here(op: str, operand: Tensor, layout: SemiStructuredLayout, constant: bool = True) -> str:
    """The backend that is predicted to be fastest of those that can run, on the device of the activations.

    Args:
        op: Name of the operation.
        operand: The activations.
        layout: The weight's layout.
        constant: Whether the weight stays from call to call.
    """
    if operand.dtype not in TRITON_DTYPES:
        return "eager"
    order = ranked_here(*as_partition(op, operand.shape[0], layout), operand, "2:4", constant)
    if op == "semi_structured_matmul_t" and layout.children == 1:  # the transposed weight is not 2:4
        order = tuple(name for name in order if name in ("triton", "eager"))
    outputs, inputs = layout.children * layout.shape[0], layout.shape[1]
    return next(name for name in order if name == "eager" or WHY_NOT[name](operand, outputs, inputs) is None)


def _why_not_sparse_tensor_core(operand: Tensor, outputs: int, inputs: int) -> str | None:
    reason = _why_not_device(operand, SPARSE_DTYPES)
    if reason:
        return reason
    if not triton_installed():
        return "Triton is not installed"
    from .sparse_tensor_core import is_sound

    return None if is_sound(operand.device, operand.dtype) else "its self-check failed on this device"


def _why_not_triton(operand: Tensor, outputs: int, inputs: int) -> str | None:
    return why_not_triton(operand)


def _why_not_torch(operand: Tensor, outputs: int, inputs: int) -> str | None:
    reason = _why_not_device(operand, SPARSE_DTYPES)
    if reason:
        return reason
    from .torch import goes_to_cusparselt, why_not_shape

    arch = arch_of(operand.device)
    if not goes_to_cusparselt(operand) and arch not in CUTLASS_ARCHS:
        return (
            "this build of PyTorch has no cuSPARSELt, and its CUTLASS kernels take compute capability 8.x only, got "
            f"{arch / 10}"
        )
    return why_not_shape(operand, outputs, inputs)


def _why_not_device(operand: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if not operand.is_cuda:
        return f"it needs a CUDA device, the tensors are on {operand.device}"
    if operand.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it takes {names}, got {str(operand.dtype).removeprefix('torch.')}"
    return too_old(operand.device)


WHY_NOT: dict[str, Callable[[Tensor, int, int], str | None]] = {
    "sparse_tensor_core": _why_not_sparse_tensor_core,
    "triton": _why_not_triton,
    "torch": _why_not_torch,
}
"""For each backend: what keeps it from a weight of so many outputs (of all children) and inputs, in words; or none."""

BACKENDS = ("auto", *WHY_NOT, "eager")
