"""Which layers of a model are expanded, and what may stand between the two of a pair."""

import pytest
import torch
from support import (
    POLICIES,
    RECIPES,
    SIZES,
    Recipe,
    Transformer,
    assert_unchanged,
    expanded_layers,
    integer_weights,
    mlp,
    readable_id,
    seeded,
    snapshot,
)
from torch import nn

import fpe
from fpe import BlockLinear, MaskedLinear, MergeLinear, SplitLinear

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
    flat = mlp(12, 8, 12, 5)
    nested = nn.Sequential(nn.Sequential(flat[0], nn.Sequential(flat[1])), flat[2], nn.Sequential(flat[3], flat[4]))
    wide, nested_wide = (fpe.expand(m, 2, generator=seeded()) for m in (flat, nested))
    x = torch.randn(3, 12, generator=seeded())
    assert torch.equal(wide(x), nested_wide(x))
    assert isinstance(nested_wide[0][0], SplitLinear)
    assert isinstance(nested_wide[1], MergeLinear)
    assert type(nested_wide[2][1]) is nn.Linear


AUTO = [(8, 2, "input"), (9, 2, "partition"), (12, 2, "partition"), (13, 2, "magnitude"), (2, 4, "input")]
AUTO += [(3, 4, "magnitude"), (7, 4, "magnitude"), (8, 4, "partition"), (10, 4, "partition"), (30, 2, "magnitude")]


@pytest.mark.parametrize(("outputs", "alpha", "policy"), AUTO)
def test_auto_chooses_by_the_sizes_of_a_pair(outputs: int, alpha: int, policy: str) -> None:
    """Of 10 inputs: up to 0.8 of the weights may go, and from 8 to 12 outputs are as many."""
    dense = mlp(10, 4, outputs)
    auto, named = (fpe.expand(dense, alpha, generator=seeded(), **kw) for kw in ({}, {"resparsify": policy}))
    assert_unchanged(auto, snapshot(named))
    partition = fpe.Partition.random(4, 10, alpha, generator=seeded())
    pair = fpe.expand_pair(dense[0], dense[2], partition, generator=seeded())
    assert isinstance(pair[1], MergeLinear) == (policy == "partition")


def test_auto_ranks_blocks_where_masks_are_blocks() -> None:
    dense, blocks = mlp(16, 8, 32), {"structure": "block", "block": (4, 4)}
    auto, named = (fpe.expand(dense, 2, generator=seeded(), **blocks, **kw) for kw in ({}, {"resparsify": "block"}))
    assert_unchanged(auto, snapshot(named))
    assert isinstance(auto[0], fpe.BlockLinear) and isinstance(auto[2], fpe.BlockLinear)


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
        whole = block and recipe.resparsify != "magnitude"  # its holes follow no blocks
        assert kinds[recipe.id] == (BlockLinear if whole else SplitLinear, successors[recipe.resparsify])


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
