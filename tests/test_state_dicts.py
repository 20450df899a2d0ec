"""State dicts carry the topology: through files and back, refused where they do not fit, before anything changes."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import safetensors.torch
import torch
from support import (
    SIZES,
    Recipe,
    assert_unchanged,
    each_recipe,
    expanded_layers,
    mlp,
    readable_id,
    removed_entries,
    seeded,
    snapshot,
)
from torch import Tensor, nn

import fpe
from fpe import Partition
from fpe.layers import ExpandedLinear
from fpe.layers.state import FIXED, checksum

State = dict[str, Any]


def through_torch_save(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: State) -> State:
    return safetensors.torch.load(safetensors.torch.save(state))


each_format = pytest.mark.parametrize(
    "stored", [through_torch_save, through_safetensors], ids=["torch-save", "safetensors"]
)


def other_blocks(model: nn.Module, state: State) -> bool:
    """Whether a block layer would need another number of blocks to take a state."""
    return any(state[n].shape != p.shape for n, p in model.named_parameters() if n.endswith("edge_weight"))


@each_recipe
@each_format
def test_state_dict_round_trips(recipe: Recipe, stored: Callable[[State], State]) -> None:
    dense = mlp(*SIZES)
    wide = recipe.expand(dense)
    torch.optim.SGD(wide.parameters(), lr=0.1).step()
    state = stored(wide.state_dict())
    other = recipe.expand(mlp(*SIZES, seed=1), seed=1)
    assert not torch.equal(other[0].kept(), wide[0].kept())
    x = torch.randn(4, SIZES[0], generator=seeded())
    for model in (other, fpe.restore(mlp(*SIZES, seed=2), state)):
        if model is other:
            if other_blocks(model, state):
                with pytest.raises(ValueError, match=r"fpe\.restore"):
                    model.load_state_dict(state)
                continue
            weights = list(model.parameters())
            model.load_state_dict(state)
            assert all(old is new for old, new in zip(weights, model.parameters(), strict=True))
        assert_unchanged(model, snapshot(wide))
        assert torch.equal(model(x), wide(x))
        assert fpe.nonzeros(model) == fpe.nonzeros(dense)
        model(x).sum().backward()
        for layer in expanded_layers(model):
            assert (layer.edge_weight.grad[removed_entries(layer)] == 0).all()


@each_recipe
def test_restore_leaves_the_dense_model(recipe: Recipe) -> None:
    dense = mlp(*SIZES, seed=1)
    before = snapshot(dense)
    restored = fpe.restore(dense, recipe.expand(mlp(*SIZES)).half().state_dict())
    assert_unchanged(dense, before)
    assert {p.dtype for layer in expanded_layers(restored) for p in layer.parameters()} == {torch.float16}


def test_restore_of_a_deep_net() -> None:
    wide = fpe.expand(mlp(12, 8, 8, 8, 5), 2, generator=seeded())
    assert_unchanged(fpe.restore(mlp(12, 8, 8, 8, 5, seed=1), wide.state_dict()), snapshot(wide))


def test_a_loaded_state_is_a_copy() -> None:
    recipe = Recipe("block", "partition")
    state = recipe.expand(mlp(*SIZES)).state_dict()
    other = recipe.expand(mlp(*SIZES), seed=1)
    other.load_state_dict(state)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.zero_()
    assert all(t.any() for name, t in state.items() if not name.endswith("_extra_state"))


@each_recipe
def test_loading_keeps_removed_edges_at_zero(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    wide.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in wide.state_dict().items()})
    for layer in expanded_layers(wide):
        assert (layer.edge_weight[removed_entries(layer)] == 0).all()


def edited(**edits: Callable[[Any], Any] | None) -> Callable[[State], State]:
    """A damage that edits entries of the first layer, the second's named with a leading underscore; None drops."""

    def damage(state: State) -> State:
        state = dict(state)
        for name, edit in edits.items():
            key = f"2.{name[2:]}" if name.startswith("s_") else f"0.{name}"
            value = state.pop(key)
            if edit is not None:
                state[key] = edit(value.clone())
        return state

    return damage


def other_state(recipe: Recipe, *sizes: int) -> Callable[[State], State]:
    return lambda state: recipe.expand(mlp(*(sizes or SIZES)), seed=1).state_dict()


def put(index: Any, value: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_put(tuple(torch.tensor([i]) for i in index), torch.tensor(value, dtype=t.dtype))


def shorter(t: Tensor) -> Tensor:
    return t[:-1]


def averaged(t: Tensor) -> Tensor:
    """What an average over state dicts makes of it."""
    return torch.cat([t[:FIXED], (0.5 * t[FIXED:] + 0.5 * t[FIXED:].flip(0)).to(t.dtype)])


def forged(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Another topology with a right checksum."""

    def forge(t: Tensor) -> Tensor:
        words = change(t[FIXED:])
        return torch.cat([t[: FIXED - 1], checksum(words).view(1), words])

    return forge


GENERAL, MERGED = Recipe(), Recipe(resparsify="partition")
QUADS, BLOCKS, PARTIAL = Recipe("2:4", "input"), Recipe("block", "block"), Recipe("block", "magnitude")


@dataclass(frozen=True)
class Damage:
    """A state that does not fit: of which model, how it came about, and whether it is good elsewhere."""

    id: str
    damage: Callable[[State], State]
    recipe: Recipe = GENERAL
    foreign: bool = False


DAMAGES = (
    Damage("dense", lambda state: mlp(*SIZES).state_dict(), foreign=True),
    Damage("alpha", other_state(Recipe(alpha=3)), foreign=True),
    Damage("structure", other_state(Recipe("2:4")), foreign=True),
    Damage("policy", other_state(MERGED), foreign=True),
    Damage("block-size", other_state(Recipe("block", "block", block=(3, 4))), BLOCKS, foreign=True),
    Damage("wider", other_state(GENERAL, 24, 14, 6)),
    Damage("header-dtype", edited(_extra_state=Tensor.float)),
    Damage("header-string", edited(_extra_state=lambda t: "state")),
    Damage("header-dimensions", edited(_extra_state=lambda t: t[None])),
    Damage("header-short", edited(_extra_state=lambda t: t[:5])),
    Damage("topology-truncated", edited(_extra_state=shorter)),
    Damage("topology-truncated-second", edited(s__extra_state=shorter)),
    Damage("topology-averaged", edited(_extra_state=averaged)),
    Damage("topology-averaged-second", edited(s__extra_state=averaged)),
    Damage("topology-averaged-merge", edited(s__extra_state=averaged), MERGED),
    Damage("topology-averaged-blocks", edited(_extra_state=averaged), BLOCKS),
    Damage("topology-longer", edited(_extra_state=forged(lambda w: torch.cat([w, w])))),
    Damage("topology-longer-mask", edited(s__extra_state=forged(lambda w: torch.cat([w, w])))),
    Damage("topology-longer-blocks", edited(_extra_state=forged(lambda w: torch.cat([w, w]))), BLOCKS),
    Damage("topology-empty-blocks", edited(_extra_state=forged(lambda w: w[:0])), BLOCKS),
    Damage("label-3-of-3", edited(_extra_state=forged(lambda w: torch.full_like(w, -1))), Recipe(alpha=3)),
    Damage("labels-2:4", edited(_extra_state=forged(torch.zeros_like)), Recipe("2:4", "partition")),
    Damage("other-count-of-blocks", edited(_extra_state=forged(lambda w: torch.full_like(w, -1))), BLOCKS),
    Damage("header-format", edited(_extra_state=put((0,), 99))),
    Damage("header-kind", edited(_extra_state=put((1,), 9))),
    Damage("header-sizes", edited(_extra_state=put((2,), 23))),
    Damage("weight-truncated", edited(edge_weight=shorter)),
    Damage("weight-string", edited(edge_weight=lambda t: "weight")),
    Damage("weight-truncated-second", edited(s_edge_weight=shorter)),
    Damage("bias-truncated", edited(s_bias=shorter)),
    Damage("plain-successor", edited(s_weight=shorter), QUADS),
    Damage("values-count", edited(edge_weight=shorter), BLOCKS),
    Damage("values-count-second", edited(s_edge_weight=shorter), BLOCKS),
    Damage("values-string", edited(edge_weight=lambda t: "values"), BLOCKS),
)


@pytest.mark.parametrize("case", DAMAGES, ids=readable_id)
def test_a_state_that_does_not_fit_changes_nothing(case: Damage) -> None:
    wide = case.recipe.expand(mlp(*SIZES), seed=7)
    before, kept = snapshot(wide), [layer.kept() for layer in expanded_layers(wide)]
    state = case.damage(dict(case.recipe.expand(mlp(*SIZES, seed=1)).state_dict()))
    with pytest.raises(ValueError, match="state dict"):
        wide.load_state_dict(state)
    assert_unchanged(wide, before)
    assert all(torch.equal(layer.kept(), own) for layer, own in zip(expanded_layers(wide), kept, strict=True))


@pytest.mark.parametrize("case", [d for d in DAMAGES if not d.foreign], ids=readable_id)
def test_restore_refuses_a_damaged_state(case: Damage) -> None:
    dense = mlp(*SIZES)
    before = snapshot(dense)
    state = case.damage(dict(case.recipe.expand(mlp(*SIZES, seed=1)).state_dict()))
    with pytest.raises(ValueError, match="state dict"):
        fpe.restore(dense, state)
    assert_unchanged(dense, before)


def test_restore_refuses_another_architecture() -> None:
    state = Recipe().expand(mlp(*SIZES)).state_dict()
    for dense in (mlp(*SIZES[:2]), mlp(24, 13, 6, 5), mlp(24, 12, 6)):
        with pytest.raises(ValueError, match="state dict"):
            fpe.restore(dense, state)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Recipe(alpha=3), "SplitLinear of 24 inputs, 26 outputs, .* got a SplitLinear of 24 inputs, 39 outputs"),
        (BLOCKS, "should be of a SplitLinear .* got a BlockLinear .* fpe.restore"),
    ],
    ids=["alpha", "kind"],
)
def test_a_state_of_another_expansion_is_told_in_words(other: Recipe, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe().expand(mlp(*SIZES)).load_state_dict(other.expand(mlp(*SIZES)).state_dict())


def test_restore_shows_the_names_of_a_wrapper() -> None:
    state = Recipe().expand(mlp(*SIZES)).state_dict()
    with pytest.raises(
        ValueError, match=r"lacks entries of the model: 0.weight, .*in their place it has module.0.edge_weight"
    ):
        fpe.restore(mlp(*SIZES), {f"module.{name}": value for name, value in state.items()})


@pytest.mark.parametrize("kind", [fpe.SplitLinear, fpe.MergeLinear])
@pytest.mark.parametrize("gains", [True, False])
def test_a_topology_of_another_number_of_edges_is_built_and_not_loaded(kind: type, gains: bool) -> None:
    full = Partition.random(6, 12, 2, generator=seeded())
    labels = full.labels.clone()
    labels[2, 3] = fpe.kernels.HOLE
    source, target = kind(Partition(labels, 2)), kind(full)
    if not gains:
        source, target = target, source
    before = snapshot(target)
    with pytest.raises(ValueError, match=rf"{source.nonzeros} edges, this layer {target.nonzeros}"):
        target.load_state_dict(source.state_dict())
    assert_unchanged(target, before)
    built = ExpandedLinear.from_state(source.state_dict())
    x = torch.randn(3, target.in_features, generator=seeded(1))
    assert torch.equal(built.labels, source.labels) and torch.equal(built(x), source(x))


@pytest.mark.parametrize("structure", ["random", "2:4"])
def test_a_weight_that_was_stored_as_a_matrix_is_packed_by_its_own_topology(structure: str) -> None:
    """What stands where no edge is means nothing: here it is not even a number."""
    source, target = (Recipe(structure, "input").expand(mlp(*SIZES, seed=seed), seed) for seed in (0, 1))
    layer = source[0]
    assert not torch.equal(layer.bitmap.bits, target[0].bitmap.bits) and layer.edge_weight.dim() == 1
    state = dict(source.state_dict())
    exists = layer.labels != fpe.kernels.HOLE
    state["0.edge_weight"] = torch.where(exists, layer.matrix().detach(), torch.nan)
    parameter = target[0].edge_weight
    target.load_state_dict(state)
    assert target[0].edge_weight is parameter
    for loaded in (target, fpe.restore(mlp(*SIZES), state)):
        assert_unchanged(loaded, snapshot(source))
