"""The dense form of a layer on a CPU is never stale, and nobody else's."""

import gc
import pickle
import weakref
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from dense_forms import KINDS, batch, each_kind, kept, write_data
from support import (
    SIZES,
    Recipe,
    expanded_layers,
    mlp,
    readable_id,
    removed_entries,
)
from torch import nn

import fpe
from fpe.layers import dense_form

# It is never stale.


def step(model: nn.Module, **options: bool) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(model.parameters(), lr=0.1, **options).step()


def swap_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = 2 * p.data


def load_other(model: nn.Module) -> None:
    model.load_state_dict({name: t if t.dtype != torch.float32 else 2 * t for name, t in model.state_dict().items()})


def rewire(model: nn.Module) -> None:
    for layer in expanded_layers(model):
        layer.rewire(layer.kept().unflatten(0, (layer.planes[0], -1)).flip(0).flatten(0, 1))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "fused step": lambda model: step(model, fused=True),
    "foreach step": lambda model: step(model, foreach=True),
    "data written": write_data,
    "data replaced": swap_data,
    "state loaded": load_other,
    "rounded": lambda model: model.half().float(),
    "cleared": lambda model: [layer.clear_removed() for layer in expanded_layers(model)],
    "rewired": rewire,
    "parameter replaced": lambda model: [
        setattr(m, n, nn.Parameter(2 * p.detach()))
        for m in expanded_layers(model)
        for n, p in list(m.named_parameters(recurse=False))
    ],
    "averaged": lambda model: nn.utils.vector_to_parameters(
        2 * nn.utils.parameters_to_vector(model.parameters()), model.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("recipe", KINDS[:3], ids=readable_id)
def test_no_change_goes_unseen(recipe: Recipe, change: Callable[[nn.Module], object]) -> None:
    wide = recipe.expand(mlp(*SIZES)).eval()
    x = batch()
    with torch.no_grad():
        before = wide(x)
        assert all(kept(wide))
        with torch.enable_grad():
            change(wide)
        after = wide(x)
        assert torch.equal(after, fpe.to_dense(wide)(x))
        assert torch.equal(before, after) == (change is CHANGES["cleared"] or (rewired_nothing(wide, change)))
    wide.train()
    torch.testing.assert_close(wide(x), after)
    with torch.enable_grad():
        wide(x).sum().backward()
        wide.zero_grad()
        change(wide)
        torch.testing.assert_close(wide(x), fpe.to_dense(wide)(x))


def rewired_nothing(model: nn.Module, change: object) -> bool:
    return change is CHANGES["rewired"] and all(layer.planes[0] == 1 for layer in expanded_layers(model))


@each_kind
def test_writing_a_few_entries_through_data_needs_to_be_told(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(784, 32, 10))
    x = torch.ones(1, 784)
    layer = expanded_layers(wide)[0]
    weight = layer.edge_weight
    with torch.no_grad():
        layer(x)
        at = int((~removed_entries(layer)).view(-1).nonzero()[5])
        weight.data.view(-1)[at] += 1
        dense_form.forget(layer)
        assert torch.equal(layer(x), layer.to_linear()(x))


def test_one_entry_or_a_buffer_is_enough() -> None:
    """What the version counters and the identity of the tensors are for: the sample sees none of it."""
    module = nn.Module()
    weight = nn.Parameter(torch.zeros(100, 100))
    module.register_buffer("labels", torch.zeros(100, 100, dtype=torch.uint8))
    module.topology = torch.zeros(3)

    def made() -> dense_form.Made:
        return dense_form.Made.of(torch.zeros(1), weight, module, ("labels", "topology"))

    def write_weight() -> None:
        weight[5, 7] += 1

    changes = (
        write_weight,
        lambda: module.labels[5, 7].fill_(1),
        lambda: module.topology.add_(1),
        lambda: setattr(module, "labels", module.labels.clone()),
        lambda: setattr(module, "topology", None),
    )
    for change in changes:
        before = made()
        assert before.is_of(weight, module) and not before.is_of(nn.Parameter(weight.detach()), module)
        with torch.no_grad():
            change()
        assert not before.is_of(weight, module)
        assert made().is_of(weight, module)


@each_kind
def test_swapped_parameters_are_used_and_forgotten(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    x = batch()
    double = {name: 2 * p.detach() for name, p in wide.named_parameters()}
    with torch.no_grad():
        once = wide(x)
        twice = torch.func.functional_call(wide, double, (x,))
        assert not torch.equal(once, twice)
        assert torch.equal(wide(x), once)
        wide.load_state_dict({**wide.state_dict(), **double})
        assert torch.equal(wide(x), twice)


@pytest.mark.parametrize("made_in", [torch.inference_mode, torch.no_grad], ids=["inference-mode", "no-grad"])
@each_kind
def test_what_was_kept_without_gradients_serves_with_them(recipe: Recipe, made_in: Callable) -> None:
    wide = recipe.expand(mlp(*SIZES)).requires_grad_(False)
    plain = fpe.to_dense(wide)
    with made_in():
        wide(batch())
    assert all(kept(wide))
    ours, theirs = batch().requires_grad_(), batch().requires_grad_()
    for model, x in ((wide, ours), (plain, theirs)):
        model(x).square().sum().backward()
    assert all(kept(wide)) and torch.equal(ours.grad, theirs.grad)


def test_a_model_of_inference_tensors_runs_and_keeps_nothing() -> None:
    with torch.inference_mode():
        wide = Recipe().expand(mlp(*SIZES))
        assert torch.equal(wide(batch()), fpe.to_dense(wide)(batch()))
        for p in wide.parameters():
            p.mul_(2)
        assert torch.equal(wide(batch()), fpe.to_dense(wide)(batch()))
    assert not any(kept(wide))


# It is nobody else's.


@each_kind
def test_it_is_in_no_state_copy_or_pickle(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    state, pickled = list(wide.state_dict()), len(pickle.dumps(wide))
    with torch.no_grad():
        wide(batch())
    wide(batch()).sum().backward()
    wide.zero_grad()
    with torch.no_grad():
        wide(batch())
    assert all(kept(wide))
    assert list(wide.state_dict()) == state
    for twin in (deepcopy(wide), pickle.loads(pickle.dumps(wide))):
        assert not any(kept(twin))
        with torch.no_grad():
            assert torch.equal(twin(batch()), wide(batch()))
    assert len(pickle.dumps(wide)) <= pickled + 200


def test_it_goes_with_its_layer_and_when_the_layer_moves() -> None:
    wide = Recipe().expand(mlp(*SIZES))
    layer = expanded_layers(wide)[0]
    with torch.no_grad():
        wide(batch())
    dense = weakref.ref(dense_form._WEIGHTS[layer].result)
    layer.to("meta")
    assert dense() is None
    layer = expanded_layers(Recipe().expand(mlp(*SIZES)))[0]
    with torch.no_grad():
        layer(batch())
    dense = weakref.ref(dense_form._WEIGHTS[layer].result)
    del layer
    gc.collect()
    assert dense() is None
