"""How much features collide in a layer's weights: capacity, cosine similarity, Gram matrix.

Weights are ``[neurons, features]`` as ``nn.Linear`` stores them; a feature is a column, a neuron a row. For an FPE
layer, pass ``layer.wide_weight()``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gram(weight: Tensor) -> Tensor:
    """Gram matrix of the features, ``G = W.T @ W``: ``[features, features]`` (paper, section 2.2.1).

    The diagonal says how strongly a feature is represented, the rest how much it interferes with others.

    Args:
        weight: ``[neurons, features]``.

    Raises:
        TypeError: ``weight`` is not floating point.
        ValueError: ``weight`` is not a matrix.
    """
    _check(weight)
    return weight.mT @ weight


def feature_capacity(weight: Tensor, groups: Sequence[int] | Tensor | None = None) -> Tensor:
    """Share of a dimension that each feature has to itself (Scherlis et al. 2022, equation 2).

    ``C_i = (w_i . w_i)^2 / sum_j (w_i . w_j)^2`` for column ``i`` of the weight: 1 for a feature orthogonal
    to all others, 0 for one that is not represented. Their sum is at most the number of neurons.

    Args:
        weight: ``[neurons, features]``.
        groups: Group of each feature, integers ``0 .. G-1`` (clauses of the Boolean task).

    Returns:
        ``[features]``, or with ``groups`` the sums over each group, ``[G]``.

    Raises:
        TypeError: ``weight`` is not floating point, or ``groups`` are not integers.
        ValueError: ``weight`` is not a matrix, or ``groups`` has another length or a negative entry.
    """
    _check(weight)
    # Capacity does not depend on the scale of the weights; at scale 1 the fourth powers neither vanish nor overflow.
    scale = weight.abs().amax() if weight.numel() else weight.new_ones(())
    products = gram(torch.where(scale > 0, weight / scale, weight)).square()
    total = products.sum(1)
    capacity = torch.where(total > 0, products.diagonal() / total, total.new_zeros(()))
    if groups is None:
        return capacity
    index = torch.as_tensor(groups, device=weight.device)
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"feature_capacity: groups must be integers, got {index.dtype}")
    if index.shape != capacity.shape:
        raise ValueError(f"feature_capacity: groups must have shape {list(capacity.shape)}, got {list(index.shape)}")
    if len(index) and int(index.min()) < 0:
        raise ValueError(f"feature_capacity: groups must count from 0, got {int(index.min())}")
    return capacity.new_zeros(int(index.max()) + 1 if len(index) else 0).index_add(0, index.long(), capacity)


def mean_cosine_similarity(weight: Tensor) -> Tensor:
    """Mean cosine between distinct neurons' weight rows, a scalar (paper, section 3).

    ``2 / (n * (n - 1)) * sum_{i<j} w_i . w_j / (|w_i| |w_j|)``; a neuron without weights counts as orthogonal
    to all others. Zero for fewer than two neurons.

    Args:
        weight: ``[neurons, features]``.

    Raises:
        TypeError: ``weight`` is not floating point.
        ValueError: ``weight`` is not a matrix.
    """
    _check(weight)
    n = weight.shape[0]
    if n < 2:
        return weight.new_zeros(())
    length = weight.norm(dim=1, keepdim=True)
    units = torch.where(length > 0, weight / length, weight.new_zeros(()))
    # The sum over all pairs is |sum of unit rows|^2 less the squares of the rows themselves.
    return (units.sum(0).square().sum() - units.square().sum()) / (n * (n - 1))


def _check(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(f"metrics: weight must be a floating-point tensor, got {got}")
    if weight.dim() != 2:
        raise ValueError(f"metrics: weight must be [neurons, features], got shape {list(weight.shape)}")
