"""The layer with any mask."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .base import ExpandedLinear, check_known
from .dense_form import masked_copy
from .placement import overwrite, whole
from .state import Header, to_bits, to_words


class MaskedLinear(ExpandedLinear):
    """A linear layer with any mask, stored wide: the successor under the paper's magnitude ranking.

    ``edge_weight`` is ``[outputs, inputs]``, zero where the mask is false.

    Args:
        mask: bool ``[outputs, inputs]``, true where an edge exists.
        bias: Whether outputs have a bias.
        device: As of ``nn.Linear``.
        dtype: As of ``nn.Linear``.

    Raises:
        TypeError: ``mask`` is no bool tensor.
        ValueError: ``mask`` is no matrix, or is on ``"meta"``.
    """

    KIND = 2
    STORED = ("mask",)
    mask: Tensor

    def __init__(
        self,
        mask: Tensor,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        outputs, inputs = check_known("MaskedLinear", "mask", mask, torch.bool).shape
        super().__init__(inputs, outputs, "auto")
        self._build((outputs, inputs), bias, mask, device=device, dtype=dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        return linear(x, self._masked(self.edge_weight), self.bias)

    def masked_copy(self) -> Tensor:
        """:meth:`wide_weight`, quicker."""
        return masked_copy(self, 0, 1)

    def wide_weight(self) -> Tensor:
        """The masked weight, ``[outputs, inputs]``."""
        return self._masked(whole(self.edge_weight))

    def _masked(self, weight: Tensor) -> Tensor:
        return torch.where(self._beside(weight, self.mask), weight, weight.new_zeros(()))

    @torch.no_grad()
    def set_wide_weight(self, weight: Tensor) -> None:
        """Takes the kept weights from a dense ``[outputs, inputs]``."""
        self.set_edge_weight(self._masked(weight))

    def kept(self) -> Tensor:
        """The mask."""
        return self.mask

    @torch.no_grad()
    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask; see :meth:`ExpandedLinear.rewire`."""
        for tensor in (self.edge_weight, *followers):
            overwrite(tensor, whole(tensor).masked_fill(kept != self.mask, 0))
        self._set_topology(kept)

    def _removed(self) -> Tensor:
        return ~self.mask

    def _set_topology(self, topology: Tensor) -> None:
        self.mask = topology.clone()
        self._topology_is(to_words(topology))

    @classmethod
    def _parse(cls, header: Header, words: Tensor) -> Tensor:
        mask, rest = to_bits(words, header.out_features, header.in_features)
        if len(rest):
            raise ValueError(f"{len(rest)} words of topology are left over")
        return mask

    @classmethod
    def _of(cls, header: Header, topology: Tensor, bias: bool, **factory: Any) -> "MaskedLinear":
        return cls(topology, bias, **factory)
