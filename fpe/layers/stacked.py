"""Several layers in place of one whose weight held theirs one above the other."""

from typing import Any

import torch
from torch import Tensor, nn


class StackedLinear(nn.ModuleList):
    """Layers that read the same input; their outputs are concatenated. A fused ``gate_up_proj`` becomes one.

    Each layer's children lie in planes of their own. So code that splits the output into as many equal pieces as there
    are layers gets the outputs of each layer.

    Args:
        layers: Linear layers, expanded or not, with as many inputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return torch.cat([layer(x) for layer in self], -1)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self[0].in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """Width of all outputs."""
        return sum(layer.out_features for layer in self)  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:
        """The wide weights, one above the other, ``[out_features, in_features]``; computed at each access."""
        return torch.cat([layer.weight for layer in self])  # type: ignore[misc]

    @property
    def bias(self) -> Tensor | None:
        """The biases, one after the other, ``[out_features]``."""
        return None if self[0].bias is None else torch.cat([layer.bias for layer in self])  # type: ignore[misc]

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` that computes the same function at the wide size."""
        layers: list[Any] = [layer.to_linear() if hasattr(layer, "to_linear") else layer for layer in self]  # type: ignore[operator]
        weight, biased = torch.cat([layer.weight for layer in layers]), layers[0].bias is not None
        dense = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=biased, device="meta")
        dense.weight = nn.Parameter(weight, layers[0].weight.requires_grad)
        if biased:
            dense.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), layers[0].bias.requires_grad)
        return dense.train(self.training)
