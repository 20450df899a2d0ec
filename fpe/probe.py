"""One forward pass that finds whether a model stays what it is when a pair of its layers is widened."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .groups import Group, as_linear
from .surgery import replace_modules


def check_pairs(
    model: nn.Module, groups: Mapping[Group, Mapping[str, nn.Module]], alpha: int, example_inputs: Any
) -> None:
    """Raises unless what the model computes between the layers of each pair treats every neuron alike and on its own.

    Every neuron of a first layer is copied ``alpha`` times, whole, and its second layer reads the mean of the copies.
    Where nothing but element-wise operations (and norms that were widened) lie between, that is the same function. It
    is compared with the model's own, in eval mode, with all pairs at once; if they differ, pair by pair for the name.

    Args:
        model: The dense model; it is not changed.
        groups: For each group of layers, what else is replaced with it: widened norms.
        alpha: Copies.
        example_inputs: A tuple of positional arguments of a forward, a mapping of keyword ones, or a single argument.

    Raises:
        ValueError: The layers of a pair do not run in their order, the widened model fails, or it computes something
            else.
    """
    plain = copy.deepcopy(model).eval()
    calls: list[str] = []
    for name in {name for group in groups for name in group.names}:
        plain.get_submodule(name).register_forward_hook(partial(_note, calls, name))
    wanted = run(plain, example_inputs)
    for group in groups:
        for name in group.names:
            if name not in calls:
                raise ValueError(f"expand: '{name}' does not run on example_inputs")
        for first in group.firsts:
            if calls.index(group.second) < calls.index(first):
                raise ValueError(
                    f"expand: '{group.second}' runs before '{first}' on example_inputs; name the pair in that order"
                )
    if _why_not(model, groups, alpha, example_inputs, wanted):
        for group, besides in groups.items():
            reason = _why_not(model, {group: besides}, alpha, example_inputs, wanted)
            if reason:
                raise ValueError(
                    f"expand: between '{group.firsts[0]}' and '{group.second}' the model does not treat every neuron "
                    f"alike and on its own; with each neuron copied it {reason}"
                )
        raise ValueError("expand: the pairs cannot be widened together: the model would compute something else")


def _note(calls: list[str], name: str, *hooked: object) -> None:
    calls.append(name)


def _why_not(
    model: nn.Module,
    groups: Mapping[Group, Mapping[str, nn.Module]],
    alpha: int,
    inputs: Any,
    wanted: list[Tensor],
) -> str | None:
    """Returns what goes wrong with copied neurons, or ``None`` if nothing does."""
    replaced: dict[str, nn.Module] = {}
    for group, besides in groups.items():
        replaced.update(besides)
        for first in group.firsts:
            replaced[first] = _copied(as_linear(model.get_submodule(first)), alpha, group.parts)
        replaced[group.second] = _averaging(as_linear(model.get_submodule(group.second)), alpha)
    try:
        got = run(replace_modules(model, replaced).eval(), inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return f"fails: {error}"
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return f"gives {[list(t.shape) for t in got]} instead of {[list(t.shape) for t in wanted]}"
    for ours, theirs in zip(got, wanted, strict=True):
        if ours.is_meta or not theirs.is_floating_point():
            continue
        off, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
        if not bool(off <= torch.finfo(theirs.dtype).eps ** 0.5 * size):
            return f"computes something else (off by {float(off / size):.2g} of the output)"
    return None


def _copied(dense: nn.Linear, alpha: int, parts: int) -> nn.Linear:
    """The layer with every neuron ``alpha`` times, each of its parts on its own."""
    bias = dense.bias
    return _linear(_repeat(dense.weight, alpha, parts), None if bias is None else _repeat(bias, alpha, parts))


def _repeat(t: Tensor, alpha: int, parts: int) -> Tensor:
    return torch.cat([torch.cat([part] * alpha) for part in t.detach().chunk(parts)])


def _averaging(dense: nn.Linear, alpha: int) -> nn.Linear:
    """The layer reading the mean of ``alpha`` copies."""
    return _linear(dense.weight.detach().repeat(1, alpha) / alpha, None if dense.bias is None else dense.bias.detach())


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that a forward returns. Random generators begin from a fixed state and are restored afterwards.

    Args:
        model: Any module.
        inputs: A tuple of positional arguments, a mapping of keyword arguments, or a single argument.
    """
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
