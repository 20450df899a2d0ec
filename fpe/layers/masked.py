"""The layer with any mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .base import ExpandedLinear, expect
from .dense_form import dense_weight, masked_copy


class MaskedLinear(ExpandedLinear):
    """A linear layer with any mask, stored wide: the successor under the paper's magnitude ranking.

    Args:
        mask: bool ``[outputs, inputs]``, true where an edge exists.
        bias: Whether outputs have a bias.
        device: As of ``nn.Linear``.
        dtype: As of ``nn.Linear``.
    """

    mask: Tensor
    made_of = ("weight", "mask")

    def __init__(
        self,
        mask: Tensor,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mask.shape[1], mask.shape[0], "auto")
        self.register_buffer("mask", mask.to(device=device, copy=True))
        self.weight = nn.Parameter(torch.empty(mask.shape, device=device, dtype=dtype))
        self.bias = self._make_bias(bias, device=device, dtype=dtype)
        self.reset_parameters(mask.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """``y = x @ (weight * mask).T + bias``."""
        weight = dense_weight(self, x)
        return linear(x, self.wide_weight() if weight is None else weight, self.bias)

    def masked_copy(self) -> Tensor:
        """:meth:`wide_weight`, quicker."""
        return masked_copy(self, 0, 1)

    def wide_weight(self) -> Tensor:
        """The masked weight, ``[outputs, inputs]``."""
        return torch.where(self.mask, self.weight, self.weight.new_zeros(()))

    def kept(self) -> Tensor:
        """The mask."""
        return self.mask

    @torch.no_grad()
    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask; see :meth:`ExpandedLinear.rewire`."""
        for tensor in (self.weight.data, *followers):
            tensor.masked_fill_(kept != self.mask, 0)
        self.mask.copy_(kept)

    @torch.no_grad()
    def clear_removed(self) -> None:
        """Sets the stored values of removed edges to zero."""
        self.weight.masked_fill_(~self.mask, 0)

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises unless the state fits; see :meth:`ExpandedLinear.check_state`."""
        super().check_state(state, prefix)
        expect(f"{prefix}mask", state[f"{prefix}mask"].dtype, torch.bool)

    @classmethod
    def _empty(cls, header: list[int], own: Mapping[str, Tensor]) -> ExpandedLinear:
        return cls(own["mask"], "bias" in own, own["weight"].device, own["weight"].dtype)
