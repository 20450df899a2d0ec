"""``merge_matmul`` as a 2:4 matmul: side by side, two children of two inputs, or four of one, make a quad.

Whatever the labels are, an edge reads one child of its input, so that the weight that reads children side by side is
2:4 (four children: 1:4). Its codes follow from the labels alone, and with two children its values are the parent's in
their own order. The activations are laid side by side by a copy.
"""

from importlib import import_module

from torch import Tensor

from .. import dispatch
from ..activations import finish
from ..semi_structured.backends import WHY_NOT
from ..semi_structured.layout import SemiStructuredLayout
from ..semi_structured.memo import once_per_version
from .config import limit
from .labels import PackedLabels

BACKENDS = ("sparse_tensor_core", "torch")
"""Those of the semi-structured operations that run it."""
CHILDREN = (2, 4)


def choose_backend(op: str, backend: str, w: Tensor, alpha: int) -> str:
    """As :func:`fpe.kernels.dispatch.choose_backend`, with two backends more.

    Raises:
        ValueError: No such backend exists.
        UnsupportedError: The one insisted on cannot run this call; the message says why.
    """
    if backend not in BACKENDS:
        return dispatch.choose_backend(op, backend, w, limit(alpha), by_cost=True, more=BACKENDS)
    reason = why_not(backend, w, w.shape[0], w.shape[1], alpha)
    if reason:
        raise dispatch.UnsupportedError(f"{op}: backend {backend!r} cannot run here: {reason}")
    return backend


def why_not(backend: str, operand: Tensor, n: int, k: int, alpha: int) -> str | None:
    """What keeps a backend from ``merge_matmul`` with a weight ``[n, k]``, in words; ``None`` where it can run."""
    if alpha not in CHILDREN:
        return f"it takes 2 or 4 children, got {alpha}"
    return WHY_NOT[backend](operand, n, alpha * k)


def merge_matmul_interleaved(
    z: Tensor,
    w: Tensor,
    labels: Tensor,
    transposed: bool,
    bias: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    """As :func:`fpe.kernels.merge_matmul`, by a backend of the semi-structured operations.

    Args:
        z: ``[M, alpha, K]``.
        w: ``[N, K]``.
        labels: uint8 ``[N, K]``, or planes of bits.
        transposed: Whether the planes are those of ``w.T``.
        bias: ``[N]``, or none.
        activation: Of :data:`fpe.kernels.activations.ACTIVATIONS`, or none.
        backend: One of :data:`BACKENDS`.
    """
    run = import_module(f"..semi_structured.{backend}", __package__).multiply_interleaved
    layout = _layout(labels, *w.shape, z.shape[1], transposed)
    return finish(run(z.transpose(1, 2).flatten(1), w, z.shape[1], layout, bias), activation)


@once_per_version
def _layout(labels: Tensor, n: int, k: int, alpha: int, transposed: bool) -> SemiStructuredLayout:
    """The layout of the weight that reads children side by side; without ``kept`` where every value is an edge's."""
    holes = labels.dim() == 2  # that there are none would take a look at them
    if labels.dim() == 3:
        packed = PackedLabels(labels, (k, n) if transposed else (n, k), alpha, transposed)
        labels, holes = packed.unpack(), packed.has_holes
    layout = SemiStructuredLayout.interleaved(labels, alpha)
    return layout if holes or alpha == 4 else layout._replace(kept=None)
