"""State dicts of expanded models: checked before anything is loaded, and rebuilt from the dense model."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import chain, pairwise
from os import PathLike
from typing import Any, TypeVar

from torch import Tensor, nn

from .files import Place, load
from .groups import as_linear, is_linear
from .layers import ExpandedLinear, StackedLinear
from .layers.base import check_shape
from .models.discovery import blocks
from .surgery import chains, replace_modules, sequential_leaves, widened_between

Model = TypeVar("Model", bound=nn.Module)
STACK = 2
"""Most layers that a :class:`.StackedLinear` of a checkpoint holds."""


def guard_state_dict(model: Model) -> Model:
    """Makes ``model.load_state_dict`` refuse a state that does not fit before it changes anything; returns the model.

    Only entries that the state holds are checked. Missing and unexpected names are left to PyTorch, which returns them,
    or with ``strict=True`` raises ``RuntimeError`` after it has loaded what fits. If the model is part of a larger one
    whose ``load_state_dict`` is called, the parts before it are loaded before its own entries are checked.
    """
    model.register_load_state_dict_pre_hook(_check_all)
    return model


def _check_all(module: nn.Module, state: Mapping[str, Any], prefix: str, *rest: object) -> None:
    """Raises ``ValueError`` if a part of the state does not fit the module, as ``load_state_dict`` is entered."""
    expanded = {n: m for n, m in module.named_modules(prefix=prefix.rstrip(".")) if isinstance(m, ExpandedLinear)}
    owned = tuple(f"{name}." if name else "" for name in expanded)
    for name, layer in zip(owned, expanded.values(), strict=True):
        layer.check_state(state, name)
    for name, own in module.state_dict(prefix=prefix).items():
        if name in state and isinstance(own, Tensor) and not name.startswith(owned):
            check_shape(name, state[name], own)


def restore(
    model: Model,
    state: Mapping[str, Any] | Place,
    *,
    alpha: int | None = None,
    seed: int | None = None,
    pairs: Iterable[tuple[str, str]] | None = None,
) -> Model:
    """Rebuilds an expanded model from the dense architecture it came from and a saved state.

    The state says which layers are expanded, and how. The dense model only says what is around them, and its
    weights do not matter. It may be on ``"meta"``: then its tensors are created where the state's are::

        torch.save(wide.state_dict(), path)
        wide = fpe.restore(make_model(), torch.load(path, weights_only=True))

    If ``seed`` is given, the state is the *dense* model's. Labels of a seed need not be stored, so a checkpoint of the
    parent, ``alpha`` and the seed define the expanded model: the one that ``fpe.expand(dense, alpha,
    structure="seeded", resparsify="partition", seed=seed)`` makes.

    Args:
        model: The dense model; it is not changed.
        state: ``state_dict()`` of the expanded model, or the path of a file that :func:`fpe.save` wrote. A tensor that
            several names of the dense model share needs only one of them, as in files of safetensors.
        alpha: Children per neuron; only for a dense state.
        seed: As in :func:`fpe.expand`; only for a dense state.
        pairs: As in :func:`fpe.expand`; only for a dense state.

    Returns:
        A new model with the state loaded.

    Raises:
        TypeError: ``model`` is not a module, or ``state`` is neither a mapping nor a path.
        ValueError: The state is damaged, or belongs to another architecture; the file is not one that :func:`fpe.save`
            wrote; ``alpha`` is given without ``seed`` or the other way round, or ``pairs`` without them.
        ImportError: ``state`` is a path, and safetensors is not installed.

    Example:
        >>> def make_model():
        ...     return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> wide = fpe.expand(make_model())
        >>> again = fpe.restore(make_model(), wide.state_dict())
        >>> torch.equal(again(torch.ones(1, 16)), wide(torch.ones(1, 16)))
        True
    """
    if isinstance(state, (str, PathLike)):
        state = load(state)
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be the dense nn.Module, got {type(model).__name__}")
    if not isinstance(state, Mapping):
        raise TypeError(f"restore: state must be a state dict, got {type(state).__name__}")
    state = dict(state)
    if (alpha is None) != (seed is None) or (pairs is not None and seed is None):
        raise ValueError(
            "restore: alpha and seed go together, with a dense state, and pairs only with them; got "
            f"alpha={alpha}, seed={seed}, pairs={pairs}"
        )
    if alpha is not None:
        from .expansion import expand

        dense = deepcopy(model)
        _load(dense, state)
        return expand(dense, alpha, structure="seeded", resparsify="partition", pairs=pairs, seed=seed)
    for names in _shared(model):
        known = next((state[name] for name in names if name in state), None)
        for name in names if known is not None else ():
            state.setdefault(name, known)
    wide = guard_state_dict(replace_modules(model, replacements(model, state)))
    _load(wide, state)
    return wide


def replacements(model: nn.Module, state: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules that an expanded model has in place of a dense model's, by name, with their weights.

    Args:
        model: The dense model.
        state: The state of the expanded model.

    Raises:
        ValueError: The state is damaged, or belongs to another architecture.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            wide_layer = _widened(name, module, state)
            if wide_layer is not None:
                layers[name] = wide_layer
    replaced = dict(layers)

    def widen(first: str, second: str, between: Iterable[str] = ()) -> None:
        dense, wide = as_linear(model.get_submodule(first)), layers.get(first)
        alpha = 1 if wide is None else int(wide.out_features) // dense.out_features  # type: ignore[arg-type]
        if alpha > 1:
            replaced.update(widened_between(model, first, second, alpha, between))

    for prefix, inner in chains(model):
        linears = [name for name, module in sequential_leaves(inner, prefix) if is_linear(module)]
        for first, second in pairwise(linears):
            widen(first, second)
    for group in blocks(model):
        if group.between:
            widen(group.firsts[0], group.second, group.between)
    return replaced


def _load(wide: nn.Module, state: dict[str, Any]) -> None:
    """Loads a whole state into a new model, whose tensors may be on ``"meta"``."""
    on_meta = any(t.is_meta for t in chain(wide.parameters(), wide.buffers()))
    shared = _shared(wide) if on_meta else []
    if on_meta:
        state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
    try:
        missing, unexpected = wide.load_state_dict(state, strict=False, assign=on_meta)
    except RuntimeError as error:
        raise ValueError(f"state dict: {error}") from error
    # Format 2 had entries for the topology; the layers have read them, so they do not count as unexpected.
    if missing or unexpected:
        raise ValueError(
            f"state dict: it lacks entries of the model: {', '.join(missing)}{_instead(unexpected)}"
            if missing
            else f"state dict: it has entries that the model has not: {', '.join(unexpected)}"
        )
    for names in shared:  # after assigning, each name has a tensor of its own
        _, first = _owner(wide, names[0])
        for name in names[1:]:
            module, _ = _owner(wide, name)
            setattr(module, name.rpartition(".")[2], first)
    left = [name for name, t in chain(wide.named_parameters(), wide.named_buffers()) if t.is_meta]
    if left:
        raise ValueError(
            f"restore: these tensors of the model on 'meta' are in no state dict: {', '.join(left)}; build the model "
            "on a device instead"
        )


def _instead(unexpected: list[str]) -> str:
    """The first names that a state has in place of those that are missing: a wrapper's prefix shows in them."""
    return f"; in their place it has {', '.join(unexpected[:3])}" if unexpected else ""


def _shared(model: nn.Module) -> list[list[str]]:
    """The names of every tensor of a model that has several."""
    named: dict[int, list[str]] = {}
    everything = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in chain(*everything):
        named.setdefault(id(tensor), []).append(name)
    return [names for names in named.values() if len(names) > 1]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, Any]:
    """The module that holds a tensor, and the tensor."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return module, getattr(module, leaf)


def _widened(name: str, dense: nn.Module, state: Mapping[str, Any]) -> nn.Module | None:
    """Returns the expanded layer that a state has for a dense one, or ``None`` if the state has it dense too."""
    linear, prefix = as_linear(dense), f"{name}." if name else ""
    weight = state.get(f"{prefix}weight")
    layer: nn.Linear | ExpandedLinear | StackedLinear
    stack = [f"{prefix}{i}." for i in range(STACK) if f"{prefix}{i}._extra_state" in state]
    if stack:
        layer = StackedLinear([ExpandedLinear.from_state(state, part) for part in stack])
    elif f"{prefix}_extra_state" in state:
        layer = ExpandedLinear.from_state(state, prefix)
    elif isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape != dense.weight.shape:
        factory: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], f"{prefix}bias" in state, **factory)
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
