"""Masks that move while training goes on: drop the smallest edges, grow as many elsewhere (RigL-like).

The paper's dynamic masks regrow at random; RigL (Evci et al. 2020) regrows where the loss's gradient is largest.
Whatever is regrown, a layer keeps its number of weights and its structure:

===========================  =========================================================================================
layer                        what moves
===========================  =========================================================================================
``SplitLinear``              an edge goes to another child, or to a place that no child owns
``SplitLinear``, 2:4         two places of a group of four exchange owners, so that each child keeps its number there
``SplitLinear``, seeded      an edge goes to a place that has none; the seed says which child owns it there
``MergeLinear``              an edge reads another child
``MaskedLinear``             an edge goes anywhere
``BlockLinear``              a whole block goes anywhere; siblings whose masks are disjoint keep them disjoint
===========================  =========================================================================================
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Generator, Tensor, distributed, nn
from torch.optim import Optimizer

from fpe.kernels import Bitmap
from fpe.kernels.block.layout import tiles
from fpe.kernels.structures import SEEDED

from .layers import ExpandedLinear
from .partition import check_generator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Regrow = Literal["random", "gradient"]
REGROW: tuple[Regrow, ...] = ("random", "gradient")


class Rewiring:
    """Moves the edges of a model's FPE layers every few steps of its optimizer.

    Call :meth:`step` after ``optimizer.step()``::

        rewiring = fpe.Rewiring(wide, optimizer, every=100, fraction=0.3)
        for x, y in batches:
            optimizer.zero_grad()
            loss(wide(x), y).backward()
            optimizer.step()
            rewiring.step()

    New edges begin at exactly zero, and so does the optimizer's state for them (moments, momentum). Dropped edges
    do not come back in the same move. With ``steps`` the share that moves falls to zero along RigL's cosine.

    **Several processes.** Where ``torch.distributed`` is initialised, the processes of ``group`` move the same edges:
    gradients are summed over them, and the first one's masks are sent to all. Call :meth:`step` in each, after the same
    steps. Averages of models (EMA, SWA) are meaningless while masks move: begin them after the last move.

    Args:
        model: A model with FPE layers.
        optimizer: The optimizer that trains it; it must hold the weights of those layers.
        every: Steps between moves (RigL's default).
        fraction: Share of a layer's edges that move, at most (RigL's default).
        steps: Number of steps after which nothing moves any more, the fraction falling along a cosine; ``None`` for no
            end and a constant fraction.
        regrow: ``"random"`` (the paper's) or ``"gradient"`` (RigL's: where an edge's gradient is largest). The latter
            observes the inputs and gradients of the layers before each step that moves edges. It sums all backward
            passes since the last :meth:`step`, as gradients are accumulated for one step of the optimizer.
        generator: Source of randomness (CPU).
        group: The processes that train replicas of the model. Default: all, if ``torch.distributed`` is initialised.

    Raises:
        TypeError: ``model`` is not a module, or ``generator`` is not a ``torch.Generator``.
        ValueError: The model has no FPE layer, or one whose edges cannot move (a seed says where all of them are, or
            processes share the layer by :mod:`fpe.parallel`); the optimizer does not hold a layer's weight; ``regrow``
            is unknown; a number is out of range.

    Example:
        >>> wide = fpe.expand(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
        >>> optimizer = torch.optim.Adam(wide.parameters())
        >>> rewiring = fpe.Rewiring(wide, optimizer, every=1)
        >>> wide(torch.ones(3, 16)).sum().backward()
        >>> optimizer.step()
        >>> rewiring.step()  # whether it moved edges
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 100,
        fraction: float = 0.3,
        steps: int | None = None,
        regrow: Regrow = "random",
        generator: Generator | None = None,
        group: "ProcessGroup | None" = None,
    ) -> None:
        check_generator("Rewiring", generator)
        if not isinstance(model, nn.Module):
            raise TypeError(f"Rewiring: model must be an nn.Module, got {type(model).__name__}")
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, ExpandedLinear)}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not self.layers:
            raise ValueError(f"Rewiring: expected a model with FPE layers, got {type(model).__name__} without one")
        for name, layer in self.layers.items():
            if getattr(layer, "structure", None) == SEEDED and not isinstance(layer.bitmap, Bitmap):
                raise ValueError(
                    f"Rewiring: a seed says where the edges of '{name}' are and whose: none can move; expand with "
                    "structure='random', or with resparsify='input' or 'magnitude' and holes='magnitude', which leave "
                    "places free"
                )
            if layer.share is not None:
                raise ValueError(f"Rewiring: processes share '{name}' by tensor parallelism; shard it by FSDP2 instead")
            if id(layer.edge_weight) not in held:
                raise ValueError(f"Rewiring: the optimizer does not hold the weight of '{name}'")
        if every < 1 or not 0 < fraction < 1 or (steps is not None and steps < 1):
            raise ValueError(
                "Rewiring: expected every >= 1, 0 < fraction < 1 and steps >= 1 or None, got "
                f"{every}, {fraction}, {steps}"
            )
        if regrow not in REGROW:
            raise ValueError(f"Rewiring: regrow must be one of {REGROW}, got {regrow!r}")
        self.optimizer = optimizer
        self.every, self.fraction, self.steps, self.regrow = every, fraction, steps, regrow
        self.generator, self.group = generator, group
        self.taken = 0
        self._gradients: dict[str, Tensor] = {}
        if regrow == "gradient":
            for name, layer in self.layers.items():
                layer.register_forward_hook(_Watch(self, name))

    @property
    def due(self) -> bool:
        """Whether the next :meth:`step` moves edges."""
        return (self.taken + 1) % self.every == 0 and (self.steps is None or self.taken + 1 < self.steps)

    @torch.no_grad()
    def step(self) -> bool:
        """Counts a step of the optimizer and moves edges if it is time; returns whether it was time.

        Raises:
            RuntimeError: Edges are to move by gradient, and a layer has seen no backward pass since the last call.
        """
        due = self.due
        self.taken += 1
        if due:
            share = self.fraction
            if self.steps is not None:
                share *= (1 + math.cos(math.pi * self.taken / self.steps)) / 2
            for name, layer in self.layers.items():
                kept = self._agreed(self._moved(name, layer, share))
                layer.rewire(kept, *self._followers(layer.edge_weight))
        self._gradients.clear()
        return due

    def state_dict(self) -> dict[str, Any]:
        """Returns what is needed to resume, besides the states of the model and the optimizer."""
        return {"taken": self.taken, "generator": self.generator and self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a :meth:`state_dict` was taken."""
        self.taken = state["taken"]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

    def _moved(self, name: str, layer: ExpandedLinear, share: float) -> Tensor:
        """The layer's new mask."""
        size, kept = layer.wide_weight().abs(), layer.kept()
        if self.regrow == "gradient":
            if name not in self._gradients:
                raise RuntimeError(
                    f"Rewiring: regrow='gradient' needs a forward and a backward pass before step() moves edges, and "
                    f"'{name}' has seen none since the last step()"
                )
            growth = self._gradients[name]
            if self._replicated:
                distributed.all_reduce(growth, group=self.group)
            growth = growth.abs()
        else:
            growth = torch.rand(kept.shape, generator=self.generator, device="cpu").to(kept.device)
        return next_mask(layer, size, kept, growth, share)

    def _followers(self, weight: nn.Parameter) -> list[Tensor]:
        """The tensors that belong to a weight, entry by entry."""
        state = self.optimizer.state.get(weight, {}).values()
        found = [t for t in state if isinstance(t, Tensor) and t.shape == weight.shape]
        return found if weight.grad is None else [*found, weight.grad]

    @property
    def _replicated(self) -> bool:
        return distributed.is_available() and distributed.is_initialized()

    def _agreed(self, kept: Tensor) -> Tensor:
        """The mask of the first process of the group."""
        if not self._replicated:
            return kept
        sent = kept.to(torch.uint8)
        distributed.broadcast(sent, group=self.group, group_src=0)
        return sent.bool()

    def _collect(self, name: str, x: Tensor, dy: Tensor) -> None:
        """Adds a backward pass's gradient of a layer's whole wide weight."""
        gradient = dy.detach().flatten(0, -2).mT.float() @ x.flatten(0, -2).float()
        self._gradients[name] = self._gradients.get(name, 0) + gradient


class _Watch:
    """A forward hook that collects the gradient of a layer's wide weight when a move is due.

    It belongs to one layer of one model: in a copy of the model, or in a file, it does nothing.
    """

    def __init__(self, rewiring: Rewiring | None = None, name: str = "") -> None:
        self.rewiring, self.name = rewiring, name

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Runs after the layer's forward."""
        rewiring = self.rewiring
        if rewiring is not None and rewiring.due and output.requires_grad:
            output.register_hook(partial(rewiring._collect, self.name, inputs[0].detach()))

    def __reduce__(self) -> tuple[type["_Watch"], tuple[()]]:
        """Makes a copy a hook that belongs to no rewiring."""
        return _Watch, ()


def next_mask(layer: ExpandedLinear, size: Tensor, kept: Tensor, growth: Tensor, share: float) -> Tensor:
    """A mask after one move, of the structure that a layer has; bool ``[out_features, in_features]``.

    Args:
        layer: Whose structure; its own weights and mask are not looked at.
        size: Magnitudes ``[out_features, in_features]``.
        kept: The mask so far.
        growth: How much each place deserves an edge.
        share: Share of the edges that move, at most.
    """
    allowed = layer.may_hold()
    places = torch.ones_like(kept) if allowed is None else allowed
    size, kept, growth, places = (_to_planes(t, layer.planes) for t in (size, kept, growth, places))
    if layer.exchanges:
        now = exchanged(size, kept, growth, share)
    else:  # if the layer says which places are allowed, those of siblings are disjoint
        siblings_disjoint = allowed is None and len(kept) > 1 and bool((kept.sum(0) <= 1).all())
        now = moved(size, kept, growth, share, layer.unit, siblings_disjoint, places)
    return _from_planes(now, layer.planes)


def moved(
    size: Tensor,
    kept: Tensor,
    growth: Tensor,
    share: float,
    unit: tuple[int, int],
    siblings_disjoint: bool,
    places: Tensor,
) -> Tensor:
    """A mask with a share of its units elsewhere: the smallest are dropped, those of largest growth come.

    Only whole units move; one that is ragged or kept in part stays. A unit that was dropped is not regrown.

    Args:
        size: Magnitudes ``[P, N, K]``, a plane for each child.
        kept: bool ``[P, N, K]``.
        growth: How much each place deserves an edge, ``[P, N, K]``.
        share: Share of the kept units that move, at most; fewer move where there is not enough room.
        unit: ``(bn, bk)`` of what moves together.
        siblings_disjoint: Whether a position is kept in one plane at most, and must be so afterwards.
        places: Where an edge may be, bool ``[P, N, K]``.
    """
    area = unit[0] * unit[1]
    count_kept, count_real, size, growth = (
        torch.stack([tiles(plane, unit).flatten(2).sum(-1) for plane in t]) for t in (kept, places, size, growth)
    )
    whole = count_kept == area
    free = (count_kept == 0) & (count_real == area)
    budget = int(share * int(whole.sum()))
    dropped = _top(-size, whole, budget if siblings_disjoint else min(budget, int(free.sum())))
    if siblings_disjoint:
        unowned = ((count_kept == 0) | dropped).all(0)
        best, plane = growth.masked_fill(~free, -torch.inf).max(0)
        cells = _top(best, unowned & free.any(0), int(dropped.sum()))
        grown = torch.zeros_like(dropped).scatter_(0, plane[None], cells[None])
    else:
        grown = _top(growth, free, int(dropped.sum()))
    now = kept
    for change, value in ((dropped, False), (grown, True)):
        spread = change.repeat_interleave(unit[0], 1).repeat_interleave(unit[1], 2)
        now = now.masked_fill(spread[:, : kept.shape[1], : kept.shape[2]], value)
    return now


def exchanged(size: Tensor, kept: Tensor, growth: Tensor, share: float) -> Tensor:
    """A 2:4 mask in which some groups of four have exchanged the owners of two places.

    In a group its smallest edge changes places with the place of another owner (or of none) that grows best;
    groups with the smallest such edges come first. Each child keeps its number of edges in every group.

    Args:
        size: Magnitudes ``[P, N, K]``.
        kept: bool ``[P, N, K]``, a place owned by one plane at most.
        growth: How much each place deserves an edge, ``[P, N, K]``.
        share: Share of the edges that are dropped, at most.
    """
    size, mask, growth = (t.unflatten(-1, (-1, 4)).flatten(1, 2) for t in (size, kept, growth))  # [P, groups, 4]
    owned = mask.any(0)
    smallest = torch.where(owned, size.sum(0), torch.inf).argmin(-1)  # [groups]
    at = smallest[None, :, None].expand(len(mask), -1, 1)
    child = mask.gather(-1, at)  # [P, groups, 1]
    other = ~(mask & child).any(0)  # places that the child does not own
    # An exchange gives this child the other place, and the owner of that place this one.
    gain = (growth * child).sum(0) + (growth.gather(-1, at) * mask).sum(0)
    partner = gain.masked_fill(~other, -torch.inf).argmax(-1)
    possible = owned.any(-1) & other.any(-1)
    cost = 1 + owned.gather(-1, partner[:, None]).squeeze(-1).long()
    loss = torch.where(owned, size.sum(0), torch.inf).amin(-1).masked_fill(~possible, torch.inf)
    ranking = loss.argsort(stable=True)
    chosen = torch.zeros_like(possible)
    chosen[ranking] = cost[ranking].cumsum(0) <= int(share * int(mask.sum()))
    chosen &= possible
    order = torch.arange(4, device=mask.device).repeat(len(possible), 1)
    swapped = order.scatter(1, smallest[:, None], partner[:, None]).scatter(1, partner[:, None], smallest[:, None])
    order = torch.where(chosen[:, None], swapped, order)
    return mask.gather(-1, order.expand_as(mask)).view_as(kept)


def _top(score: Tensor, among: Tensor, count: int) -> Tensor:
    """Marks the ``count`` places of largest score among some."""
    chosen = torch.zeros_like(among)
    best = score.double().masked_fill(~among, -torch.inf).flatten().topk(count).indices
    chosen.view(-1)[best] = True
    return chosen


def _to_planes(wide: Tensor, planes: tuple[int, int]) -> Tensor:
    """``[P0 * N, P1 * K]`` to ``[P0 * P1, N, K]``."""
    p, q = planes
    return wide.unflatten(1, (q, -1)).unflatten(0, (p, -1)).transpose(1, 2).flatten(0, 1)


def _from_planes(parts: Tensor, planes: tuple[int, int]) -> Tensor:
    return parts.unflatten(0, planes).transpose(1, 2).flatten(2).flatten(0, 1)
