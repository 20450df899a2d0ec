"""A wider sparse model at a dense one's number of weights, for training from the start."""

from collections.abc import Iterable
from typing import Literal, TypeVar

import torch
from torch import Generator, nn

from .checkpoint import guard_state_dict
from .expansion import found_groups, like
from .groups import Pair, dense_layers, errors_name, named_groups
from .layers import MaskedLinear
from .partition import check_generator
from .surgery import replace_modules, widened_between

Model = TypeVar("Model", bound=nn.Module)


def sparse(
    model: Model,
    width: int = 2,
    masked: Literal["first", "both"] = "first",
    pairs: Iterable[Pair] | None = None,
    generator: Generator | None = None,
) -> Model:
    """Makes a wider sparse model with the same number of non-zeros, to be trained from the start.

    Each pair of linear layers gets ``width`` times the hidden neurons, random masks, and new weights whose scale
    follows from the number of inputs that a neuron keeps. Train it with :class:`fpe.Rewiring`: ``regrow="gradient"``
    is RigL and ``"random"`` is SET. With fixed masks it gains less (docs/when.md). The old weights of these layers are
    not used; to widen a trained model, use :func:`expand`.

    Args:
        model: A dense model; it is not changed.
        width: How many times as many hidden neurons, at least 2.
        masked: ``"first"``: the second layer of a pair stays a dense ``nn.Linear``, and the first gets the weights
            that are left. ``"both"``: both keep the same share of their weights.
        pairs: As in :func:`expand`, but no gated triples.
        generator: Source of the masks (CPU). New weights are drawn from PyTorch's own generator, as an ``nn.Linear``
            draws them.

    Raises:
        TypeError: ``model`` is not a module, or a named layer is not an ``nn.Linear``.
        ValueError: An option is out of range, a layer cannot be replaced, a gated triple is named or found, or with
            ``masked="first"`` the dense second layer takes all of the pair's weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> wide = fpe.sparse(model, width=2)
        >>> wide[0].out_features, fpe.nonzeros(wide)
        (16, 160)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparse: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(width, int) or width < 2 or masked not in ("first", "both"):
        raise ValueError(
            f"sparse: expected a whole width >= 2 and masked 'first' or 'both', got {width!r} and {masked!r}"
        )
    check_generator("sparse", generator)
    replaced: dict[str, nn.Module] = {}
    for group in found_groups("sparse", model) if pairs is None else named_groups(model, pairs):
        firsts, fc2 = dense_layers(model, group)
        if len(firsts) > 1:
            raise ValueError(f"sparse: expected pairs of two layers, got the gated triple {group.names}")
        (first,) = group.firsts
        with errors_name("sparse", group):
            replaced[first], replaced[group.second] = _sparse_pair(firsts[0], fc2, width, masked, generator)
        replaced.update(widened_between(model, first, group.second, width, group.between))
    return guard_state_dict(replace_modules(model, replaced))


def _sparse_pair(
    fc1: nn.Linear, fc2: nn.Linear, width: int, masked: str, generator: Generator | None
) -> tuple[nn.Module, nn.Module]:
    """Returns a wide pair with a dense pair's number of weights, newly drawn."""
    hidden = width * fc1.out_features
    sizes = hidden * fc1.in_features, fc2.out_features * hidden
    budget = fc1.weight.numel() + fc2.weight.numel()
    count = budget - sizes[1] if masked == "first" else round(budget * sizes[0] / sum(sizes))
    if count < 1:
        raise ValueError(
            f"a dense second layer of {fc2.out_features} x {hidden} takes {sizes[1]} of the pair's {budget} "
            "weights and leaves the first none; take masked='both' or a smaller width"
        )

    def layer(old: nn.Linear, inputs: int, outputs: int, kept: int) -> nn.Module:
        if kept == inputs * outputs:
            return nn.Linear(inputs, outputs, old.bias is not None, **like(old))
        mask = torch.zeros(inputs * outputs, dtype=torch.bool, device="cpu")
        mask[torch.randperm(len(mask), generator=generator, device="cpu")[:kept]] = True
        made = MaskedLinear(mask.view(outputs, inputs), old.bias is not None, **like(old))
        made.reset_parameters(max(1, round(kept / outputs)))
        return made

    first = layer(fc1, fc1.in_features, hidden, count)
    return first.train(fc1.training), layer(fc2, hidden, fc2.out_features, budget - count).train(fc2.training)
