"""Packed labels: they come back as they went in, the bits lie where they are said to, and cost what is promised."""

import pytest
import torch
from support import seeded

from fpe.kernels import HOLE, PackedLabels
from fpe.kernels.partition.labels import digits, row_bytes


@pytest.mark.parametrize("alpha", [1, 2, 3, 4, 5, 8, 100, 254])
@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (1, 1), (5, 8), (7, 129), (16, 256)], ids=str)
@pytest.mark.parametrize("holes", [False, True])
def test_labels_come_back_as_they_went_in(alpha: int, shape: tuple[int, int], holes: bool) -> None:
    labels = torch.randint(alpha, shape, generator=seeded(), dtype=torch.uint8)
    if holes:
        labels[torch.rand(shape, generator=seeded(1)) < 0.4] = HOLE
    packed = PackedLabels.pack(labels, alpha)
    assert torch.equal(packed.unpack(), labels) and torch.equal(packed.T.unpack(), labels.T)
    assert packed.has_holes == bool((labels == HOLE).any())
    assert packed.planes.shape == (digits(alpha) + packed.has_holes, shape[0], row_bytes(shape[1]))


def test_the_bits_lie_where_they_are_said_to() -> None:
    for edge in (0, 1, 2, 4, 7, 8, 31, 32, 75, 127, 128, 200):
        labels = torch.zeros(2, 256, dtype=torch.uint8)
        labels[1, edge] = 2
        group, s, t, h, odd, p = edge // 128, edge // 32 % 4, edge // 8 % 4, edge // 4 % 2, edge // 2 % 2, edge % 2
        planes = torch.zeros(2, 2, 32, dtype=torch.uint8)
        planes[1, 1, 16 * group + 4 * t + 2 * p + odd] = 1 << (2 * s + h)
        assert torch.equal(PackedLabels.pack(labels, 3).planes, planes)


def test_packed_labels_cost_the_bits_that_are_promised() -> None:
    for alpha, bits in ((2, 1), (3, 2), (4, 2), (8, 3)):
        labels = torch.arange(256 * 512).remainder(alpha).view(256, 512).byte()
        assert PackedLabels.pack(labels, alpha).planes.numel() * 8 == bits * 256 * 512
