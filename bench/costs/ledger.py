"""What an expansion changes in a model's books: weights by layer, and bytes over the parent's."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

import fpe
from fpe.expansion import PaddingWarning
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED, TWO_FOUR
from fpe.layers import ExpandedLinear
from fpe.resparsify import choose

from ..table import Table
from . import memory


def layer_ledger(model: nn.Module) -> list[dict[str, Any]]:
    """One row for each linear layer: size, weights kept, parameters stored, biases."""
    rows = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, ExpandedLinear)):
            continue
        bias = 0 if module.bias is None else module.bias.numel()
        rows.append(
            {
                "layer": name,
                "kind": type(module).__name__,
                "out": module.out_features,
                "in": module.in_features,
                "nonzeros": module.weight.numel() if isinstance(module, nn.Linear) else module.nonzeros,
                "stored": sum(p.numel() for p in module.parameters()) - bias,
                "biases": bias,
            }
        )
    return rows


PAIRS = ((512, 32, 100), (784, 32, 10), (512, 1792, 512))
"""Inputs, neurons and outputs: a classifier of features, the README's model, a square pair."""
BLOCKED = (16, 64)


@dataclass(frozen=True)
class Kept:
    """How a pair is expanded, in 16 bits and without biases.

    Attributes:
        sizes: ``(d, h, c)``.
        alpha: Children.
        structure: As in :func:`fpe.expand`.
        policy: Likewise.
        holes: Likewise.
    """

    sizes: tuple[int, int, int]
    alpha: int
    structure: str
    policy: str
    holes: str = "magnitude"

    @property
    def name(self) -> str:
        """Masks and policy."""
        masks = "x".join(map(str, BLOCKED)) if self.structure == BLOCK else self.structure
        return f"{masks} {self.policy}{', seeded holes' * (self.holes == 'seeded')}"

    def parent(self) -> nn.Sequential:
        """The pair before its expansion, its weights those of one seed."""
        d, h, c = self.sizes
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(d, h, bias=False), nn.Linear(h, c, bias=False)).bfloat16()

    def expanded(self) -> nn.Sequential:
        """The pair."""
        block = {"block": BLOCKED} if BLOCK in (self.structure, self.policy) else {}
        how: dict[str, Any] = {"structure": self.structure, "resparsify": self.policy, "holes": self.holes, **block}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PaddingWarning)  # what padding costs is what is asked
            return fpe.expand(self.parent(), self.alpha, generator=torch.Generator().manual_seed(0), **how)


def kept_pairs() -> Iterator[Kept]:
    """Every pair with two and four children, by each policy that can remove enough weights and each structure."""
    structures = (RANDOM, SEEDED, TWO_FOUR, BLOCK)
    for sizes, alpha, structure, policy in product(PAIRS, (2, 4), structures, fpe.resparsify.POLICIES):
        affordable = policy != "input" or choose(sizes[2], sizes[0], alpha) == policy
        if affordable and (structure != TWO_FOUR or alpha == 2):
            yield Kept(sizes, alpha, structure, policy)
        if affordable and (structure, policy) == (SEEDED, "input"):
            yield Kept(sizes, alpha, structure, policy, "seeded")


def over_parent(kept: Kept) -> dict[str, float]:
    """What a pair stores, over its parent: weights; weights and index; those with gradients and Adam's two moments.

    Moments have 16 bits, as the weights and the gradients do, or 32: twice as many bytes.
    """
    parent, wide = (memory.columns(model) for model in (kept.parent(), kept.expanded()))
    training = ("parameter_bytes", "index_bytes", "gradient_bytes", "optimizer_bytes")
    parts = {
        "weights": ("parameter_bytes",),
        "weights and index": ("parameter_bytes", "index_bytes"),
        "training": training,
        "training, float32 moments": (*training, "optimizer_bytes"),
    }
    return {part: sum(wide[n] for n in names) / sum(parent[n] for n in names) for part, names in parts.items()}


@cache
def storage_rows() -> tuple[tuple[Kept, dict[str, float]], ...]:
    """:func:`over_parent` of every pair."""
    return tuple((kept, over_parent(kept)) for kept in kept_pairs())


def storage() -> Table:
    """Bytes of pairs over their parents', for every policy and structure."""
    rows = [
        ("-".join(map(str, kept.sizes)), f"{kept.alpha}", kept.name, *(f"{share:.3f}" for share in shares.values()))
        for kept, shares in storage_rows()
    ]
    columns = (
        *("d-h-c", "alpha", "masks and policy", "weights", "weights and index"),
        *("in training with Adam", "its moments in float32"),
    )
    return Table("Bytes of a pair of layers over its parent's, bfloat16", columns, rows)
