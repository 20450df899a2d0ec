"""The layers themselves: their function, copies, compilation, autocast."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

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
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

import fpe
from fpe import BlockLinear, MaskedLinear, MergeLinear, Partition, SplitLinear

# Layers of one's own

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


@each_layer
def test_a_weight_of_another_shape_is_refused(make: Callable[..., fpe.layers.ExpandedLinear]) -> None:
    layer = make()
    before = snapshot(layer)
    writers = {name: getattr(layer, name) for name in ("set_wide_weight", "set_matrix") if hasattr(layer, name)}
    for name, write in writers.items():
        for weight in (torch.ones(1), torch.ones(layer.out_features, 1), torch.ones(2, 2)):
            with pytest.raises(ValueError, match=rf"{type(layer).__name__}\.{name}: weight must have shape"):
                write(weight)
        with pytest.raises(TypeError, match="weight must be a tensor, got list"):
            write([1.0])
    assert_unchanged(layer, before)


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


# torch.compile and autocast


@pytest.mark.parametrize(
    "recipe",
    [*(Recipe(resparsify=p) for p in POLICIES), *(Recipe("block", p) for p in ("magnitude", "block", "partition"))],
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
