"""One forward pass that finds whether a model stays what it is when a pair of its layers is widened."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .surgery import replace_modules

Pair = tuple[str, str]


def check_pairs(
    model: nn.Module, pairs: Mapping[Pair, Mapping[str, nn.Module]], alpha: int, example_inputs: Any
) -> None:
    """Raises unless what the model computes between the layers of each pair treats every neuron alike and on its own.

    Every neuron of a first layer is copied ``alpha`` times, whole, and its second layer reads the mean of the copies.
    Where nothing but element-wise operations (and norms that were widened) lie between, that is the same function. It
    is compared with the model's own, in eval mode, with all pairs at once; if they differ, pair by pair for the name.

    Args:
        model: The dense model; left as it is.
        pairs: For each pair, what else is replaced with it: widened norms.
        alpha: Copies.
        example_inputs: Positional arguments of a forward, or a single one.

    Raises:
        ValueError: The layers of a pair do not run in their order, the widened model fails, or it computes something
            else.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    plain = copy.deepcopy(model).eval()
    calls: list[str] = []
    for name in {name for pair in pairs for name in pair}:
        plain.get_submodule(name).register_forward_hook(partial(_note, calls, name))
    wanted = _run(plain, inputs)
    for first, second in pairs:
        for name in (first, second):
            if name not in calls:
                raise ValueError(f"expand: '{name}' does not run on example_inputs")
        if calls.index(second) < calls.index(first):
            raise ValueError(f"expand: '{second}' runs before '{first}' on example_inputs; name the pair in that order")
    if _why_not(model, pairs, alpha, inputs, wanted):
        for (first, second), besides in pairs.items():
            reason = _why_not(model, {(first, second): besides}, alpha, inputs, wanted)
            if reason:
                raise ValueError(
                    f"expand: between '{first}' and '{second}' the model does not treat every neuron alike and on its "
                    f"own; with each neuron copied it {reason}"
                )
        raise ValueError("expand: the pairs cannot be widened together: the model computes something else then")


def _note(calls: list[str], name: str, *hooked: object) -> None:
    calls.append(name)


def _why_not(
    model: nn.Module,
    pairs: Mapping[Pair, Mapping[str, nn.Module]],
    alpha: int,
    inputs: Sequence[Any],
    wanted: list[Tensor],
) -> str | None:
    """What goes wrong with copied neurons, in words; ``None`` where nothing does."""
    replaced: dict[str, nn.Module] = {}
    for (first, second), besides in pairs.items():
        replaced.update(besides)
        for name, side in ((first, 0), (second, 1)):
            dense = model.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            replaced[name] = _copied(dense, alpha, side)
    try:
        got = _run(replace_modules(model, replaced).eval(), inputs)
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


def _copied(dense: nn.Linear, alpha: int, side: int) -> nn.Linear:
    """The layer with every neuron ``alpha`` times (side 0), or reading the mean of as many copies (side 1)."""
    weight = dense.weight.detach()
    wide = weight.repeat(1, alpha) / alpha if side else weight.repeat(alpha, 1)
    layer = nn.Linear(wide.shape[1], wide.shape[0], dense.bias is not None, device="meta")
    layer.weight = nn.Parameter(wide, requires_grad=False)
    if dense.bias is not None:
        bias = dense.bias.detach()
        layer.bias = nn.Parameter(bias.clone() if side else bias.repeat(alpha), requires_grad=False)
    return layer


def _run(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """The tensors that a forward returns, from a fixed state of the random generators."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
