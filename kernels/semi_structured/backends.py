"""What runs the semi-structured operations, and what keeps each from a call."""

import torch
from torch import Tensor

from .. import dispatch
from ..device import arch_of
from ..dispatch import EAGER, Backend, too_old, triton_installed, why_not_triton
from ..structures import TWO_FOUR
from .layout import SemiStructuredLayout

SPARSE_DTYPES = (torch.float16, torch.bfloat16)
CUTLASS_ARCHS = range(80, 90)


def as_partition(op: str, m: int, layout: SemiStructuredLayout) -> tuple[str, tuple[int, int, int, int]]:
    """The partition operation by which the cost model predicts this one, and its sizes ``(m, n, k, alpha)``."""
    n, k = layout.shape[0] * layout.children // 2, layout.shape[1]  # one child alone: half the rows of two
    if op == "semi_structured_matmul_t":
        return "merge_matmul", (m, k, n, 2)
    return {"semi_structured_matmul": "split_matmul", "semi_structured_grad": "partition_grad"}[op], (m, n, k, 2)


def fastest(op: str, operand: Tensor, layout: SemiStructuredLayout, constant: bool = True) -> str:
    """The backend that is predicted to be fastest of those that can run, on the device of the activations.

    Args:
        op: Name of the operation.
        operand: The activations.
        layout: The weight's layout.
        constant: Whether the weight stays the same from call to call.
    """
    able = BACKENDS
    if op == "semi_structured_matmul_t" and layout.children == 1:  # the transposed weight is not 2:4
        able = {name: BACKENDS[name] for name in ("triton", "eager")}
    as_op, sizes = as_partition(op, operand.shape[0], layout)
    weight = (layout.children * layout.shape[0], layout.shape[1])
    return dispatch.fastest(as_op, sizes, operand, able, *weight, structure=TWO_FOUR, constant=constant)


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
    from .torch_sparse import goes_to_cusparselt, why_not_shape

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


BACKENDS = {
    "sparse_tensor_core": Backend(
        "semi_structured.sparse_tensor_core", "sparse tensor cores", _why_not_sparse_tensor_core
    ),
    "triton": Backend("semi_structured.triton", "packed labels", _why_not_triton),
    "torch": Backend("semi_structured.torch_sparse", "torch.sparse", _why_not_torch),
    "eager": Backend("semi_structured.eager", EAGER),
}
"""``why_not`` takes an operand, and how many outputs (of all children) and inputs the weight has."""
