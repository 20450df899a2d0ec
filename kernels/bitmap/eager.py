"""The bitmap operations in plain PyTorch: their definition, in any dtype."""

from torch import Tensor

from .existence import Kept


def unpack_values_eager(values: Tensor, kept: Kept) -> Tensor:
    """Eager twin of :func:`fpe.kernels.unpack_values`: ``values[nnz]`` to ``w[N, K]``."""
    return kept.to_dense(values)


def pack_values_eager(w: Tensor, kept: Kept) -> Tensor:
    """Eager twin of :func:`fpe.kernels.pack_values`: ``w[N, K]`` to ``values[nnz]``."""
    return kept.from_dense(w)


OPERATIONS = {"unpack_values": unpack_values_eager, "pack_values": pack_values_eager}
