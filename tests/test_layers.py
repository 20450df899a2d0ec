"""The layers themselves: their function, state dicts that carry the topology, copies, compilation, autocast."""

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import (
    POLICIES,
    SIZES,
    BadCall,
    Recipe,
    assert_as_accurate,
    assert_unchanged,
    each_recipe,
    expanded_layers,
    integers,
    mlp,
    readable_id,
    removed_entries,
    seeded,
    snapshot,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

import fpe
from fpe import BlockLinear, MaskedLinear, MergeLinear, Partition, SplitLinear
from fpe.layers.state import FIXED, checksum

# Layers of one's own

State = dict[str, Any]
MASK = torch.rand(7, 12, generator=seeded()) < 0.5
PARTITION = Partition.random(7, 12, 3, generator=seeded()).without(MASK)
LAYERS: dict[str, Callable[..., fpe.layers.ExpandedLinear]] = {
    "split": lambda **kw: SplitLinear(PARTITION, **kw),
    "merge": lambda **kw: MergeLinear(PARTITION, **kw),
    "masked": lambda **kw: MaskedLinear(MASK, **kw),
    "block": lambda **kw: BlockLinear(torch.block_diag(*[torch.ones(3, 4)] * 3).bool()[:8], (3, 4), **kw),
    "block-planes": lambda **kw: BlockLinear(MASK.repeat(2, 1), (2, 5), (2, 3), **kw),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@each_layer
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_layer_is_its_wide_linear(make: Callable[..., fpe.layers.ExpandedLinear], bias: bool) -> None:
    torch.manual_seed(0)
    layer = make(bias=bias, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data.copy_((50 * parameter).round())
    wide = layer.wide_weight()
    assert wide.shape == layer.kept().shape == (layer.out_features, layer.in_features)
    assert (wide[~layer.kept()] == 0).all()
    for lead in ((), (4,), (2, 3), (0,)):
        x = integers(*lead, layer.in_features)
        wanted = linear(x, wide, layer.bias)
        assert torch.equal(layer(x), wanted)
        assert torch.equal(layer.to_linear()(x), wanted)


@each_layer
def test_layer_begins_as_linear_does_with_removed_edges_at_zero(make: Callable[..., fpe.layers.ExpandedLinear]) -> None:
    torch.manual_seed(0)
    layer = make()
    weight, removed = layer.edge_weight, removed_entries(layer)
    assert (weight[removed] == 0).all()
    assert (weight[~removed] != 0).all()
    assert int((~removed).sum()) == layer.nonzeros == int(layer.kept().sum())


@each_layer
def test_what_stands_at_a_removed_edge_is_not_read(make: Callable[..., fpe.layers.ExpandedLinear]) -> None:
    layer = make()
    x = torch.randn(4, layer.in_features, generator=seeded())
    before = layer(x)
    layer.edge_weight.data[removed_entries(layer)] = 1e6
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.wide_weight() != 0, layer.kept())


@each_layer
def test_repr_says_sizes_and_nonzeros(make: Callable[..., fpe.layers.ExpandedLinear]) -> None:
    layer = make(bias=False)
    for part in (
        type(layer).__name__,
        f"in_features={layer.in_features}",
        f"out_features={layer.out_features}",
        f"nonzeros={layer.nonzeros} ",
        "bias=False",
    ):
        assert part in repr(layer)


@each_layer
def test_layer_loads_by_itself(make: Callable[..., fpe.layers.ExpandedLinear]) -> None:
    layer, other = make(), make()
    other.load_state_dict(layer.state_dict())
    assert_unchanged(other, layer.state_dict())
    assert_unchanged(type(layer).from_state(layer.state_dict()), layer.state_dict())
    before = snapshot(other)
    state = {**layer.state_dict(), "_extra_state": layer.get_extra_state() + 1}
    with pytest.raises(ValueError, match="_extra_state"):
        other.load_state_dict(state)
    assert_unchanged(other, before)


@pytest.mark.parametrize("kind", [SplitLinear, MergeLinear])
def test_labels_in_any_memory_order_can_be_saved(kind: type, tmp_path: Path) -> None:
    layer = kind(Partition(Partition.random(12, 7, 3).labels.T, 3))
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert_unchanged(kind.from_state(safetensors.torch.load_file(tmp_path / "layer.safetensors")), layer.state_dict())


BAD_LAYERS = (
    BadCall("planes", lambda: BlockLinear(MASK, (2, 2), (2, 1)), ValueError, ("planes (2, 1)", "7 x 12")),
    BadCall("block", lambda: BlockLinear(MASK, (2, 0)), ValueError, ("positive", "(2, 0)")),
    BadCall("backend", lambda: SplitLinear(PARTITION, backend="cuda")(torch.ones(12)), ValueError, ("eager", "'cuda'")),
    BadCall("input", lambda: SplitLinear(PARTITION)(torch.ones(11)), ValueError, ("[..., 12]", "[11]")),
    BadCall("input-dtype", lambda: SplitLinear(PARTITION)(torch.ones(12).half()), TypeError, ("float32", "float16")),
)


@pytest.mark.parametrize("bad", BAD_LAYERS, ids=readable_id)
def test_bad_layers_are_refused(bad: BadCall) -> None:
    bad.check()


# Copies of expanded models


@each_recipe
def test_topology_follows_the_weight_to_every_device_but_meta(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    kept = [layer.kept() for layer in expanded_layers(wide)]
    moved = deepcopy(wide).to("meta")
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert moved(torch.empty(4, SIZES[0], device="meta")).shape == (4, SIZES[2])
    back = moved.to_empty(device="cpu")
    back.load_state_dict({name: t for name, t in wide.state_dict().items() if "extra" not in name}, strict=False)
    assert all(torch.equal(layer.kept(), own) for layer, own in zip(expanded_layers(back), kept, strict=True))
    assert_unchanged(back, snapshot(wide))


@each_recipe
@pytest.mark.parametrize("copy", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_are_independent(recipe: Recipe, copy: Callable[[nn.Module], nn.Module]) -> None:
    wide = recipe.expand(mlp(*SIZES))
    twin = copy(wide)
    x = torch.randn(4, SIZES[0], generator=seeded())
    before = wide(x)
    assert torch.equal(twin(x), before)
    with pytest.raises(ValueError, match="state dict"):  # the copy's state is guarded too
        twin.load_state_dict({"0.bias": torch.ones(1)})
    for layer in expanded_layers(twin):
        layer.rewire(layer.kept().roll(1, 0) if layer.planes == (1, 1) else layer.kept())
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.zero_()
    assert torch.equal(wide(x), before)


def test_a_whole_model_can_be_saved(tmp_path: Path) -> None:
    wide = Recipe("block", "block").expand(mlp(*SIZES))
    torch.save(wide, tmp_path / "model.pt")
    assert_unchanged(torch.load(tmp_path / "model.pt", weights_only=False), snapshot(wide))


@each_recipe
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=readable_id)
def test_models_change_dtype(recipe: Recipe, dtype: torch.dtype) -> None:
    wide = recipe.expand(mlp(*SIZES))
    changed = deepcopy(wide).to(dtype)
    assert {p.dtype for p in changed.parameters()} == {dtype}
    for old, new in zip(expanded_layers(wide), expanded_layers(changed), strict=True):
        assert torch.equal(old.get_extra_state(), new.get_extra_state())
        assert torch.equal(old.kept(), new.kept())
    assert fpe.nonzeros(changed) == fpe.nonzeros(wide)
    x = torch.randn(4, SIZES[0], generator=seeded()).to(dtype)
    plain = fpe.to_dense(changed)
    assert_as_accurate(changed(x), plain(x), deepcopy(plain).double()(x.double()))


# State dicts


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


# torch.compile and autocast


@pytest.mark.parametrize(
    "recipe",
    [*(Recipe(resparsify=p) for p in POLICIES), PARTIAL, BLOCKS, Recipe("block", "partition")],
    ids=readable_id,
)
def test_compiles_whole(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fpe.layers.ExpandedLinear, "keeps_dense", False
    )  # graphs hold the operations: compared with them
    wide = recipe.expand(mlp(*SIZES))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(wide, backend=counter, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        x = torch.randn(rows, SIZES[0], generator=seeded())
        grads = []
        for model in (compiled, wide):
            wide.zero_grad()
            y = model(x)
            y.square().sum().backward()
            grads.append([y, *(p.grad.clone() for p in wide.parameters())])
        for got, wanted in zip(*grads, strict=True):
            assert torch.equal(got, wanted)
    assert counter.frame_count == 1


@each_recipe
def test_autocast_runs_in_bfloat16(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    plain = fpe.to_dense(wide)
    x = torch.randn(4, SIZES[0], generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        y, yardstick = wide(x), plain(x)
    assert y.dtype == torch.bfloat16
    assert_as_accurate(y, yardstick, deepcopy(plain).double()(x.double()))
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in wide.parameters())


@pytest.mark.parametrize("kind", [fpe.SplitLinear, fpe.MergeLinear])
@pytest.mark.parametrize("gains", [True, False])
def test_loading_may_add_or_take_away_the_plane_of_holes(kind: type, gains: bool) -> None:
    full = Partition.random(6, 12, 2, generator=seeded())
    labels = full.labels.clone()
    labels[2, 3] = fpe.kernels.HOLE
    source, target = kind(Partition(labels, 2)), kind(full)
    if not gains:
        source, target = target, source
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.labels, source.labels) and len(target.packed.planes) == len(source.packed.planes)
    x = torch.randn(3, target.in_features, generator=seeded(1))
    assert torch.equal(target(x), source(x))
