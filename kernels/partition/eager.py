"""The partition operations in plain PyTorch: their definition, in any floating dtype."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..activations import finish
from .labels import PackedLabels
from .seeded import SeededLabels

Labels = Tensor | PackedLabels | SeededLabels
"""uint8 ``[N, K]``, the same packed, or of a seed."""


def table(labels: Labels, device: torch.device) -> Tensor:
    """The labels as uint8 ``[N, K]``, those of a seed on a device."""
    if isinstance(labels, SeededLabels):
        return labels.unpack(device)
    return labels.unpack() if isinstance(labels, PackedLabels) else labels


def owned(w: Tensor, labels: Tensor, alpha: int) -> Tensor:
    """The parent's weights seen by each child, zero elsewhere: ``[alpha, N, K]``."""
    children = w.new_zeros(alpha + 1, *w.shape)  # the last one has the edges that nobody owns
    return children.scatter_(0, labels.clamp(max=alpha).to(torch.int64)[None], w[None])[:alpha]


def split_matmul_eager(
    x: Tensor, w: Tensor, labels: Labels, alpha: int, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Eager twin of :func:`fpe.kernels.split_matmul` on ``x[M, K]``: returns ``y[M, alpha, N]``."""
    wide = owned(w, table(labels, w.device), alpha).flatten(0, 1)  # [alpha * N, K]
    y = linear(x, wide, None if bias is None else bias.flatten())
    return finish(y.unflatten(-1, (alpha, w.shape[0])), activation)


def merge_matmul_eager(
    z: Tensor, w: Tensor, labels: Labels, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Eager twin of :func:`fpe.kernels.merge_matmul` on ``z[M, alpha, K]``: returns ``y[M, N]``."""
    wide = owned(w, table(labels, w.device), z.shape[-2])  # [alpha, N, K]
    return finish(linear(z.flatten(-2), wide.transpose(0, 1).flatten(1), bias), activation)


def partition_grad_eager(dy: Tensor, x: Tensor, labels: Labels) -> Tensor:
    """Eager twin of :func:`fpe.kernels.partition_grad` on ``dy[M, alpha, N]``, ``x[M, K]``: ``dw[N, K]``."""
    alpha, n = dy.shape[-2:]
    wide = (dy.flatten(-2).mT @ x).unflatten(0, (alpha, n))  # [alpha, N, K]
    owner = table(labels, x.device).to(torch.int64)
    picked = wide.gather(0, owner.clamp(max=alpha - 1)[None])[0]
    dw = torch.where(owner < alpha, picked, picked.new_zeros(()))
    return stored_like(labels, dw)


def stored_like(labels: Labels, dw: Tensor) -> Tensor:
    """``dw`` contiguous as the weight is stored: by columns where the labels are those of its transpose."""
    transposed = not isinstance(labels, Tensor) and labels.transposed
    return dw.T.contiguous().T if transposed else dw.contiguous()


OPERATIONS = {
    "split_matmul": split_matmul_eager,
    "merge_matmul": merge_matmul_eager,
    "partition_grad": partition_grad_eager,
}
