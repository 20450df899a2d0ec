"""What runs the partition operations, and what keeps each from a call."""

from torch import Tensor

from ..cpu import why_not_cpu
from ..dispatch import CPU, EAGER, Backend, why_not_triton
from ..semi_structured.backends import BACKENDS as SEMI_STRUCTURED
from .config import limit
from .interleaved import CHILDREN


def _why_not_triton(operand: Tensor, alpha: int, *more: object) -> str | None:
    return why_not_triton(operand, limit(alpha))


def _why_not_cpu(operand: Tensor, alpha: int, *more: object) -> str | None:
    return why_not_cpu(operand, limit(alpha))


def _why_not_sparse(w: Tensor, alpha: int, transposed: bool) -> str | None:
    if alpha != 2:
        return f"of labels of a seed it takes two children, got {alpha}"
    if transposed:
        return "labels of a seed are 2:4 along the columns of the weight, and these are of its transpose"
    return SEMI_STRUCTURED["sparse_tensor_core"].why_not(w, alpha * w.shape[0], w.shape[1])


def _interleaved(name: str) -> Backend:
    """A backend of the semi-structured operations that multiplies a merged weight with its children side by side."""

    def why_not(w: Tensor, alpha: int, shape: tuple[int, int] | None = None) -> str | None:
        if alpha not in CHILDREN:
            return f"it takes 2 or 4 children, got {alpha}"
        n, k = shape or w.shape
        return SEMI_STRUCTURED[name].why_not(w, n, alpha * k)

    return Backend(SEMI_STRUCTURED[name].module, SEMI_STRUCTURED[name].in_model, why_not)


SPLIT = {
    "triton": Backend("partition.triton", "packed labels", _why_not_triton),
    "cpu": Backend("partition.cpu", CPU, _why_not_cpu),
    "eager": Backend("partition.eager", EAGER),
}
"""Those of ``split_matmul`` and ``partition_grad``; ``why_not`` takes an operand and ``alpha``."""

_SPARSE = SEMI_STRUCTURED["sparse_tensor_core"]
SPLIT_OF_SEED = {**SPLIT, "sparse_tensor_core": Backend(_SPARSE.module, _SPARSE.in_model, _why_not_sparse)}
"""Those of ``split_matmul`` with labels of a seed; ``why_not`` also takes whether the labels are of the transpose.
``"auto"`` does not choose the last one."""

MERGE = {**SPLIT, **{name: _interleaved(name) for name in ("sparse_tensor_core", "torch")}}
"""Those of ``merge_matmul``; ``why_not`` takes the weight, ``alpha``, and its shape if only kept values are stored."""
