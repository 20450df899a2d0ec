"""State dicts of expanded models: checked before anything is loaded, and rebuilt from the dense model."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from .layers import ExpandedLinear
from .surgery import NORMS, replace_modules, widen_norm

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
    for name, own in module.state_dict().items():
        if not (prefix + name).startswith(owned) and isinstance(own, Tensor):
            value = state.get(prefix + name)
            if value is None and not strict:
                continue
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if got != list(own.shape):
                raise ValueError(f"state dict: '{prefix}{name}' should be {list(own.shape)}, got {got}")


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
    replaced: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if f"{prefix}_extra_state" in state and isinstance(module, nn.Linear):
            replaced[name] = ExpandedLinear.from_state(state, prefix)
            continue
        weight = state.get(f"{prefix}weight")
        own = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not isinstance(own, Tensor) or weight.shape == own.shape:
            continue
        if isinstance(module, nn.Linear) and weight.dim() == 2:
            bias = f"{prefix}bias" in state
            replaced[name] = nn.Linear(weight.shape[1], weight.shape[0], bias, device=own.device, dtype=own.dtype)
        elif isinstance(module, NORMS) and weight.dim() == 1 and len(weight) % len(own) == 0:
            replaced[name] = widen_norm(module, len(weight) // len(own))
    wide = guard_state_dict(replace_modules(model, replaced))
    wide.load_state_dict(dict(state))
    return wide
