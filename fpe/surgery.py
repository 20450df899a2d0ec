"""Replacing modules inside a model, and widening what stands between the layers of a pair."""

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)

# What may stand between the layers of a pair: element-wise modules stay, norms over the features are widened.
ELEMENTWISE = (
    nn.CELU,
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)


def widen_norm(norm: nn.Module, alpha: int) -> nn.Module:
    """A norm over ``alpha`` times the features: affine parameters and running statistics are copied.

    Args:
        norm: ``nn.LayerNorm`` or ``nn.RMSNorm`` over the last dimension, or ``nn.BatchNorm1d``.
        alpha: Children per neuron.

    Raises:
        ValueError: The norm is of another kind, or spans several dimensions.
    """
    if isinstance(norm, nn.BatchNorm1d):
        return tiled(norm, alpha, num_features=alpha * norm.num_features)
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and len(norm.normalized_shape) == 1:
        return tiled(norm, alpha, normalized_shape=(alpha * norm.normalized_shape[0],))
    raise ValueError(f"expand: cannot widen {norm}; expected a norm over one dimension of features")


def tiled(module: nn.Module, alpha: int, **sizes: object) -> nn.Module:
    """A copy with every per-feature tensor repeated ``alpha`` times, and the given sizes."""
    wide = copy.deepcopy(module)
    for name, size in sizes.items():
        setattr(wide, name, size)
    for name, parameter in wide.named_parameters():
        setattr(wide, name, nn.Parameter(parameter.detach().repeat(alpha), parameter.requires_grad))
    for name, buffer in wide.named_buffers():
        if buffer.dim():
            setattr(wide, name, buffer.repeat(alpha))
    return wide


def replace_modules(model: Model, replaced: Mapping[str, nn.Module]) -> Model:
    """A deep copy of a model with some modules replaced by name; the originals are not copied."""
    memo: dict[int, object] = {id(model.get_submodule(name)): module for name, module in replaced.items()}
    return copy.deepcopy(model, memo)
