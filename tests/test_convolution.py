"""Expanded convolutions: the function of a masked wide convolution, at the pair's number of weights."""

from copy import deepcopy

import pytest
import torch
from support import POLICIES, BadCall, integers, readable_id, seeded
from torch import nn
from torch.nn.functional import conv2d

import fpe
from fpe import Partition
from fpe.convolution import PatchConv2d, expand_conv_pair

PARTITIONS = {
    "random": lambda: Partition.random(5, 36, 3, generator=seeded()),
    "2:4": lambda: Partition.semi_structured(5, 36, generator=seeded()),
    "block": lambda: Partition.block(5, 36, 2, block=(2, 9), generator=seeded()),
}


def convolutions() -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    return nn.Conv2d(4, 5, 3, stride=2, padding=1).double(), nn.Conv2d(
        5, 7, (3, 2), padding=(2, 0), dilation=2
    ).double()


@pytest.mark.parametrize("make", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "block"])
def test_expanded_convolutions_are_masked_wide_ones(make: object, policy: str) -> None:
    conv1, conv2 = convolutions()
    partition = make()  # type: ignore[operator]
    if policy == "input":  # the excess must fit into the first layer
        conv2 = nn.Conv2d(5, 3, 1).double()
    first, second = expand_conv_pair(conv1, conv2, partition, policy, generator=seeded())  # type: ignore[arg-type]
    alpha = partition.alpha
    dense = nn.Sequential(conv1, conv2)
    assert fpe.nonzeros(nn.Sequential(first, second)) == fpe.nonzeros(dense)
    x = integers(2, 4, 9, 8)
    hidden = first(x)
    owned = partition.masks().view(alpha * 5, 4, 3, 3)
    weight = conv1.weight.repeat(alpha, 1, 1, 1)
    kept = first.weight != 0
    assert not (kept & ~owned).any()
    torch.testing.assert_close(hidden, conv2d(x, weight * kept, conv1.bias.repeat(alpha), stride=2, padding=1))
    kept = second.weight != 0
    assert kept.shape == (conv2.out_channels, alpha * 5, *conv2.kernel_size)
    wide = conv2.weight.repeat(1, alpha, 1, 1) * kept
    settings = {"padding": conv2.padding, "dilation": conv2.dilation}
    torch.testing.assert_close(second(hidden), conv2d(hidden, wide, conv2.bias, **settings))


def test_removed_taps_stay_zero_in_training_and_the_dense_model_agrees() -> None:
    first, second = expand_conv_pair(*convolutions(), PARTITIONS["random"](), generator=seeded())
    model = nn.Sequential(first, nn.ReLU(), second)
    before = [(part.weight != 0) for part in (first, second)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = integers(2, 4, 9, 8)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for part, kept in zip((first, second), before, strict=True):
        assert torch.equal(part.weight != 0, kept)
    dense = fpe.to_dense(model)
    assert not any(isinstance(m, fpe.layers.ExpandedLinear) for m in dense.modules())
    torch.testing.assert_close(dense(x), model(x))


def test_the_successors_bias_is_its_own() -> None:
    conv1, conv2 = convolutions()
    before = deepcopy(conv2.bias)
    _, second = expand_conv_pair(conv1, conv2, PARTITIONS["random"]())
    second.bias.data.add_(1)
    assert torch.equal(conv2.bias, before)


def _expand(conv1: nn.Module, conv2: nn.Module) -> tuple[PatchConv2d, PatchConv2d]:
    return expand_conv_pair(conv1, conv2, Partition.random(4, 4, 2))  # type: ignore[arg-type]


BAD = (
    BadCall("type", lambda: _expand(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)), TypeError, ("conv1", "nn.Conv2d", "Linear")),
    BadCall("chain", lambda: _expand(nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1)), ValueError, ("conv2", "4 channels", "3")),
    BadCall(
        "groups",
        lambda: _expand(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)),
        ValueError,
        ("conv1", "groups = 1", "groups = 2"),
    ),
    BadCall(
        "padding",
        lambda: _expand(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, padding_mode="circular")),
        ValueError,
        ("conv2", "zeros", "circular"),
    ),
    BadCall("sizes", lambda: _expand(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), ValueError, ("partition", "[4, 36]")),
)


@pytest.mark.parametrize("case", BAD, ids=readable_id)
def test_bad_calls(case: BadCall) -> None:
    case.check()
