"""State dicts of expanded models: checked before anything is loaded, and rebuilt from the dense model."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor, nn

from .layers import ExpandedLinear
from .surgery import replace_modules, sequential_leaves, widened_between

Model = TypeVar("Model", bound=nn.Module)


def guard_state_dict(model: Model) -> Model:
    """Makes ``model.load_state_dict`` check a whole state before it changes anything; returns the model."""
    model.register_load_state_dict_pre_hook(_check_all)
    return model


def _check_all(
    module: nn.Module,
    state: Mapping[str, Any],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Raises ``ValueError`` if a part of the state does not fit the module, as ``load_state_dict`` is entered."""
    expanded = {n: m for n, m in module.named_modules(prefix=prefix.rstrip(".")) if isinstance(m, ExpandedLinear)}
    owned = tuple(f"{name}." for name in expanded)
    for name, layer in expanded.items():
        layer.check_state(state, f"{name}.")
    own_state = module.state_dict(prefix=prefix)
    for name, own in own_state.items():
        if not name.startswith(owned) and isinstance(own, Tensor) and (strict or name in state):
            value = state.get(name)
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if got != list(own.shape):
                raise ValueError(f"state dict: '{name}' should be {list(own.shape)}, got {got}")
    foreign = [n for n in state if n.startswith(prefix) and n not in own_state and not n.endswith(".inside")]
    if strict and foreign:
        raise ValueError(f"state dict: expected the entries of the model, got '{foreign[0]}' besides")


def restore(model: Model, state: Mapping[str, Any]) -> Model:
    """Rebuilds an expanded model from the dense architecture it came from and a saved state.

    Which layers are expanded, and how, stands in the state; the dense model only says what lies around them,
    and its weights do not matter::

        torch.save(wide.state_dict(), path)
        wide = fpe.restore(make_model(), torch.load(path, weights_only=True))

    Args:
        model: The dense model; left as it is.
        state: ``state_dict()`` of the expanded model.

    Returns:
        A new model with the state loaded.

    Raises:
        ValueError: The state is damaged, or belongs to another architecture.
    """
    layers: dict[str, nn.Linear | ExpandedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            wide_layer = _widened(name, module, state)
            if wide_layer is not None:
                layers[name] = wide_layer
    replaced: dict[str, nn.Module] = dict(layers)
    if isinstance(model, nn.Sequential):
        linears = [(name, module) for name, module in sequential_leaves(model) if isinstance(module, nn.Linear)]
        for (first, dense), (second, _) in pairwise(linears):
            alpha = layers[first].out_features // dense.out_features if first in layers else 1
            if alpha > 1:
                replaced.update(widened_between(model, first, second, alpha))
    wide = guard_state_dict(replace_modules(model, replaced))
    wide.load_state_dict(dict(state))
    return wide


def _widened(name: str, linear: nn.Linear, state: Mapping[str, Any]) -> nn.Linear | ExpandedLinear | None:
    """The layer that a state has in place of a dense one; ``None`` where it has the same."""
    prefix = f"{name}." if name else ""
    weight = state.get(f"{prefix}weight")
    layer: nn.Linear | ExpandedLinear
    if f"{prefix}_extra_state" in state:
        layer = ExpandedLinear.from_state(state, prefix)
    elif isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape != linear.weight.shape:
        factory = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = nn.Linear(weight.shape[1], weight.shape[0], f"{prefix}bias" in state, **factory)
    else:
        return None
    if layer.in_features % linear.in_features or layer.out_features % linear.out_features:
        raise ValueError(
            f"state dict: '{name}' should be a widened {linear.out_features} x {linear.in_features}, got "
            f"{layer.out_features} x {layer.in_features}"
        )
    if (layer.bias is None) != (linear.bias is None):
        raise ValueError(f"state dict: '{prefix}bias' should be {'absent' if linear.bias is None else 'present'}")
    return layer.train(linear.training)
