"""What the tests of a layer's dense form on a CPU share: kinds of layers, and whether it is kept."""

from copy import deepcopy

import pytest
import torch
from support import (
    SIZES,
    Recipe,
    expanded_layers,
    readable_id,
    seeded,
)
from torch import Tensor, nn

from fpe.layers import ExpandedLinear, dense_form

KINDS = (  # every kind of layer, in both places of a pair
    Recipe(),
    Recipe("2:4", "partition"),
    Recipe("block", "block"),
    Recipe("random", "input", alpha=3),
    Recipe("block", "partition", alpha=3),
)
each_kind = pytest.mark.parametrize("recipe", KINDS, ids=readable_id)


def batch(rows: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(rows, SIZES[0], generator=seeded(seed))


def linears(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, ExpandedLinear))]


def kept(model: nn.Module) -> list[bool]:
    """Whether a dense weight is kept, layer by layer."""
    return [layer in dense_form._WEIGHTS for layer in expanded_layers(model)]


def without(model: nn.Module) -> nn.Module:
    """A copy that keeps nothing: it runs the operations."""
    model = deepcopy(model)
    for layer in expanded_layers(model):
        layer.keeps_dense = False
    return model


def write_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(2)
