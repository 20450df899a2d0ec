"""Which implementation runs a semi-structured operation: a pure choice, never a silent fallback.

:func:`choose_backend` says what can run, when an operation is called; which of several is fastest depends on the batch,
so :func:`fastest` decides when it runs, by the cost model.
"""

from collections.abc import Callable, Collection
from functools import lru_cache

import torch
from torch import Tensor

from ..device import arch_of
from ..dispatch import dtype_name, roof_of, too_old, triton_installed, why_not_triton
from ..model import Roof, best, candidates
from .layout import SemiStructuredLayout

SPARSE_DTYPES = (torch.float16, torch.bfloat16)
CUTLASS_ARCHS = range(80, 90)
IMPLEMENTATIONS = {
    "sparse tensor cores": "sparse_tensor_core",
    "packed labels": "triton",  # as many bytes, and weights expanded in registers, too
    "torch.sparse": "torch",
    "masked dense": "eager",
}
"""Backends by their names in the cost model."""


def choose_backend(op: str, backend: str, operand: Tensor, layout: SemiStructuredLayout) -> str:
    """Resolves a requested backend to one that can run.

    Args:
        op: Name of the operation, for the message.
        backend: ``"auto"`` stays open where others than the eager twin can run on the GPU, for :func:`fastest` to
            decide; every other name insists.
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
        return "auto" if able(operand, layout) else "eager"
    reason = WHY_NOT[backend](operand, layout)
    if reason:
        raise ValueError(f"{op}: backend {backend!r} cannot run here: {reason}")
    return backend


def able(operand: Tensor, layout: SemiStructuredLayout) -> tuple[str, ...]:
    """The backends besides the eager twin that can run a call."""
    return tuple(name for name, why_not in WHY_NOT.items() if why_not(operand, layout) is None)


def fastest(
    op: str, m: int, shape: tuple[int, int], children: int, dtype: str, roof: Roof, among: Collection[str]
) -> str:
    """The backend that an operation is predicted to be fastest with.

    Args:
        op: ``"semi_structured_matmul"``, ``"semi_structured_matmul_t"`` or ``"semi_structured_grad"``.
        m: Rows of activations.
        shape: ``(N, K)`` of the weight.
        children: 1 or 2.
        dtype: As the cost model names it.
        roof: Of the device.
        among: What can run besides the eager twin.
    """
    n, k = shape[0] * children // 2, shape[1]  # one child alone is half the rows of a parent with two
    if min(m, n, k) < 1:
        return "eager"
    if op == "semi_structured_matmul_t":
        found = candidates("merge_matmul", "2:4", m, k, n, 2, dtype, roof)
        if children == 1:  # the transposed weight is not 2:4: these would run others' kernels
            among = [name for name in among if name == "triton"]
    else:
        names = {"semi_structured_matmul": "split_matmul", "semi_structured_grad": "partition_grad"}
        found = candidates(names[op], "2:4", m, n, k, 2, dtype, roof)
    taken = {*among, "eager"}
    return IMPLEMENTATIONS[best([c for c in found if IMPLEMENTATIONS.get(c.name) in taken]).name]


def fastest_here(op: str, operand: Tensor, layout: SemiStructuredLayout) -> str:
    """:func:`fastest` of what can run on the device and in the type of the activations."""
    m, index = operand.shape[0], operand.get_device()
    return _fastest_on(op, m, layout.shape, layout.children, dtype_name(operand), index, able(operand, layout))


@lru_cache(maxsize=4096)
def _fastest_on(
    op: str, m: int, shape: tuple[int, int], children: int, dtype: str, index: int, among: tuple[str, ...]
) -> str:
    return fastest(op, m, shape, children, dtype, roof_of(index), among)


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
"""For each backend: what keeps it from a call, in words; ``None`` where it can run."""

BACKENDS = ("auto", *WHY_NOT, "eager")
