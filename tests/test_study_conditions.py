"""What a trained network is turned into at the split: counts are kept, controls are what they are called."""

from copy import deepcopy

import pytest
import torch
from support import mlp, seeded
from torch import nn

import fpe
from fpe.bench.studies import conditions


def dense_and_pairs() -> tuple[nn.Sequential, conditions.Pairs]:
    dense = mlp(32, 8, 6)
    return dense, conditions.pairs_of(dense)


def build(condition: str, alpha: int = 2) -> nn.Sequential:
    dense, pairs = dense_and_pairs()
    torch.manual_seed(1)
    return conditions.build(condition, dense, alpha, seeded(), pairs)


SAME_COUNT = (
    *("random magnitude", "gram magnitude", "2:4 input", "shared partition", "4x16 block", "4x16 input"),
    *(conditions.CONTINUED, conditions.OVERLAPPING, conditions.STATIC, conditions.FRESH, conditions.DROPCONNECT),
    *("random auto", "fresh random partition", "dropconnect 10%"),
)


@pytest.mark.parametrize("condition", SAME_COUNT)
def test_conditions_keep_the_dense_networks_count(condition: str) -> None:
    dense, _ = dense_and_pairs()
    before = deepcopy(dense.state_dict())
    model = build(condition)
    assert fpe.nonzeros(model) == fpe.nonzeros(dense)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_wide_dense_is_wide_and_new() -> None:
    dense, _ = dense_and_pairs()
    model = build(conditions.WIDE)
    assert [m.weight.shape for m in model if isinstance(m, nn.Linear)] == [(16, 32), (6, 16)]
    assert not torch.equal(model[0].weight[:8], dense[0].weight)


def test_children_overlap_in_the_control_alone() -> None:
    ours, theirs = (build(c)[0].kept().unflatten(0, (2, -1)).sum(0) for c in ("random magnitude", "overlapping"))
    assert int(ours.max()) == 1 and int(theirs.max()) == 2
    assert build("overlapping")[0].kept().sum(1).max() <= 16


@pytest.mark.parametrize(
    ("masks", "name"), [("random magnitude", conditions.FRESH), ("2:4 partition", "fresh 2:4 partition")]
)
def test_fresh_weights_keep_the_masks_and_nothing_else(masks: str, name: str) -> None:
    assert conditions.from_scratch(name) and not conditions.from_scratch(masks)
    ours, fresh = build(masks), build(name)
    for i in (0, 2):
        assert torch.equal(ours[i].kept(), fresh[i].kept())
        kept = ours[i].kept()
        assert not (ours[i].wide_weight() == fresh[i].wide_weight())[kept].any()
        bound = (kept.sum() / len(kept)).round() ** -0.5
        assert 0.8 * bound < fresh[i].wide_weight().abs().max() <= bound
        assert not torch.equal(ours[i].bias, fresh[i].bias)


def test_a_shared_division_is_the_same_for_all_parents() -> None:
    labels = build("shared partition")[0].partition.labels
    assert (labels == labels[0]).all() and int(labels[0].sum()) == 16


def test_dropconnect_drops_in_training_alone() -> None:
    layer = conditions.DropConnect(nn.Linear(40, 30, bias=False), 0.75)
    x = torch.eye(40)
    y = layer(x)
    dropped = y == 0
    assert 0.7 < dropped.double().mean() < 0.8
    torch.testing.assert_close(y[~dropped], 4 * layer.weight.T[~dropped])
    assert torch.equal(layer.eval()(x), layer.weight.T)
    assert [build(name, 4)[0].probability for name in ("dropconnect", "dropconnect 10%")] == [0.75, 0.1]


@pytest.mark.parametrize("name", ["random", "random best", "4x magnitude", "3:4 input", "fresh", "dropconnect 10"])
def test_unknown_conditions_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected .* got '{name}'"):
        build(name)
