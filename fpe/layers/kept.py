"""What those layers have in common that can store only the weights of their edges."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fpe.kernels import SeededHoles, unpack_values
from fpe.kernels.bitmap.existence import Kept
from fpe.kernels.here import kernel_wins

from .base import ExpandedLinear, Topology
from .dense_form import placed_copy
from .placement import overwrite, whole
from .state import layer_entries


class KeptLinear(ExpandedLinear):
    """A layer of a matrix ``[N, K]`` in which each position holds an edge or none.

    If some hold none, ``edge_weight`` is ``[nnz]``: the weights of the edges, row after row; ``bitmap`` says which
    positions they have. Gradients and an optimizer's moments have the same size. If all positions hold an edge,
    ``edge_weight`` is the matrix itself, except that a :class:`MaskedLinear` always has ``[nnz]``.
    """

    bitmap: Kept | None
    """Which positions hold an edge; ``None`` if all do."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(N, K)``: the shape of the parent's weight, or of the layer's own weight if it has no parent."""
        raise NotImplementedError

    @property
    def nonzeros(self) -> int:
        """Number of weights that the layer keeps, which are those that it stores."""
        return self.matrix_shape[0] * self.matrix_shape[1] if self.bitmap is None else self.bitmap.nnz

    def matrix(self) -> Tensor:
        """The weights of the edges at their positions ``[N, K]``, zero elsewhere; differentiable."""
        weight = whole(self.edge_weight)
        return weight if self.bitmap is None else unpack_values(weight, self._beside(weight, self.bitmap))

    @torch.no_grad()
    def set_matrix(self, weight: Tensor) -> None:
        """Takes the weights of the edges from a matrix ``[N, K]``.

        Raises:
            TypeError: ``weight`` is not a tensor.
            ValueError: It has another shape.
        """
        self._check_weight("set_matrix", weight, self.matrix_shape)
        self.set_edge_weight(self._stored(weight))

    def beats_wide(self, x: Tensor) -> bool:
        """Whether what ``fpe here`` measured says that the kernel on labels, or on kept values, is faster."""
        if isinstance(self.bitmap, SeededHoles):  # no CPU kernel reads through them
            return False
        (n, k), rows = self.matrix_shape, x.numel() // max(self.in_features, 1)
        density = None if self.bitmap is None else self.bitmap.nnz / max(n * k, 1)
        return kernel_wins(rows, n, k, max(self.planes), x.dtype, "wide", density)

    def masked_copy(self) -> Tensor:
        """:meth:`wide_weight`, made in a quicker way."""
        return placed_copy(self)

    def places(self) -> Tensor:
        """The position of each stored weight in the flattened :meth:`wide_weight`, int64."""
        raise NotImplementedError

    def _removed(self) -> Tensor | None:
        """Returns ``None``, because nothing but edges is stored."""
        return None

    def _stored(self, matrix: Tensor) -> Tensor:
        """Returns what a matrix of any dtype has at the edges, in the form of ``edge_weight``."""
        return matrix if self.bitmap is None else self._beside(matrix, self.bitmap).from_dense(matrix)

    def _moved(self, stay: Tensor, topology: Topology, count: int, tensors: tuple[Tensor, ...]) -> None:
        """Takes another topology with as many edges, in place. Positions in ``stay`` keep their entries.

        Raises:
            ValueError: It has another number of edges.
        """
        if count != self.nonzeros:
            raise ValueError(f"{type(self).__name__}.rewire: expected a mask of {self.nonzeros} edges, got {count}")
        matrices = [t if self.bitmap is None else self.bitmap.to_dense(t) for t in map(whole, tensors)]
        self._set_topology(topology)
        for tensor, old in zip(tensors, matrices, strict=True):
            overwrite(tensor, self._stored(old.masked_fill(~stay, 0)))

    # The state dict

    @classmethod
    def _mask_of(cls, topology: Topology) -> Tensor:
        """Which positions a topology gives an edge, bool ``[N, K]``."""
        raise NotImplementedError

    def _fit(self, topology: Topology, name: str) -> None:
        count = int(self._mask_of(topology).sum())
        if count != self.nonzeros:
            raise ValueError(
                f"state dict: '{name}' has {count} edges, this layer {self.nonzeros}: its parameter would have to be "
                "another, which no optimizer knows; build the model from the state with fpe.restore"
            )

    def _entries(self, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Also packs a weight that is a matrix with zeros, as earlier versions stored it."""
        own = layer_entries(state, prefix)
        weight = own.get("edge_weight")
        if self.bitmap is not None and isinstance(weight, Tensor) and tuple(weight.shape) == self.matrix_shape:
            mask = self.bitmap.unpack()
            if "_extra_state" in own:
                mask = self._mask_of(self._topology_of(own["_extra_state"], f"{prefix}_extra_state"))
            own["edge_weight"] = weight[mask.to(weight.device)]
        return own


def stored_shape(mask: Tensor, always: bool = False) -> tuple[int, ...]:
    """Shape of the stored weights of a mask: its own if it keeps all, else ``[nnz]``; with ``always``, ``[nnz]``."""
    count = int(mask.sum())
    return tuple(mask.shape) if count == mask.numel() and not always else (count,)
