"""A model in, a wider model of as many non-zeros out: for every split, structure and policy."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    DTYPES,
    POLICIES,
    RECIPES,
    SIZES,
    BadCall,
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
from fpe import BlockLinear, MaskedLinear, MergeLinear, SplitLinear
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
    alpha = 2 if structure == "2:4" else draw(st.integers(2, 4))
    block = (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    inputs = draw(st.integers((alpha - 1) * max(block[1], 3) + 1, 30))
    inputs += -inputs % 4 if structure == "2:4" else 0
    widest = (inputs - 1) // (alpha - 1) if policy == "input" else 9  # the input side can pay for no more outputs
    sizes = (inputs, draw(st.integers(1, 9)), draw(st.integers(1, min(widest, 9))))
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


# Which layers are expanded


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_deep_nets_alternate_and_keep_the_head(depth: int, policy: str) -> None:
    widths = [*(16, 12, 12, 10, 10)[:depth], 5]
    dense = mlp(*widths)
    wide = fpe.expand(dense, 2, resparsify=policy, block=(4, 4) if policy == "block" else None, generator=seeded())
    linears = [m for m in wide if not isinstance(m, nn.ReLU)]
    split = range(0, depth - 1, 2)  # every other layer, never the last
    assert [i for i, m in enumerate(linears) if isinstance(m, SplitLinear)] == list(split)
    for i, layer in enumerate(linears):
        assert layer.in_features == widths[i] * (2 if i - 1 in split else 1)
        assert layer.out_features == widths[i + 1] * (2 if i in split else 1)
    if depth % 2:
        assert type(linears[-1]) is nn.Linear
        assert torch.equal(linears[-1].weight, dense[-1].weight)
    assert fpe.nonzeros(wide) == fpe.nonzeros(dense)
    x = torch.randn(3, widths[0], generator=seeded())
    torch.testing.assert_close(wide(x), fpe.to_dense(wide)(x))


def test_groups_of_several_pairs_are_named() -> None:
    dense = mlp(12, 8, 12, 8, 5)
    groups = {"0": [i // 4 for i in range(12)], "4": [i % 3 for i in range(12)]}
    wide = fpe.expand(dense, 3, split="groups", groups=groups, resparsify="partition", generator=seeded())
    assert (wide[0].labels.unflatten(1, (3, 4)) == wide[0].labels[:, ::4, None]).all()
    assert (wide[4].labels == wide[4].labels[:, :3].repeat(1, 4)).all()


def test_nested_sequentials_are_unrolled() -> None:
    flat = mlp(12, 8, 8, 5)
    nested = nn.Sequential(nn.Sequential(flat[0], nn.Sequential(flat[1])), flat[2], nn.Sequential(flat[3], flat[4]))
    wide, nested_wide = (fpe.expand(m, 2, generator=seeded()) for m in (flat, nested))
    x = torch.randn(3, 12, generator=seeded())
    assert torch.equal(wide(x), nested_wide(x))
    assert isinstance(nested_wide[0][0], SplitLinear)
    assert isinstance(nested_wide[1], MergeLinear)
    assert type(nested_wide[2][1]) is nn.Linear


@pytest.mark.parametrize(
    ("outputs", "alpha", "policy"),
    [(6, 2, "input"), (7, 2, "partition"), (2, 4, "input"), (3, 4, "partition"), (10, 2, "partition")],
)
def test_auto_lets_the_input_side_pay_where_it_can(outputs: int, alpha: int, policy: str) -> None:
    """Up to 0.6 of 10 inputs' weights may go."""
    dense = mlp(10, 4, outputs)
    auto, named = (fpe.expand(dense, alpha, generator=seeded(), **kw) for kw in ({}, {"resparsify": policy}))
    assert_unchanged(auto, snapshot(named))
    partition = fpe.Partition.random(4, 10, alpha, generator=seeded())
    pair = fpe.expand_pair(dense[0], dense[2], partition, generator=seeded())
    assert isinstance(pair[1], MergeLinear) == (policy == "partition")


class Residual(nn.Module):
    """The MLP block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Transformer(nn.Module):
    """Two blocks and a head: no Sequential at the top."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TRANSFORMER_PAIRS = [(f"blocks.{i}.fc1", f"blocks.{i}.fc2") for i in range(2)]


# Where the output is as wide as the input, the input side cannot pay for it alone.
TRANSFORMER_RECIPES = [r for r in RECIPES if r.split == "random" and r.resparsify != "input"]


@pytest.mark.parametrize("recipe", TRANSFORMER_RECIPES, ids=readable_id)
def test_pairs_of_any_module(recipe: Recipe) -> None:
    dense = Transformer()
    wide = fpe.expand(dense, **recipe.options(12), pairs=TRANSFORMER_PAIRS, generator=seeded())
    assert type(wide) is Transformer
    assert fpe.nonzeros(wide) == fpe.nonzeros(dense)
    assert len(expanded_layers(wide)) == 4
    x = torch.randn(2, 3, 12, generator=seeded())
    torch.testing.assert_close(wide(x), fpe.to_dense(wide)(x))


def test_a_named_pair_alone_is_expanded() -> None:
    dense = Transformer()
    wide = fpe.expand(dense, pairs=TRANSFORMER_PAIRS[1:])
    assert type(wide.blocks[0].fc1) is nn.Linear
    assert type(wide.blocks[1].fc1) is SplitLinear
    assert torch.equal(wide.head.weight, dense.head.weight)


def test_an_expanded_model_may_have_its_other_pairs_expanded() -> None:
    dense = Transformer()
    once = fpe.expand(dense, pairs=TRANSFORMER_PAIRS[:1])
    twice = fpe.expand(once, pairs=TRANSFORMER_PAIRS[1:])
    assert fpe.nonzeros(twice) == fpe.nonzeros(dense)
    assert torch.equal(twice.blocks[0].fc1.labels, once.blocks[0].fc1.labels)


def test_kinds_of_layers() -> None:
    kinds = {r.id: tuple(type(m) for m in r.expand(mlp(*SIZES)) if not isinstance(m, nn.ReLU)) for r in RECIPES}
    for recipe in RECIPES:
        block = recipe.structure == "block"
        partition = BlockLinear if block else MergeLinear
        successors = dict(zip(POLICIES, (MaskedLinear, nn.Linear, BlockLinear, partition), strict=True))
        assert kinds[recipe.id] == (BlockLinear if block else SplitLinear, successors[recipe.resparsify])


# What may stand between the layers of a pair

HIDDEN = SIZES[1]
BETWEEN = {
    "layernorm": lambda: nn.LayerNorm(HIDDEN),
    "layernorm-plain": lambda: nn.LayerNorm(HIDDEN, elementwise_affine=False),
    "rmsnorm": lambda: nn.RMSNorm(HIDDEN),
    "batchnorm": lambda: nn.BatchNorm1d(HIDDEN),
    "batchnorm-plain": lambda: nn.BatchNorm1d(HIDDEN, affine=False),
    "dropout": lambda: nn.Dropout(0.3),
    "prelu": lambda: nn.PReLU(HIDDEN),
    "prelu-one": lambda: nn.PReLU(),
    "gelu": lambda: nn.GELU(),
}


def with_between(name: str) -> nn.Sequential:
    """A trained-looking model: what stands between has no two equal entries."""
    module = BETWEEN[name]()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim():
            tensor.data.copy_(torch.rand(tensor.shape, generator=seeded(1)) + 0.5)
    return mlp(*SIZES, between=[module])


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("alpha", [2, 3])
def test_what_stands_between_is_widened(between: str, alpha: int) -> None:
    dense = with_between(between)
    wide = fpe.expand(dense, alpha, resparsify="partition", generator=seeded())
    assert type(wide[1]) is type(dense[1])
    for name, tensor in dense[1].state_dict().items():
        repeated = tensor.repeat(alpha) if tensor.shape == (HIDDEN,) else tensor
        assert torch.equal(wide[1].state_dict()[name], repeated)
    x = torch.randn(4, SIZES[0], generator=seeded())
    for model in (wide.train(), wide.eval()):
        plain = fpe.to_dense(model)
        torch.manual_seed(0)
        got = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(got, plain(x))
    assert str(wide[1]) == str(dense[1]).replace(str(HIDDEN), str(alpha * HIDDEN))


@pytest.mark.parametrize("between", BETWEEN)
def test_restore_widens_what_stands_between(between: str) -> None:
    dense = with_between(between)
    wide = fpe.expand(dense, 3, generator=seeded()).eval()
    restored = fpe.restore(with_between(between), wide.state_dict()).eval()
    x = torch.randn(4, SIZES[0], generator=seeded())
    assert torch.equal(restored(x), wide(x))


def test_named_pairs_of_a_sequential_are_those_found_by_itself() -> None:
    dense = mlp(*SIZES, between=[nn.LayerNorm(HIDDEN)])
    found, named = (fpe.expand(dense, pairs=pairs, generator=seeded()) for pairs in (None, [("0", "3")]))
    assert_unchanged(named, snapshot(found))


# A single pair


def test_expand_pair_takes_a_partition_of_your_own() -> None:
    fc1, fc2 = integer_weights(nn.Linear(8, 6)), integer_weights(nn.Linear(6, 3))
    labels = torch.randint(3, (6, 8), generator=seeded()).to(torch.uint8)
    first, second = fpe.expand_pair(fc1, fc2, fpe.Partition(labels, 3), "partition", generator=seeded())
    assert torch.equal(first.labels, labels)
    assert first.nonzeros + second.nonzeros == 6 * 8 + 3 * 6
    assert torch.equal(first.edge_weight, fc1.weight)


# Bad input: the right error, a message that says expected and got, and the model as it was


def changed(change: str) -> nn.Sequential:
    """The usual model with one thing wrong."""
    model = mlp(*SIZES)
    with torch.no_grad():
        if change == "nan":
            model[0].weight[2, 3] = torch.nan
        elif change == "inf":
            model[2].bias[0] = torch.inf
        elif change == "integer":
            model[2].weight = nn.Parameter(model[2].weight.int(), requires_grad=False)
        elif change == "complex":
            model[0].weight = nn.Parameter(model[0].weight.cfloat())
        elif change == "chain":
            model[2] = nn.Linear(SIZES[1] + 1, SIZES[2])
        elif change == "tied":
            model = mlp(8, 8, 8, 8)
            model[2].weight = model[4].weight
        elif change == "reused":
            layer = nn.Linear(8, 8)
            model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 8), layer)
        elif change == "reused-norm":
            norm = nn.LayerNorm(8)
            model = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)
    return model


def bad(case: str, error: type[Exception], *says: str, model: Any = None, **options: Any) -> Any:
    """A bad call of ``expand``, as a pytest parameter: the model, the options, and what must come."""
    return pytest.param(mlp(*SIZES) if model is None else model, options, error, says, id=case)


DEEP = (12, 12, 12, 12, 5)
EXPANDED = fpe.expand(mlp(*SIZES), resparsify="magnitude")
BAD_INPUT = (
    bad("no-module", TypeError, "nn.Module", "int", model=3),
    *(bad(f"alpha-{a}", ValueError, "alpha", repr(a), alpha=a) for a in (1, 0, -1, 2.0, "2", True, None, 255)),
    bad("alpha-2:4-float", ValueError, "alpha", "2.0", alpha=2.0, structure="2:4"),
    bad("alpha-more-than-inputs", ValueError, "alpha = 25", "got 24", alpha=25),
    bad("split", ValueError, "random", "'halves'", split="halves"),
    bad("structure", ValueError, "2:4", "'4:8'", structure="4:8"),
    bad("policy", ValueError, "magnitude", "'none'", resparsify="none"),
    bad("2:4-alpha", ValueError, "2:4", "alpha = 3", structure="2:4", alpha=3),
    bad("2:4-inputs", ValueError, "multiple of 4", "got 10", structure="2:4", model=mlp(10, 8, 3)),
    bad("2:4-split", ValueError, "'2:4'", "'gram'", structure="2:4", split="gram"),
    bad("block-missing", ValueError, "block", "None", structure="block"),
    bad("block-policy-missing", ValueError, "block", "None", resparsify="block"),
    bad("block-stray", ValueError, "block=(2, 2)", "'random'", block=(2, 2)),
    *(
        bad(f"block-{b}", ValueError, "positive", repr(b), structure="block", block=b)
        for b in ((0, 4), (4,), 4, (4, 2.0))
    ),
    bad("block-wide", ValueError, "alpha = 2", "got 1", structure="block", block=(4, 24)),
    bad("groups-missing", ValueError, "groups", "None", split="groups"),
    bad("groups-stray", ValueError, "groups", "'random'", groups=[0] * 24),
    bad("groups-length", ValueError, "24", "got 3", split="groups", groups=[0, 1, 2]),
    bad("groups-float", TypeError, "integers", "float32", split="groups", groups=[0.5] * 24),
    bad("groups-few", ValueError, "alpha = 2", "got 1", split="groups", groups=[7] * 24),
    bad("groups-which", ValueError, "mapping", "'0', '4'", split="groups", groups=[0, 1] * 6, model=mlp(*DEEP)),
    bad("groups-names", ValueError, "'0'", "'fc1'", split="groups", groups={"fc1": [0, 1] * 12}),
    bad("excess", ValueError, "48", "32", resparsify="input", model=mlp(4, 8, 6)),
    bad("nan", ValueError, "'0'", "finite", "NaN", model=changed("nan")),
    bad("inf", ValueError, "'2'", "finite", "infinity", model=changed("inf")),
    bad("integer-weight", TypeError, "'2'", "floating", "int32", model=changed("integer")),
    bad("complex-weight", TypeError, "'0'", "floating", "complex64", model=changed("complex")),
    bad("chain", ValueError, "'2'", "13", "14", model=changed("chain")),
    bad("tied-weights", ValueError, "'2'", "shared", model=changed("tied")),
    bad("layer-used-twice", ValueError, "'0'", "shared", model=changed("reused")),
    bad("norm-used-twice", ValueError, "'1'", model=changed("reused-norm")),
    bad("one-layer", ValueError, "two nn.Linear", "got 1", model=nn.Sequential(nn.Linear(4, 2))),
    bad("no-sequential", ValueError, "Transformer", "pairs=", model=Transformer()),
    bad("softmax-between", ValueError, "'1'", "Softmax", "element-wise", model=mlp(8, 8, 8, between=[nn.Softmax(-1)])),
    bad("norm-of-images", ValueError, "LayerNorm", "one dimension", model=mlp(8, 8, 8, between=[nn.LayerNorm((2, 8))])),
    bad("expanded", ValueError, "'0'", "already", "SplitLinear", model=fpe.expand(mlp(*SIZES))),
    bad("expanded-pair", ValueError, "'2'", "already", model=EXPANDED, pairs=[("2", "0")]),
    bad("head", ValueError, "'2'", "head", pairs=[("2", "0")]),
    bad(
        "head-nested",
        ValueError,
        "'1.0'",
        "head",
        pairs=[("1.0", "0")],
        model=nn.Sequential(nn.Linear(4, 4), mlp(4, 4)),
    ),
    bad("pair-unknown", ValueError, "'fc9'", pairs=[("0", "fc9")]),
    bad("pair-no-linear", TypeError, "'1'", "nn.Linear", "ReLU", pairs=[("0", "1")]),
    bad("pair-apart", ValueError, "'0'", "'4'", pairs=[("0", "4")], model=mlp(*DEEP)),
    bad("pair-backwards", ValueError, "'2'", "'0'", pairs=[("2", "0")], model=mlp(*DEEP)),
    bad("pairs-overlap", ValueError, "'2'", "twice", pairs=[("0", "2"), ("2", "4")], model=mlp(*DEEP)),
    bad("pairs-empty", ValueError, "pairs", "empty", pairs=[]),
    bad("pair-string", ValueError, "two layer names", "'02'", pairs=["02"]),
    bad("pair-triple", ValueError, "two layer names", "('0', '2', '4')", pairs=[("0", "2", "4")]),
    bad("pair-int", ValueError, "two layer names", "5", pairs=[5]),
    bad("pair-number", ValueError, "two layer names", "(0, 2)", pairs=[(0, 2)]),
)


@pytest.mark.parametrize(("model", "options", "error", "says"), BAD_INPUT)
def test_bad_input_is_refused(model: Any, options: dict, error: type[Exception], says: tuple[str, ...]) -> None:
    before = snapshot(model) if isinstance(model, nn.Module) else None
    BadCall("", lambda: fpe.expand(model, **options), error, says).check()
    if before is not None:
        after = snapshot(model)
        assert list(after) == list(before)
        assert all(torch.equal(after[k], v) or v.isnan().any() for k, v in before.items())


@pytest.mark.parametrize(
    ("partition", "says"),
    [
        (fpe.Partition.random(13, 23, 2), ("[13, 23]", "[13, 24]")),
        (fpe.Partition(torch.full((13, 24), 7, dtype=torch.uint8), 2), ("7", "0 .. 1")),
        (fpe.Partition.random(13, 24, 2).without(torch.eye(13, 24) > 0), ("partition", "13")),  # would lose 13 weights
    ],
    ids=["shape", "labels", "holes"],
)
def test_expand_pair_refuses_a_partition_that_does_not_fit(partition: fpe.Partition, says: tuple[str, ...]) -> None:
    fc1, _, fc2 = mlp(*SIZES)
    BadCall("", lambda: fpe.expand_pair(fc1, fc2, partition), ValueError, says).check()


def test_expand_pair_refuses_another_policy_or_layers() -> None:
    fc1, relu, fc2 = mlp(*SIZES)
    partition = fpe.Partition.random(13, 24, 2)
    BadCall("", lambda: fpe.expand_pair(fc1, fc2, partition, "none"), ValueError, ("magnitude", "'none'")).check()
    BadCall("", lambda: fpe.expand_pair(fc1, fc2, partition, "block"), ValueError, ("block", "None")).check()
    BadCall("", lambda: fpe.expand_pair(fc2, fc1, partition), ValueError, ("6", "24")).check()
    BadCall("", lambda: fpe.expand_pair(fc1, relu, partition), TypeError, ("nn.Linear", "ReLU")).check()
