"""Moving masks, by invariants: counts and structure stay, new edges begin at zero, nothing moves off schedule."""

import io
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from support import (
    MOVING,
    BadCall,
    Recipe,
    assert_unchanged,
    each_moving,
    expanded_layers,
    mlp,
    readable_id,
    seeded,
    snapshot,
)
from torch import Tensor, nn

import fpe
from fpe import BlockLinear, MaskedLinear, Partition, Rewiring, SplitLinear
from fpe.kernels.block.layout import tiles
from fpe.layers import ExpandedLinear
from fpe.layers.grid import PlaneGrid
from fpe.rewiring import exchanged, moved

SIZES = (32, 13, 6)
each_regrow = pytest.mark.parametrize("regrow", ["random", "gradient"])


class Run:
    """An expanded model, its optimizer with some steps behind it, and a batch."""

    def __init__(self, recipe: Recipe, **options: object) -> None:
        self.model = recipe.expand(mlp(*SIZES))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.rewiring = Rewiring(self.model, self.optimizer, generator=seeded(), **options)  # type: ignore[arg-type]
        self.x, self.y = torch.randn(64, SIZES[0], generator=seeded(1)), torch.randint(6, (64,), generator=seeded(2))

    def step(self) -> None:
        """A step of training, without the rewiring's."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def views(self) -> list[tuple[Tensor, list[Tensor]]]:
        """Of each layer the mask, and the wide views of its weight and both moments."""
        shown = []
        for layer in expanded_layers(self.model):
            weight = layer.edge_weight
            moments = self.optimizer.state[weight]
            wide = []
            for tensor in (weight, moments["exp_avg"], moments["exp_avg_sq"]):
                copy = deepcopy(layer)
                copy.edge_weight.data.copy_(tensor)
                wide.append(copy.wide_weight().detach())
            shown.append((layer.kept().clone(), wide))
        return shown


@each_moving
@each_regrow
def test_a_move_keeps_counts_and_entries_and_begins_new_edges_at_zero(recipe: Recipe, regrow: str) -> None:
    run = Run(recipe, every=2, regrow=regrow)
    run.step()
    assert not run.rewiring.step()
    run.step()
    before = run.views()
    assert run.rewiring.step()
    changed = 0
    for layer, (old, old_wide), (new, new_wide) in zip(expanded_layers(run.model), before, run.views(), strict=True):
        assert int(new.sum()) == int(old.sum()) == layer.nonzeros
        grown, dropped = new & ~old, old & ~new
        assert int(grown.sum()) == int(dropped.sum())
        changed += int(grown.sum())
        for ours, theirs in zip(new_wide, old_wide, strict=True):
            assert torch.equal(ours, torch.where(new & old, theirs, 0))
        stored = layer.edge_weight
        assert int((stored != 0).sum()) == int((new & old).sum())
    assert changed > 0
    run.step()
    assert fpe.nonzeros(run.model) == fpe.nonzeros(mlp(*SIZES))
    assert all((wide[0][~mask] == 0).all() for mask, wide in run.views())


@each_moving
@each_regrow
def test_structures_stay_valid(recipe: Recipe, regrow: str) -> None:
    run = Run(recipe, every=1, fraction=0.5, regrow=regrow)
    first = expanded_layers(run.model)[0]
    tiles_before = [_tile_counts(layer) for layer in expanded_layers(run.model)]
    for _ in range(4):
        run.step()
        run.rewiring.step()
    for layer, before in zip(expanded_layers(run.model), tiles_before, strict=True):
        ExpandedLinear.from_state(layer.state_dict())  # refuses labels that are not of the structure
        assert torch.equal(_tile_counts(layer), before)
    children = first.kept().unflatten(0, (recipe.alpha, -1))
    assert int(children.sum(0).max()) == 1
    if recipe.structure == "2:4":
        assert int(first.kept().unflatten(1, (-1, 4)).sum(-1).max()) <= 2


def _tile_counts(layer: ExpandedLinear) -> Tensor:
    """How many units hold 0, 1, 2, ... edges."""
    grid = PlaneGrid(layer.out_features, layer.in_features, layer.unit, layer.planes)
    counts = tiles(grid.to_planes(layer.kept()), layer.unit).flatten(2).sum(-1)
    return counts.flatten().bincount(minlength=layer.unit[0] * layer.unit[1] + 1)


@each_regrow
def test_nothing_moves_off_schedule(regrow: str) -> None:
    run = Run(Recipe(), every=3, regrow=regrow)
    for due in (False, False, True, False, False, True):
        run.step()
        before, moments = snapshot(run.model), deepcopy(run.optimizer.state_dict()["state"])
        assert run.rewiring.due == due
        assert run.rewiring.step() == due
        if not due:
            assert_unchanged(run.model, before)
            for number, state in run.optimizer.state_dict()["state"].items():
                assert all(torch.equal(state[name], moments[number][name]) for name in state)


def test_the_share_falls_along_the_cosine_and_ends() -> None:
    run = Run(Recipe("random", "input"), every=10, fraction=0.4, steps=40)
    counts = []
    for _ in range(60):
        run.step()
        old = run.model[0].kept().clone()
        run.rewiring.step()
        counts.append(int((run.model[0].kept() & ~old).sum()))
    edges = run.model[0].nonzeros
    angles = torch.tensor([1, 2, 3]) * torch.pi / 4
    assert counts[9:40:10] == [*(0.2 * (1 + angles.cos()) * edges).int().tolist(), 0]
    assert sum(counts) == sum(counts[9:40:10])


def test_the_smallest_edges_go_and_the_largest_gradients_come() -> None:
    torch.manual_seed(0)
    layer = MaskedLinear(torch.rand(9, 20, generator=seeded()) < 0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    rewiring = Rewiring(layer, optimizer, every=2, regrow="gradient")
    for seed in (1, 3):  # the last batch alone decides
        x, dy = torch.randn(5, 3, 20, generator=seeded(seed)), torch.randn(5, 3, 9, generator=seeded(seed + 1))
        layer(x).backward(dy)
        optimizer.step()
        if seed == 1:
            rewiring.step()
    old, weight = layer.kept().clone(), layer.wide_weight().detach().abs()
    rewiring.step()
    grown, dropped = layer.kept() & ~old, old & ~layer.kept()
    count = int(0.3 * int(old.sum()))
    assert int(dropped.sum()) == count
    assert weight[dropped].max() <= weight[old & layer.kept()].min()
    gradient = (dy.flatten(0, 1).T @ x.flatten(0, 1)).abs()
    assert gradient[grown].min() >= gradient[~old & ~grown].max()


def test_growth_sums_the_passes_of_a_step_and_no_others() -> None:
    """As with gradient accumulation: two halves of a batch are the batch."""
    masks = []
    for parts in (1, 2):
        torch.manual_seed(0)
        layer = MaskedLinear(torch.rand(9, 20, generator=seeded()) < 0.5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        rewiring = Rewiring(layer, optimizer, every=2, regrow="gradient")
        x, target = torch.randn(8, 20, generator=seeded(1)), torch.randn(8, 9, generator=seeded(2))
        (-100 * layer(x)).square().sum().backward()  # of a step that does not move
        rewiring.step()
        for piece, wanted in zip(x.chunk(parts), target.chunk(parts), strict=True):
            (layer(piece) - wanted).square().sum().backward()
        rewiring.step()
        masks.append(layer.kept())
    assert torch.equal(*masks)


@pytest.mark.parametrize("copied", [deepcopy, lambda m: _through_file(m)], ids=["deepcopy", "torch.save"])
def test_copies_of_a_watched_model_are_not_watched(copied: Callable[[nn.Module], nn.Module]) -> None:
    run = Run(Recipe(), every=1, regrow="gradient")
    twin = copied(run.model)
    nn.functional.cross_entropy(twin(run.x), run.y).backward()
    with pytest.raises(RuntimeError, match="forward and a backward pass"):
        run.rewiring.step()
    run.step()
    assert run.rewiring.step()


def _through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_an_edge_goes_to_the_child_that_wants_it_most() -> None:
    partition = Partition.random(6, 12, 4, generator=seeded())
    layer = SplitLinear(partition)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    rewiring = Rewiring(layer, optimizer, every=1, regrow="gradient")
    x, dy = torch.randn(8, 12, generator=seeded(1)), torch.randn(8, 24, generator=seeded(2))
    layer(x).backward(dy)
    old, weight = layer.partition.labels.clone(), layer.edge_weight.detach().abs().clone()
    rewiring.step()
    new = layer.partition.labels
    went = new != old
    count = int(0.3 * old.numel())
    assert int(went.sum()) == count
    assert torch.equal(went.flatten().nonzero().squeeze(1), weight.flatten().argsort()[:count].sort().values)
    wanted = (dy.T @ x).abs().view(4, 6, 12).masked_fill(partition.masks(), 0).argmax(0)
    assert torch.equal(new[went].long(), wanted[went])


def test_an_exchange_keeps_every_childs_number_in_every_group() -> None:
    partition = Partition.semi_structured(50, 16, generator=seeded())
    holes = torch.rand(50, 16, generator=seeded(1)) < 0.3
    kept = partition.without(holes).masks()
    size, growth = (torch.rand(2, 50, 16, generator=seeded(s)) for s in (2, 3))
    new = exchanged(size * kept, kept, growth, 0.4)
    assert not torch.equal(new, kept)
    assert torch.equal(new.unflatten(-1, (-1, 4)).sum(-1), kept.unflatten(-1, (-1, 4)).sum(-1))
    assert int(new.sum(0).max()) == 1
    assert 0.3 * int(kept.sum()) < int((kept & ~new).sum()) <= 0.4 * int(kept.sum())


def test_an_exchange_goes_where_most_grows() -> None:
    mask = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 1, 0]]]).bool()  # the last place is owned by nobody
    size = torch.tensor([[[0.1, 0.5, 0.0, 0.0]], [[0.0, 0.0, 0.4, 0.0]]])
    growth = torch.tensor([[[0.0, 0.0, 0.2, 0.6]], [[0.5, 0.0, 0.0, 0.0]]])
    to_sibling = exchanged(size, mask, growth, 0.7)  # 0.2 there and 0.5 back, against 0.6
    assert to_sibling.int().tolist() == [[[0, 1, 1, 0]], [[1, 0, 0, 0]]]
    to_nobody = exchanged(size, mask, growth * torch.tensor([1.0, 0.5])[:, None, None], 0.7)
    assert to_nobody.int().tolist() == [[[0, 1, 0, 1]], [[0, 0, 1, 0]]]


def test_what_is_stored_at_removed_places_is_cleared() -> None:
    kept = torch.zeros(4, 6, dtype=torch.bool)
    kept[:2, :3] = True
    kept[0, 0] = False  # a block kept in part
    layer = BlockLinear(kept, (2, 3), bias=False)
    layer.edge_weight.data.fill_(1.0)
    layer.rewire(kept)
    assert int((layer.edge_weight != 0).sum()) == int(kept.sum()) == 5


def test_a_full_mask_has_no_room() -> None:
    kept = torch.ones(1, 4, 4, dtype=torch.bool)
    assert torch.equal(moved(torch.rand(1, 4, 4), kept, torch.rand(1, 4, 4), 0.5, (1, 1), False, kept), kept)


def test_moves_are_seeded_and_resume() -> None:
    def train(resumed: bool) -> nn.Module:
        run = Run(Recipe(), every=2)
        for step in range(8):
            if resumed and step == 5:
                state = run.rewiring.state_dict()
                run.rewiring = Rewiring(run.model, run.optimizer, every=2, generator=seeded(9))
                run.rewiring.load_state_dict(state)
            run.step()
            run.rewiring.step()
        return run.model

    assert_unchanged(train(resumed=True), snapshot(train(resumed=False)))


def test_rewired_layers_keep_their_state_dicts() -> None:
    for recipe in MOVING:
        run = Run(recipe, every=1)
        run.step()
        run.rewiring.step()
        restored = fpe.restore(mlp(*SIZES), run.model.state_dict())
        assert torch.equal(restored(run.x), run.model(run.x))


LAYERS = {
    "split": (lambda: SplitLinear(Partition.random(3, 8, 2, generator=seeded())), "one child"),
    "quads": (lambda: SplitLinear(Partition.semi_structured(3, 8, generator=seeded())), "2:4"),
    "block": (lambda: BlockLinear(torch.eye(6, 8).bool(), (3, 4), (2, 1)), "blocks"),
}


@pytest.mark.parametrize(("make", "says"), LAYERS.values(), ids=LAYERS)
def test_layers_refuse_masks_that_they_cannot_have(make: object, says: str) -> None:
    layer = make()  # type: ignore[operator]
    before = snapshot(layer)
    with pytest.raises(ValueError, match=says):
        layer.rewire(
            torch.ones(6, 8).bool() if says != "2:4" else torch.ones(6, 8).bool() & (torch.arange(6) < 3)[:, None]
        )
    assert_unchanged(layer, before)


def _rewiring(**options: object) -> Rewiring:
    model = Recipe().expand(mlp(*SIZES))
    return Rewiring(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)  # type: ignore[arg-type]


BAD = (
    BadCall("every", lambda: _rewiring(every=0), ValueError, ("Rewiring", "every >= 1", "0, 0.3")),
    BadCall("fraction", lambda: _rewiring(fraction=1.0), ValueError, ("Rewiring", "0 < fraction < 1", "1.0")),
    BadCall("steps", lambda: _rewiring(steps=0), ValueError, ("Rewiring", "steps", "0")),
    BadCall("regrow", lambda: _rewiring(regrow="best"), ValueError, ("Rewiring", "random", "'best'")),
    BadCall(
        "dense",
        lambda: Rewiring(nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)),
        ValueError,
        ("Rewiring", "FPE layers", "Linear"),
    ),
    BadCall(
        "seeded",
        lambda: Rewiring(
            made := Recipe("seeded", "partition").expand(mlp(*SIZES)), torch.optim.SGD(made.parameters(), lr=0.1)
        ),
        ValueError,
        ("Rewiring", "'0'", "seed", "structure='random'", "resparsify='input'"),
    ),
    BadCall(
        "optimizer",
        lambda: Rewiring(Recipe().expand(mlp(*SIZES)), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)),
        ValueError,
        ("Rewiring", "optimizer", "'0'"),
    ),
    BadCall(
        "no-backward",
        lambda: _rewiring(every=1, regrow="gradient").step(),
        RuntimeError,
        ("Rewiring", "'0'", "backward"),
    ),
)


@pytest.mark.parametrize("case", BAD, ids=readable_id)
def test_bad_calls(case: BadCall) -> None:
    case.check()
