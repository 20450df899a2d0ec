"""The partition operations in plain PyTorch: their definition, in any floating dtype."""

import torch
from torch import Tensor

HOLE = 255
"""Label of an edge that no child owns. Any label outside ``0 .. alpha-1`` means the same."""


def _owned(w: Tensor, labels: Tensor, alpha: int) -> Tensor:
    """The parent's weights seen by each child, zero elsewhere: ``[alpha, N, K]``."""
    children = torch.arange(alpha, device=labels.device, dtype=labels.dtype)[:, None, None]
    return torch.where(labels == children, w, w.new_zeros(()))


def split_matmul_eager(x: Tensor, w: Tensor, labels: Tensor, alpha: int) -> Tensor:
    """Eager twin of :func:`fpe.kernels.split_matmul` on ``x[M, K]``: returns ``y[M, alpha, N]``."""
    wide = _owned(w, labels, alpha).flatten(0, 1)  # [alpha * N, K]
    return (x @ wide.mT).unflatten(-1, (alpha, w.shape[0])).contiguous()


def merge_matmul_eager(z: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Eager twin of :func:`fpe.kernels.merge_matmul` on ``z[M, alpha, K]``: returns ``y[M, N]``."""
    wide = _owned(w, labels, z.shape[-2])  # [alpha, N, K]
    return (z.flatten(-2) @ wide.permute(0, 2, 1).flatten(0, 1)).contiguous()


def partition_grad_eager(dy: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Eager twin of :func:`fpe.kernels.partition_grad` on ``dy[M, alpha, N]``, ``x[M, K]``: ``dw[N, K]``."""
    alpha, n = dy.shape[-2:]
    wide = (dy.flatten(-2).mT @ x).unflatten(0, (alpha, n))  # [alpha, N, K]
    owner = labels.to(torch.int64)
    picked = wide.gather(0, owner.clamp(max=alpha - 1)[None])[0]
    return torch.where(owner < alpha, picked, picked.new_zeros(())).contiguous()
