"""The layer with any mask."""

from typing import Any

import torch
from torch import Tensor

from fpe.kernels import Bitmap, masked_matmul

from .base import check_known
from .kept import KeptLinear, stored_shape
from .state import Header, to_bits, to_words


class MaskedLinear(KeptLinear):
    """A linear layer with any mask: the successor under the paper's magnitude ranking.

    ``edge_weight`` is ``[nnz]``, the weights where the mask is true, row after row. The backend is ``"auto"``; set the
    attribute ``backend`` to choose another.

    Args:
        mask: bool ``[outputs, inputs]``, true where an edge exists.
        bias: Whether outputs have a bias.
        device: As in ``nn.Linear``.
        dtype: As in ``nn.Linear``.

    Raises:
        TypeError: ``mask`` is not a bool tensor.
        ValueError: ``mask`` is not a matrix, or is on ``"meta"``.

    Example:
        >>> layer = fpe.MaskedLinear(torch.eye(8, dtype=torch.bool))
        >>> layer(torch.ones(3, 8)).shape, layer.edge_weight.shape
        (torch.Size([3, 8]), torch.Size([8]))
    """

    KIND = 2
    STORED = ("bitmap",)
    bitmap: Bitmap

    def __init__(
        self,
        mask: Tensor,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        outputs, inputs = check_known("MaskedLinear", "mask", mask, torch.bool).shape
        super().__init__(inputs, outputs, "auto")
        self._build(stored_shape(mask, always=True), bias, mask, device=device, dtype=dtype)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(outputs, inputs)``."""
        return self.out_features, self.in_features

    def _multiply(self, x: Tensor) -> Tensor:
        weight = self.edge_weight
        return masked_matmul(x, weight, self._beside(weight, self.bitmap), self.bias, backend=self.backend)

    def wide_weight(self) -> Tensor:
        """The masked weight, ``[outputs, inputs]``."""
        return self.matrix()

    @torch.no_grad()
    def set_wide_weight(self, weight: Tensor) -> None:
        """Takes the weights of the kept edges from a dense weight ``[outputs, inputs]``."""
        self._check_weight("set_wide_weight", weight, self.matrix_shape)
        self.set_matrix(weight)

    def kept(self) -> Tensor:
        """The mask, bool ``[outputs, inputs]``."""
        return self.bitmap.unpack()

    def places(self) -> Tensor:
        """The positions of the true entries in the flattened mask, int64 ``[nnz]``."""
        return self.kept().flatten().nonzero().squeeze(1)

    @torch.no_grad()
    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask; see :meth:`ExpandedLinear.rewire`."""
        self._moved(kept & self.kept(), kept, int(kept.sum()), (self.edge_weight, *followers))

    def _set_topology(self, topology: Tensor) -> None:
        self.bitmap = Bitmap.pack(topology)
        self._topology_is(to_words(topology))

    @classmethod
    def _mask_of(cls, topology: Tensor) -> Tensor:
        return topology

    @classmethod
    def _parse(cls, header: Header, words: Tensor) -> Tensor:
        mask, rest = to_bits(words, header.out_features, header.in_features)
        if len(rest):
            raise ValueError(f"{len(rest)} words of topology are left over")
        return mask

    @classmethod
    def _of(cls, header: Header, topology: Tensor, bias: bool, **factory: Any) -> "MaskedLinear":
        return cls(topology, bias, **factory)
