"""Which weights are removed because the output matrix is wider: the policies that keep the non-zero count.

Splitting ``W1[h, d]`` moves no weight, but its successor ``W2[c, h]`` is copied to ``alpha`` children per input
and so has ``(alpha - 1) * c * h`` more weights than before (paper, section 2.3). A policy removes exactly as many.

Rankings are by magnitude, smallest first. Siblings' output weights tie at the moment of the split: ties are
broken by an order drawn from the generator, so the same seed prunes the same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from fpe.kernels import HOLE
from fpe.kernels.block.layout import grid
from fpe.kernels.partition.seeded import beside

from .partition import Partition, deal

Policy = Literal["magnitude", "input", "block", "partition"]
POLICIES: tuple[Policy, ...] = ("magnitude", "input", "block", "partition")
Holes = Literal["magnitude", "seeded"]
HOLES: tuple[Holes, ...] = ("magnitude", "seeded")


GROUPS = 2
"""At least so many groups of ``alpha`` neurons must there be for a seed to divide them well: docs/studies.md."""
AFFORDABLE = 0.8
"""Largest share of its weights that ``"auto"`` lets the expanded layer lose alone; measured in docs/studies.md."""
ALIKE = 0.8
"""Smaller over larger, of outputs and inputs, from which on ``"auto"`` takes them for about as many."""


def choose(outputs: int, inputs: int, alpha: int, blocks: bool = False) -> Policy:
    """The policy that ``"auto"`` takes for a pair of layers: what gained most where it was measured (docs/studies.md).

    ``"input"`` if the expanded layer can lose enough weights alone, as in a classifier of few classes. Otherwise
    ``"partition"`` if the successor has about as many outputs as the layer has inputs, as inside a network. Otherwise
    one ranking over both layers, as in a classifier of many classes, or with many children.

    Args:
        outputs: Outputs ``c`` of the successor.
        inputs: Inputs ``d`` of the expanded layer.
        alpha: Children per neuron.
        blocks: Whether masks are whole blocks. Then the ranking is that of blocks, ``"block"``, otherwise that of
            single weights, ``"magnitude"``.
    """
    if (alpha - 1) * outputs <= AFFORDABLE * inputs:
        return "input"
    if min(outputs, inputs) >= ALIKE * max(outputs, inputs):
        return "partition"
    return "block" if blocks else "magnitude"


@dataclass(frozen=True, eq=False)
class Plan:
    """What a policy decided for a pair of layers.

    Attributes:
        firsts: The partition of each expanded layer, with ``HOLE`` where an edge was pruned.
        second: bool ``[c, alpha, h]``: which copies of the successor's weights are kept. ``second[j, a, n]`` is
            the edge to output ``j`` from child ``a`` of parent ``n``.
    """

    firsts: tuple[Partition, ...]
    second: Tensor

    @property
    def first(self) -> Partition:
        """The partition of the only expanded layer."""
        (partition,) = self.firsts
        return partition

    @property
    def nonzeros(self) -> int:
        """Weights kept in all layers."""
        return sum(int((partition.labels != HOLE).sum()) for partition in self.firsts) + int(self.second.sum())


def plan(
    w1: Tensor | Sequence[Tensor],
    w2: Tensor,
    partition: Partition,
    policy: Policy,
    *,
    block: tuple[int, int] | None = None,
    holes: Holes = "magnitude",
    generator: Generator | None = None,
) -> Plan:
    """Chooses the weights that remain, as many as the dense pair had.

    ======================  ====================================================================================
    policy                  what is removed
    ======================  ====================================================================================
    ``"magnitude"``         the smallest of both layers in one ranking (the paper's)
    ``"input"``             only the expanded layer loses weights and the output stays dense: the smallest ones, in
                            whole tiles or quads where the structure has them, by mean magnitude
    ``"block"``             the smallest tiles of both layers in one ranking by mean magnitude
    ``"partition"``         every output edge stays at exactly one child, dealt at random, in whole tiles where
                            the structure is ``"block"``, and by the next seed where it is ``"seeded"``
    ======================  ====================================================================================

    Where the excess is no multiple of what is removed whole, the last unit in the ranking loses only its
    smallest weights, so that the count is exact.

    Args:
        w1: Weight of the expanded layer ``[h, d]``; or those of a gated triple's two, which share the partition.
        w2: Weight of its successor ``[c, h]``.
        partition: Who owns the edges of ``w1``.
        policy: One of the above.
        block: Tile ``(bn, bk)`` of policy ``"block"`` and of the successor under structure ``"block"``.
        holes: For policy ``"input"`` with a seeded partition: what chooses the weights that are removed. With
            ``"seeded"`` the seed does, and removes as many of every neuron, so that no places need to be stored.
        generator: Source of randomness (CPU).

    Raises:
        ValueError: The policy is unknown, or cannot remove as many weights as it must; policy ``"block"`` has no
            ``block``; or ``holes="seeded"`` is given with another policy or a partition that is not seeded.
    """
    if holes not in HOLES or (holes == "seeded" and (policy != "input" or partition.seed is None)):
        raise ValueError(
            f"holes must be one of {HOLES}, and 'seeded' needs structure 'seeded' with resparsify='input', got "
            f"{holes!r} with {partition.structure!r} and {policy!r}"
        )
    if policy not in POLICIES:
        raise ValueError(f"resparsify must be one of {POLICIES}, got {policy!r}")
    firsts = [w1] if isinstance(w1, Tensor) else list(w1)
    (c, h), alpha = w2.shape, partition.alpha
    block = block or partition.block_shape
    if policy == "partition":
        return Plan((partition,) * len(firsts), _one_child_each(c, h, partition, generator))
    if policy == "block" and block is None:
        raise ValueError("resparsify='block' needs block=(bn, bk), got None")

    excess = (alpha - 1) * c * h
    size = sum(w.numel() for w in firsts)
    limit = size if policy == "input" else size + alpha * w2.numel()
    if excess >= limit:
        raise ValueError(
            f"resparsify={policy!r} must remove (alpha-1)*c*h = {excess} weights and has {limit} to choose from; take "
            "'magnitude', 'partition' or a smaller alpha"
        )
    if holes == "seeded":
        every = torch.ones(c, alpha, h, dtype=torch.bool, device=partition.labels.device)
        return Plan(_seeded_holes(partition, len(firsts), (alpha - 1) * c), every)
    first = [w.detach().abs().double().cpu() for w in firsts]
    if policy == "input":
        kept = _keep(first, [partition.unit] * len(first), excess, generator)
        second_kept = torch.ones(c, alpha, h, dtype=torch.bool)
    else:
        unit = block if policy == "block" else (1, 1)
        assert unit is not None
        second = w2.detach().abs().double().cpu()[:, None].expand(c, alpha, h)
        planes = [second[:, a] for a in range(alpha)]
        kept = _keep([*first, *planes], [unit] * (len(first) + alpha), excess, generator)
        second_kept = torch.stack(kept[len(first) :], dim=1)
    device = partition.labels.device
    pruned = tuple(partition.without(~own.to(device)) for own in kept[: len(first)])
    return Plan(pruned, second_kept.to(device))


def _seeded_holes(partition: Partition, layers: int, excess: int) -> tuple[Partition, ...]:
    """Returns each layer's partition after all of its neurons lost as many inputs; together ``excess`` a neuron."""
    assert partition.seed is not None
    h, d = partition.shape
    lost = [excess // layers + (layer < excess % layers) for layer in range(layers)]
    made = (Partition.seeded(h, d, partition.alpha, partition.seed, d - share) for share in lost)
    return tuple(one.to(partition.labels.device) for one in made)


def _keep(
    magnitudes: list[Tensor], units: list[tuple[int, int]], excess: int, generator: Generator | None
) -> list[Tensor]:
    """Removes ``excess`` weights from the matrices, whole units at a time, smallest mean magnitude first.

    Returns the bool masks of what is kept. At most one unit is removed in part: the first that does not fit
    into what is left to remove loses its smallest weights.
    """
    weights = torch.cat([m.flatten() for m in magnitudes])
    if all(unit == (1, 1) for unit in units):
        removed = _smallest(weights, excess, generator)
    else:
        ids, count = _number_units([m.shape for m in magnitudes], units)
        size = torch.bincount(ids, minlength=count)
        score = torch.bincount(ids, weights, minlength=count) / size
        shuffled = torch.randperm(count, generator=generator)
        ranking = shuffled[score[shuffled].argsort(stable=True)]
        after = size[ranking].cumsum(0)  # weights that are gone when a unit and all before it are removed
        whole = after <= excess
        gone = torch.zeros(count, dtype=torch.bool)
        gone[ranking[whole]] = True
        removed = gone[ids]
        rest = excess - int(removed.sum())
        if rest:
            last = (ids == ranking[~whole][0]).nonzero().squeeze(1)
            removed[last[_smallest(weights[last], rest, generator)]] = True
    parts = (~removed).split([m.numel() for m in magnitudes])
    return [part.view(m.shape) for part, m in zip(parts, magnitudes, strict=True)]


def _smallest(values: Tensor, count: int, generator: Generator | None) -> Tensor:
    """Marks exactly ``count`` smallest values of a vector; the generator decides between equal ones."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(count).values
    chosen = values < threshold
    ties = (values == threshold).nonzero().squeeze(1)
    drawn = torch.randperm(len(ties), generator=generator)[: count - int(chosen.sum())]
    chosen[ties[drawn]] = True
    return chosen


def _number_units(shapes: list[torch.Size], units: list[tuple[int, int]]) -> tuple[Tensor, int]:
    """Numbers the tiles of all matrices: each weight's unit, flattened, and how many units there are."""
    ids, count = [], 0
    for shape, unit in zip(shapes, units, strict=True):
        rows, columns = (torch.arange(n) // size for n, size in zip(shape, unit, strict=True))
        down, across = grid((shape[0], shape[1]), unit)
        ids.append((rows[:, None] * across + columns + count).flatten())
        count += down * across
    return torch.cat(ids), count


def successor_of_seed(c: int, h: int, partition: Partition) -> Partition:
    """Which child of each of ``h`` neurons has the neuron's edge to each of ``c`` outputs, by the next seed.

    A seed can deal a group of ``alpha`` neurons to the children in only ``alpha`` ways. If there are fewer than
    :data:`GROUPS` groups, it deals the outputs of each neuron instead (``turned``).
    """
    assert partition.seed is not None
    alpha = partition.alpha
    return Partition.seeded(c, h, alpha, beside(partition.seed), turned=h < GROUPS * alpha)


def _one_child_each(c: int, h: int, partition: Partition, generator: Generator | None) -> Tensor:
    """Deals each parent's output edges to its children equally, or by the next seed: bool ``[c, alpha, h]``."""
    device = partition.labels.device
    if partition.seed is not None:
        return successor_of_seed(c, h, partition).to(device).masks().transpose(0, 1)
    bn, bk = partition.block_shape or (1, 1)
    down, across = grid((c, h), (bn, bk))
    owner = deal(across, down, partition.alpha, generator).T
    owner = owner.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:c, :h]
    second = Partition(owner.to(device), partition.alpha)
    return second.masks().transpose(0, 1)
