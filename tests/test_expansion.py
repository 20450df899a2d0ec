"""A pair of layers in, a wider pair of as many non-zeros out: for every split, structure and policy."""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    DTYPES,
    POLICIES,
    SIZES,
    Recipe,
    assert_as_accurate,
    assert_unchanged,
    each_recipe,
    expanded_layers,
    integer_weights,
    integers,
    mlp,
    readable_id,
    removed_entries,
    seeded,
    snapshot,
    true_nonzeros,
)
from torch import nn
from torch.nn.functional import linear

import fpe
from fpe.kernels.structures import STRUCTURES

# Properties of any expansion of any pair

STRUCTURES_OF_SPLIT = {"random": STRUCTURES, "groups": ("random",), "gram": ("random",)}


@dataclass(frozen=True)
class Drawn:
    """A recipe and the dense pair that it expands, with integer weights."""

    recipe: Recipe
    sizes: tuple[int, int, int]
    bias: bool
    seed: int

    @property
    def dense(self) -> nn.Sequential:
        return integer_weights(mlp(*self.sizes, bias=self.bias), self.seed)  # type: ignore[return-value]


@st.composite
def expansions(draw: st.DrawFn) -> Drawn:
    split = draw(st.sampled_from(list(STRUCTURES_OF_SPLIT)))
    structure = draw(st.sampled_from(STRUCTURES_OF_SPLIT[split]))
    policy = draw(st.sampled_from(POLICIES))
    alpha = 2 if structure == "2:4" else draw(st.sampled_from((2, 4) if structure == "seeded" else (2, 3, 4)))
    block = (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    inputs = draw(st.integers((alpha - 1) * max(block[1], 3) + 1, 30))
    inputs += -inputs % 4 if structure == "2:4" else 0
    widest = (inputs - 1) // (alpha - 1) if policy == "input" else 9  # the input side can pay for no more outputs
    fewest = fpe.resparsify.GROUPS * alpha if (structure, policy) == ("seeded", "partition") else 1
    sizes = (inputs, draw(st.integers(fewest, fewest + 8)), draw(st.integers(1, min(widest, 9))))
    return Drawn(Recipe(structure, policy, alpha, split, block), sizes, draw(st.booleans()), draw(st.integers(0, 99)))


each_expansion = given(expansions())


@each_expansion
def test_the_count_is_the_parents(drawn: Drawn) -> None:
    dense = drawn.dense
    wide = drawn.recipe.expand(dense, drawn.seed)
    assert fpe.nonzeros(wide) == fpe.nonzeros(dense) == true_nonzeros(dense) == true_nonzeros(fpe.to_dense(wide))


@each_expansion
def test_children_divide_the_parents_weights(drawn: Drawn) -> None:
    """Masks are disjoint, what remains has the parent's values, and biases are copied."""
    (d, h, c), alpha, dense = drawn.sizes, drawn.recipe.alpha, drawn.dense
    plain = fpe.to_dense(drawn.recipe.expand(dense, drawn.seed))
    first, second = plain[0].weight.view(alpha, h, d), plain[2].weight.view(c, alpha, h)
    owners = (first != 0).sum(0)
    assert (owners <= 1).all()
    assert torch.equal(first.sum(0), dense[0].weight * owners)
    assert torch.equal(second, dense[2].weight[:, None] * (second != 0))
    if drawn.recipe.resparsify == "partition":
        assert (owners == 1).all()
        assert ((second != 0).sum(1) == 1).all()
    if drawn.recipe.resparsify == "input":
        assert (second != 0).all()
    if drawn.bias:
        assert torch.equal(plain[0].bias, dense[0].bias.repeat(alpha))
        assert torch.equal(plain[2].bias, dense[2].bias)


@each_expansion
def test_children_sum_to_the_parents_preactivation(drawn: Drawn) -> None:
    """The sum of the children, less the copied biases, is the parent on the edges that the policy left."""
    (d, h, _), alpha, dense = drawn.sizes, drawn.recipe.alpha, drawn.dense
    x = integers(5, d, seed=drawn.seed)
    first = drawn.recipe.expand(dense, drawn.seed)[0]
    left = first.kept().view(alpha, h, d).any(0)
    children = first(x).unflatten(-1, (alpha, h)).sum(-2)
    copied = (alpha - 1) * dense[0].bias if drawn.bias else 0
    assert torch.equal(children - copied, linear(x, dense[0].weight * left, dense[0].bias))
    if drawn.recipe.resparsify == "partition":
        assert torch.equal(children - copied, dense[0](x))


@each_expansion
def test_to_dense_computes_the_same(drawn: Drawn) -> None:
    wide = drawn.recipe.expand(drawn.dense, drawn.seed)
    before = snapshot(wide)
    plain = fpe.to_dense(wide)
    assert {type(m) for m in plain} == {nn.Linear, nn.ReLU}
    x = integers(2, 3, drawn.sizes[0], seed=drawn.seed)
    assert torch.equal(plain(x), wide(x))
    assert_unchanged(wide, before)


# What training may not change

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
}


@each_recipe
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_removed_edges_stay_zero(recipe: Recipe, optimizer: str) -> None:
    dense = mlp(*SIZES)
    wide = recipe.expand(dense)
    layers = expanded_layers(wide)
    removed = [removed_entries(layer) for layer in layers]
    assert sum(int((~r).sum()) for r in removed) + true_nonzeros(wide) == fpe.nonzeros(dense)
    step = OPTIMIZERS[optimizer](wide.parameters())
    for seed in range(4):
        x = torch.randn(8, SIZES[0], generator=seeded(seed))
        step.zero_grad()
        wide(x).square().sum().backward()
        step.step()
        for layer, gone in zip(layers, removed, strict=True):
            weight = layer.edge_weight
            assert (weight.grad[gone] == 0).all()
            assert (weight[gone] == 0).all()
    assert true_nonzeros(fpe.to_dense(wide)) == fpe.nonzeros(wide) == fpe.nonzeros(dense)


@pytest.mark.parametrize("policy", POLICIES)
def test_training_decreases_the_loss(policy: str) -> None:
    wide = Recipe(resparsify=policy).expand(mlp(*SIZES))
    x = torch.randn(64, SIZES[0], generator=seeded())
    target = torch.sin(x[:, : SIZES[2]])
    step = torch.optim.Adam(wide.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        step.zero_grad()
        loss = (wide(x) - target).square().mean()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# What the new model keeps of the old one


@each_recipe
def test_the_original_is_untouched(recipe: Recipe) -> None:
    dense = mlp(*SIZES, between=[nn.BatchNorm1d(SIZES[1])])
    before = snapshot(dense)
    wide = recipe.expand(dense)
    wide.train()(torch.randn(4, SIZES[0], generator=seeded()))
    for parameter in wide.parameters():
        parameter.data.zero_()
    assert_unchanged(dense, before)
    assert [type(m) for m in dense] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


@each_recipe
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_dtype_is_kept(recipe: Recipe, dtype: torch.dtype) -> None:
    wide = recipe.expand(mlp(*SIZES).to(dtype))
    assert {p.dtype for p in wide.parameters()} == {dtype}
    x = torch.randn(4, SIZES[0], generator=seeded()).to(dtype)
    plain = fpe.to_dense(wide)
    assert_as_accurate(wide(x), plain(x), deepcopy(plain).double()(x.double()))
    wide(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in wide.parameters())


@pytest.mark.parametrize("policy", POLICIES)
def test_mode_and_requires_grad_are_kept(policy: str) -> None:
    dense = mlp(*SIZES, between=[nn.LayerNorm(SIZES[1]), nn.Dropout(0.5)]).eval()
    dense[0].weight.requires_grad_(False)
    dense[1].weight.requires_grad_(False)
    dense[4].bias.requires_grad_(False)
    wide = Recipe(resparsify=policy).expand(dense)
    assert not any(m.training for m in wide.modules())
    for old, new in zip(dense, wide, strict=True):
        wanted = [p.requires_grad for p in old.parameters()]
        assert [p.requires_grad for p in new.parameters()] == wanted, old
    assert all(m.training for m in Recipe(resparsify=policy).expand(dense.train()).modules())


@pytest.mark.parametrize("policy", POLICIES)
def test_biases_may_be_absent(policy: str) -> None:
    dense = mlp(*SIZES, bias=False)
    assert not any("bias" in name for name in Recipe(resparsify=policy).expand(dense).state_dict())
    dense[0] = nn.Linear(SIZES[0], SIZES[1])
    wide = Recipe(resparsify=policy).expand(dense)
    assert (wide[0].bias is not None, wide[2].bias is not None) == (True, False)


@each_recipe
def test_the_seed_decides(recipe: Recipe) -> None:
    dense = mlp(*SIZES)
    once = recipe.expand(dense, seed=3)
    assert_unchanged(recipe.expand(dense, seed=3), snapshot(once))
    assert not torch.equal(once[0].kept(), recipe.expand(dense, seed=4)[0].kept())


def test_without_a_generator_the_global_seed_decides() -> None:
    dense = mlp(*SIZES)
    torch.manual_seed(5)
    once = snapshot(fpe.expand(dense))
    torch.manual_seed(5)
    assert_unchanged(fpe.expand(dense), once)
