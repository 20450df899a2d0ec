"""What PyTorch's tools do to a model with FPE layers: averages, checkpoints, sharing, parametrizations, tracing."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from support import (
    MOVING,
    POLICIES,
    ROOT,
    SIZES,
    Recipe,
    assert_unchanged,
    each_recipe,
    expanded_layers,
    mlp,
    removed_entries,
    seeded,
    snapshot,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fpe
from fpe import Partition, SplitLinear

ONE_OF_EACH = (
    Recipe(),
    Recipe(resparsify="partition", alpha=3),
    Recipe("2:4", "input"),
    Recipe("block", "block"),
    Recipe("block", "magnitude"),
)
one_of_each = pytest.mark.parametrize("recipe", ONE_OF_EACH, ids=lambda r: r.id)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(4, SIZES[0], generator=seeded(seed))


# Averages of models


def averaged_by_timm(average: nn.Module, model: nn.Module) -> None:
    """The update of timm's ``ModelEmaV2``: every tensor of the state dict."""
    with torch.no_grad():
        for old, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            old.copy_(0.9998 * old + 0.0002 * new)


def averaged_by_torch(**options: Any) -> Callable[[nn.Module, int], nn.Module]:
    def average(model: nn.Module, steps: int) -> nn.Module:
        kept = AveragedModel(model, use_buffers=True, **options)
        for _ in range(steps):
            kept.update_parameters(model)
        return kept.module

    return average


def average_of_state_dicts(model: nn.Module, steps: int) -> nn.Module:
    kept = deepcopy(model)
    for _ in range(steps):
        averaged_by_timm(kept, model)
    return kept


AVERAGES = {
    "swa": averaged_by_torch(),
    "ema": averaged_by_torch(multi_avg_fn=get_ema_multi_avg_fn(0.999)),
    "ema-one-by-one": averaged_by_torch(avg_fn=lambda old, new, count: 0.999 * old + 0.001 * new),
    "state-dict": average_of_state_dicts,
}


@one_of_each
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_an_average_of_a_model_has_its_edges(recipe: Recipe, average: Callable[..., nn.Module]) -> None:
    wide = recipe.expand(mlp(*SIZES))
    kept = average(wide, 5)
    for ours, theirs in zip(expanded_layers(kept), expanded_layers(wide), strict=True):
        assert torch.equal(ours.kept(), theirs.kept())
        assert (ours.edge_weight[removed_entries(theirs)] == 0).all()
    torch.testing.assert_close(kept(batch()), wide(batch()), rtol=1e-4, atol=1e-5)
    assert_unchanged(fpe.restore(mlp(*SIZES), kept.state_dict()), snapshot(kept))


def test_an_average_over_moving_masks_is_refused() -> None:
    wide = Recipe().expand(mlp(*SIZES))
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    kept = AveragedModel(wide, use_buffers=True)
    kept.update_parameters(wide)
    kept.update_parameters(wide)
    kept.eval()(batch())
    fpe.Rewiring(wide, optimizer, every=1, generator=seeded()).step()
    wide(batch())
    for _ in range(3):
        kept.update_parameters(wide)
    with pytest.raises(RuntimeError, match="masks differ"):
        kept(batch())


# Checkpoints


@each_recipe
def test_a_distributed_checkpoint_brings_its_edges(recipe: Recipe, tmp_path: Path) -> None:
    """It writes into the tensors of ``state_dict()``, and the model is handed the same dictionary."""
    wide = recipe.expand(mlp(*SIZES))
    dcp.save(get_model_state_dict(wide), checkpoint_id=tmp_path, no_dist=True)
    other = recipe.expand(mlp(*SIZES), seed=1)
    if any(p.shape != q.shape for p, q in zip(wide.parameters(), other.parameters(), strict=True)):
        other = deepcopy(wide)  # another number of blocks: nothing to write into
        for layer in expanded_layers(other):
            layer.rewire(layer.kept())
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    result = set_model_state_dict(other, state)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other(batch()), wide(batch()))
    assert_unchanged(other, snapshot(wide))


@each_recipe
def test_an_optimizer_made_before_loading_trains_on(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    state = {name: t.clone() for name, t in wide.state_dict().items()}
    for layer in expanded_layers(wide):
        if layer.planes != (1, 1) and recipe in MOVING:
            fpe.Rewiring(layer, optimizer, every=1, generator=seeded()).step()
    wide.load_state_dict(state)
    before = snapshot(wide)
    wide(batch()).square().sum().backward()
    optimizer.step()
    for name, parameter in wide.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    for layer in expanded_layers(wide):
        assert torch.equal(layer.wide_weight() != 0, layer.kept())


@each_recipe
def test_safetensors_saves_the_model_itself(recipe: Recipe, tmp_path: Path) -> None:
    wide = recipe.expand(mlp(*SIZES))
    safetensors.torch.save_model(wide, str(tmp_path / "model.safetensors"))
    twin = deepcopy(wide)
    for parameter in twin.parameters():
        parameter.data.zero_()
    missing, unexpected = safetensors.torch.load_model(twin, str(tmp_path / "model.safetensors"))
    assert not missing and not unexpected
    assert_unchanged(twin, snapshot(wide))


@one_of_each
def test_states_of_the_earlier_format_are_read(recipe: Recipe) -> None:
    """The file was written by the version that had format 2: topology in entries of their own."""
    name = dict(zip(ONE_OF_EACH, ("general", "merged", "quads", "blocks", "partial"), strict=True))[recipe]
    stored = safetensors.torch.load_file(ROOT / "tests" / "data" / "format2.safetensors")
    state = {key.removeprefix(f"{name}/"): t for key, t in stored.items() if key.startswith(f"{name}/")}
    y = state.pop("y")
    assert int(state["0._extra_state"][0]) == 2
    restored = fpe.restore(mlp(*SIZES, seed=3), state)
    torch.testing.assert_close(restored(batch()), y)
    assert fpe.nonzeros(restored) == fpe.nonzeros(mlp(*SIZES))
    for parameter in (same := deepcopy(restored)).parameters():
        parameter.data.zero_()
    same.load_state_dict(state)
    assert_unchanged(same, snapshot(restored))
    topology = next(key for key in state if key.rpartition(".")[2] in ("planes", "block_mask"))
    for damaged in ({**state, topology: state[topology].float()}, {k: t for k, t in state.items() if k != topology}):
        with pytest.raises(ValueError, match="state dict"):
            fpe.restore(mlp(*SIZES), damaged)


def test_a_model_pickled_whole_by_an_earlier_version_is_refused() -> None:
    layer = SplitLinear(Partition.random(4, 8, 2, generator=seeded()))
    old = {name: value for name, value in layer.__dict__.items() if name != "_encoded"}
    with pytest.raises(ValueError, match=r"state_dict\(\)"):
        SplitLinear.__new__(SplitLinear).__setstate__(old)


@each_recipe
@pytest.mark.parametrize("bias", [True, False])
def test_no_dense_model_takes_an_expanded_state_unnoticed(recipe: Recipe, bias: bool) -> None:
    wide, dense = recipe.expand(mlp(*SIZES, bias=bias)), mlp(*SIZES, bias=bias)
    with pytest.raises(RuntimeError, match="edge_weight"):
        dense.load_state_dict(wide.state_dict())
    with pytest.raises((RuntimeError, ValueError), match=r"0\.(edge_weight|bias)|2\.weight"):
        wide.load_state_dict(mlp(*SIZES, bias=bias).state_dict())


@each_recipe
def test_strict_means_what_it_means_elsewhere(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    before, state = snapshot(wide), wide.state_dict()
    assert list(wide.load_state_dict({}, strict=False).missing_keys) == list(state)
    adapter = {"0.lora_a": torch.ones(2)}
    assert list(wide.load_state_dict(adapter, strict=False).unexpected_keys) == ["0.lora_a"]
    assert_unchanged(wide, before)
    one = {"0.edge_weight": 2 * state["0.edge_weight"]}
    assert "0._extra_state" in wide.load_state_dict(one, strict=False).missing_keys
    assert torch.equal(wide[0].edge_weight, one["0.edge_weight"])
    assert (
        "0.edge_weight" in wide.load_state_dict({"0._extra_state": state["0._extra_state"]}, strict=False).missing_keys
    )
    for damaged in ({}, {**state, "4.weight": torch.ones(2)}, {**state, "0.extra": torch.ones(2)}):
        with pytest.raises(RuntimeError, match="key"):
            wide.load_state_dict(damaged)
    with pytest.raises(ValueError, match="state dict"):  # shapes count with and without
        wide.load_state_dict({"0.edge_weight": torch.ones(1)}, strict=False)


@each_recipe
def test_a_state_may_be_assigned(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    skeleton = deepcopy(wide).to("meta")
    repr(skeleton)
    skeleton.load_state_dict(wide.state_dict(), assign=True)
    assert not any(t.is_meta for t in (*skeleton.parameters(),))
    assert torch.equal(skeleton(batch()), wide(batch()))


@one_of_each
def test_entries_may_be_loaded_one_by_one(recipe: Recipe) -> None:
    """As transformers fills a model on meta: each entry by the ``load_state_dict`` of its own module."""
    wide = recipe.expand(mlp(*SIZES))
    skeleton = deepcopy(wide).to("meta")
    for name, tensor in wide.state_dict().items():
        path, _, leaf = name.rpartition(".")
        skeleton.get_submodule(path).load_state_dict({leaf: tensor}, strict=False, assign=True)
    assert_unchanged(skeleton, snapshot(wide))
    assert torch.equal(skeleton(batch()), wide(batch()))


def test_a_state_that_misfits_deep_inside_changes_nothing() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(SIZES[0])
            self.body = mlp(*SIZES)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.norm(x))

    wide = fpe.expand(Nested(), pairs=[("body.0", "body.2")], resparsify="magnitude", generator=seeded())
    before = snapshot(wide)
    state = {name: 2 * t if t.is_floating_point() else t for name, t in wide.state_dict().items()}
    state["body.2._extra_state"] = state["body.2._extra_state"] + 1
    with pytest.raises(ValueError, match=r"body\.2\._extra_state"):
        wide.load_state_dict(state)
    assert_unchanged(wide, before)


# Shared tensors, and models on "meta"


class Tied(nn.Module):
    """A language model in small: embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.mlp = mlp(12, 16, 12)
        self.head = nn.Linear(12, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mlp(self.embed(tokens)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dropped", ["embed.weight", "head.weight"])
def test_restore_of_a_tied_model_needs_one_name(device: str, dropped: str) -> None:
    wide = fpe.expand(Tied(), pairs=[("mlp.0", "mlp.2")], generator=seeded())
    assert wide.head.weight is wide.embed.weight
    state = {name: t for name, t in wide.state_dict().items() if name != dropped}
    with torch.device(device):
        dense = Tied()
    restored = fpe.restore(dense, state)
    assert restored.head.weight is restored.embed.weight
    tokens = torch.arange(7)
    assert torch.equal(restored(tokens), wide(tokens))
    restored.embed.weight.data.zero_()
    assert state[({"embed.weight", "head.weight"} - {dropped}).pop()].any()


@each_recipe
def test_restore_begins_from_a_model_on_meta(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES, between=[nn.BatchNorm1d(SIZES[1])])).eval()
    with torch.device("meta"):
        dense = mlp(*SIZES, between=[nn.BatchNorm1d(SIZES[1])]).eval()
    restored = fpe.restore(dense, wide.state_dict())
    assert torch.equal(restored(batch()), wide(batch()))
    assert all(p.is_meta for p in dense.parameters())
    restored[0].edge_weight.data.zero_()
    assert wide[0].edge_weight.any()


def test_restore_names_what_no_state_holds() -> None:
    class Rotary(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*mlp(*SIZES))
            self.register_buffer("frequencies", torch.ones(3), persistent=False)

    state = fpe.expand(Rotary(), generator=seeded()).state_dict()
    with torch.device("meta"):
        dense = Rotary()
    with pytest.raises(ValueError, match="in no state dict: frequencies"):
        fpe.restore(dense, state)


@pytest.mark.parametrize("context", [True, False], ids=["context", "moved"])
def test_expansion_on_meta_knows_its_edges(context: bool) -> None:
    dense = mlp(*SIZES)
    real = fpe.expand(dense, resparsify="partition", generator=seeded())
    with torch.device("meta" if context else "cpu"):
        wide = fpe.expand(deepcopy(dense).to("meta"), resparsify="partition", generator=seeded())
    assert all(p.is_meta for p in wide.parameters())
    assert f"nonzeros={real[0].nonzeros}" in repr(wide)
    wide.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(wide(batch()), real(batch()))


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "partition"])
def test_what_ranks_weights_needs_weights(policy: str) -> None:
    with pytest.raises(ValueError, match="meta"):
        Recipe(resparsify=policy).expand(mlp(*SIZES).to("meta"))
    with pytest.raises(ValueError, match="meta"):
        Recipe(resparsify="partition", split="gram").expand(mlp(*SIZES).to("meta"))


# Parametrizations, subclasses, code that reads `.weight`


@one_of_each
def test_weights_may_be_parametrized(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    before = wide(batch())
    layer = wide[0]
    parametrizations.weight_norm(layer, "edge_weight")
    torch.testing.assert_close(wide(batch()), before)
    state = wide.state_dict()
    assert "0.parametrizations.edge_weight.original0" in state
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    wide(batch()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.wide_weight(), before)
    assert (layer.wide_weight()[~layer.kept()] == 0).all()
    wide.load_state_dict(state)
    torch.testing.assert_close(fpe.to_dense(wide)(batch()), wide(batch()))
    layer.clear_removed()
    with pytest.raises(ValueError, match="'weight'"):  # the wide weight is no parameter
        parametrizations.weight_norm(wide[2] if len(expanded_layers(wide)) > 1 else layer)


@one_of_each
def test_weights_may_be_handed_in_from_another_device(recipe: Recipe) -> None:
    """As ``functional_call``, replicas and offloading do; the topology is fetched and stays where it is."""
    wide = recipe.expand(mlp(*SIZES))
    elsewhere = {name: p.to("meta") for name, p in wide.named_parameters()}
    assert functional_call(wide, elsewhere, (batch().to("meta"),)).shape == (4, SIZES[2])
    assert {t.device.type for layer in expanded_layers(wide) for t in layer.topology_tensors()} == {"cpu"}
    assert wide(batch()).isfinite().all()


@one_of_each
def test_models_are_exported(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES)).eval()
    exported = torch.export.export(wide, (batch(),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.testing.assert_close(exported.module()(batch()[:3]), wide(batch()[:3]))


def test_a_subclass_is_its_base_in_a_state() -> None:
    class Mine(SplitLinear):
        """As a user extends it; FSDP2 makes such a class too."""

    partition = Partition.random(4, 8, 2, generator=seeded())
    mine, base = Mine(partition), SplitLinear(partition)
    base.load_state_dict(mine.state_dict())
    mine.load_state_dict(base.state_dict())
    assert type(Mine.from_state(mine.state_dict())) is SplitLinear


@each_recipe
def test_every_layer_has_the_weight_that_its_sizes_promise(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    for layer in wide[::2]:
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        x = torch.randn(3, layer.in_features, generator=seeded())
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert layer.weight.requires_grad


@each_recipe
def test_a_wide_weight_can_be_written(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    for layer in expanded_layers(wide):
        given = torch.randn(layer.out_features, layer.in_features, generator=seeded())
        layer.set_wide_weight(given)
        assert torch.equal(layer.weight, torch.where(layer.kept(), given, 0))
        with torch.no_grad(), pytest.raises(TypeError, match="set_wide_weight"):
            layer.weight += 1.0


@pytest.mark.parametrize("policy", ["magnitude", "partition", "block"])
def test_the_encoder_of_pytorch_runs_its_expanded_layers(policy: str) -> None:
    torch.manual_seed(0)
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 2).eval()
    pairs = [(f"layers.{i}.linear1", f"layers.{i}.linear2") for i in range(2)]
    block = (4, 4) if policy == "block" else None
    wide = fpe.expand(dense, pairs=pairs, resparsify=policy, block=block, generator=seeded())
    x, padding = torch.randn(3, 5, 12, generator=seeded()), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    restored = fpe.restore(dense, wide.state_dict())
    for model in (wide, restored):
        wanted = fpe.to_dense(model)
        with (
            torch.no_grad(),
            patch.object(SplitLinear, "forward", autospec=True, side_effect=SplitLinear.forward) as ran,
        ):
            got, masked = model(x), model(x, src_key_padding_mask=padding)
        assert ran.call_count == 4
        with torch.no_grad():
            torch.testing.assert_close(got, wanted(x), rtol=1e-4, atol=1e-5)
            plain = wanted(x, src_key_padding_mask=padding)
        torch.testing.assert_close(masked[~padding], plain[~padding], rtol=1e-4, atol=1e-5)
