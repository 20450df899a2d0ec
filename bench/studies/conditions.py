"""What a trained dense network is turned into at the split: expansions by name, and the controls beside them.

An expansion is named ``"<split or structure> <policy>"``: ``"random magnitude"`` (the paper's), ``"2:4 input"``,
``"4x16 block"``, ``"gram magnitude"``, ``"shared partition"`` (all neurons share one division of their inputs);
``"seeded input, seeded holes"`` removes the inputs that the seed says; ``"fresh random partition"`` has the masks of
``"random partition"`` and new weights.
"""

import re
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import dropout, linear

import fpe
from fpe.kernels.structures import SEEDED, TWO_FOUR
from fpe.layers import ExpandedLinear
from fpe.partition import deal

DENSE = "dense"
CONTINUED = "dense-continued"
WIDE = "wide dense"
STATIC = "static sparse"
FRESH = "fresh weights"
OVERLAPPING = "overlapping"
DROPCONNECT = "dropconnect"
SEEDED_HOLES = ", seeded holes"
"""What the name of an expansion ends with whose policy ``"input"`` takes holes of the seed."""

Pairs = list[tuple[str, str]]


def from_scratch(condition: str) -> bool:
    """Whether a condition begins with new weights and trains for all epochs."""
    return condition in (WIDE, STATIC) or condition.startswith("fresh ")


def pairs_of(model: nn.Module) -> Pairs:
    """The linear layers of a network, paired from the front as :func:`fpe.expand` pairs them."""
    names = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
    return list(zip(names[::2], names[1::2], strict=False))


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """A linear layer by name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def build(condition: str, dense: nn.Module, alpha: int, generator: Generator, pairs: Pairs) -> nn.Module:
    """The network that a condition trains on with; ``dense`` is left as it is.

    Args:
        condition: A name as above.
        dense: The trained dense network.
        alpha: Children per neuron.
        generator: Source of the masks.
        pairs: Which layers to expand, by name.

    Raises:
        ValueError: There is no such condition.
    """
    if condition in (DENSE, CONTINUED):
        return fpe.expansion.replace_modules(dense, {})
    if match := re.fullmatch(rf"{DROPCONNECT}(?: (\d+)%)?", condition):
        share = int(match.group(1)) / 100 if match.group(1) else 1 - 1 / alpha
        dropped = {first: DropConnect(linear_of(dense, first), share) for first, _ in pairs}
        return fpe.expansion.replace_modules(dense, dropped)
    if condition == WIDE:
        return reset(fpe.to_dense(expansion("random partition", dense, alpha, generator, pairs)))
    if condition.startswith("fresh "):
        masks = "random magnitude" if condition == FRESH else condition.removeprefix("fresh ")
        return reset(expansion(masks, dense, alpha, generator, pairs))
    if condition == STATIC:  # masked at random and evenly in both layers (Golubeva et al. 2021)
        return fpe.sparse(dense, alpha, "both", pairs, generator)
    if condition == OVERLAPPING:
        replaced: dict[str, nn.Module] = {}
        for first, second in pairs:
            fc1, fc2 = linear_of(dense, first), linear_of(dense, second)
            replaced[first], replaced[second] = overlapping(fc1, fc2, alpha, generator)
        return fpe.expansion.replace_modules(dense, replaced)
    return expansion(condition, dense, alpha, generator, pairs)


def expansion(name: str, dense: nn.Module, alpha: int, generator: Generator, pairs: Pairs) -> nn.Module:
    """An expansion by name.

    Raises:
        ValueError: The name is of another form, or the sizes do not admit it.
    """
    kinds = rf"random|gram|{TWO_FOUR}|{SEEDED}|shared|(\d+)x(\d+)"
    match = re.fullmatch(rf"({kinds}) (auto|magnitude|input|block|partition)", name.removesuffix(SEEDED_HOLES))
    if not match:
        raise ValueError(f"condition: expected '<structure> <policy>' or a control's name, got {name!r}")
    kind, policy = match.group(1), match.group(4)
    options: dict[str, Any] = {"resparsify": policy, "pairs": pairs, "generator": generator}
    if kind == "shared":
        divided: dict[str, nn.Module] = {}
        for first, second in pairs:
            fc1, fc2 = linear_of(dense, first), linear_of(dense, second)
            shared = deal(1, fc1.in_features, alpha, generator).repeat(fc1.out_features, 1)
            made = fpe.expand_pair(fc1, fc2, fpe.Partition(shared, alpha), policy, generator=generator)  # type: ignore[arg-type]
            divided[first], divided[second] = made
        return fpe.expansion.replace_modules(dense, divided)
    if kind == "gram":
        options["split"] = "gram"
    elif match.group(2):
        options.update(structure="block", block=(int(match.group(2)), int(match.group(3))))
    else:
        options["structure"] = kind
    if name.endswith(SEEDED_HOLES):
        options["holes"] = "seeded"
    return fpe.expand(dense, alpha, **options)


def overlapping(fc1: nn.Linear, fc2: nn.Linear, alpha: int, generator: Generator) -> tuple[nn.Module, nn.Module]:
    """As many children with as many inputs each, drawn without regard to their siblings (paper, v3's control).

    Both layers are pruned to the pair's count in one ranking, as the paper prunes FPE.
    """
    parents, inputs = fc1.weight.shape
    draws = torch.rand(alpha * parents, inputs, generator=generator).argsort(1).argsort(1)
    masks = [draws < inputs // alpha, torch.ones(fc2.out_features, alpha * parents, dtype=torch.bool)]
    weights = [fc1.weight.detach().repeat(alpha, 1), fc2.weight.detach().repeat(1, alpha)]
    size = torch.cat([(w.abs() * m).flatten() for w, m in zip(weights, masks, strict=True)])
    chosen = torch.zeros(len(size), dtype=torch.bool)
    chosen[size.topk(fc1.weight.numel() + fc2.weight.numel()).indices] = True
    kept = [part.view(m.shape) & m for part, m in zip(chosen.split([m.numel() for m in masks]), masks, strict=True)]
    biases = fc1.bias.detach().repeat(alpha), fc2.bias.detach()
    first, second = (_masked(*parts) for parts in zip(kept, weights, biases, strict=True))
    return first, second


@torch.no_grad()
def reset(model: nn.Module) -> nn.Module:
    """Draws new weights, in place; those of linear layers at the scale of the fan-in that their masks leave."""
    for module in model.modules():
        if isinstance(module, ExpandedLinear):
            module.reset_parameters(max(1, round(module.nonzeros / module.out_features)))
        elif isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)):
            module.reset_parameters()
    return model


class DropConnect(nn.Linear):
    """A linear layer that drops each weight with a probability in every training step (Wan et al. 2013)."""

    def __init__(self, layer: nn.Linear, probability: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """``y = x @ dropout(weight).T + bias``."""
        return linear(x, dropout(self.weight, self.probability, self.training), self.bias)


@torch.no_grad()
def _masked(kept: Tensor, weight: Tensor, bias: Tensor) -> fpe.MaskedLinear:
    layer = fpe.MaskedLinear(kept)
    layer.set_wide_weight(weight)
    layer.bias.copy_(bias)  # type: ignore[union-attr]
    return layer
