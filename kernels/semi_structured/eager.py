"""The semi-structured operations in plain PyTorch: their definition, in any floating dtype."""

from torch import Tensor
from torch.nn.functional import linear, pad

from .layout import SemiStructuredLayout


def semi_structured_matmul_eager(
    x: Tensor, values: Tensor, layout: SemiStructuredLayout, bias: Tensor | None = None
) -> Tensor:
    """Eager twin of :func:`fpe.kernels.semi_structured_matmul` on ``x[M, K]``: returns ``y[M, children, N]``."""
    wide = layout.to_dense(values).flatten(0, 1)
    y = linear(x, wide, None if bias is None else bias.flatten())
    return y.unflatten(-1, layout.values_shape[:2]).contiguous()


def semi_structured_matmul_t_eager(dy: Tensor, values: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """Eager twin of :func:`fpe.kernels.semi_structured_matmul_t` on ``dy[M, children, N]``: returns ``dx[M, K]``."""
    return (dy.flatten(-2) @ layout.to_dense(values).flatten(0, 1)).contiguous()


def semi_structured_grad_eager(dy: Tensor, x: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """Eager twin of :func:`fpe.kernels.semi_structured_grad`: returns ``dvalues[children, N, 2 * quads]``."""
    wide = (dy.flatten(-2).mT @ x).unflatten(0, layout.values_shape[:2])
    return pad(wide, (0, 4 * layout.quads - layout.shape[1])).gather(-1, layout.positions())


def semi_structured_compress_eager(w: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """Eager twin of :func:`fpe.kernels.semi_structured_compress` on ``w[N, K]``."""
    return layout._replace(kept=None).from_dense(w)


def semi_structured_expand_eager(values: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """The adjoint of :func:`semi_structured_compress_eager`: the children's dense weights, added, ``[N, K]``."""
    return layout.to_dense(values).sum(0)


OPERATIONS = {
    "semi_structured_matmul": semi_structured_matmul_eager,
    "semi_structured_matmul_t": semi_structured_matmul_t_eager,
    "semi_structured_grad": semi_structured_grad_eager,
    "semi_structured_compress": semi_structured_compress_eager,
    "semi_structured_expand": semi_structured_expand_eager,
}
