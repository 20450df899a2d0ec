"""What is measured: a case's sizes, and its weights, labels and activations on a device."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fpe
from fpe.kernels.model import Sizes
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED, TWO_FOUR

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUADS = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]])
"""The ways to deal four inputs to two children, two each."""


class Case(Sizes):
    """A layer and a batch."""

    def row(self) -> dict[str, Any]:
        """The columns that name it in a results file."""
        block = f"{self.block[0]}x{self.block[1]}" if self.structure == BLOCK else ""
        sizes = {"M": self.m, "N": self.n, "K": self.k, "alpha": self.alpha}
        return {**sizes, "structure": self.structure, "block": block, "dtype": self.dtype}


@dataclass(frozen=True)
class Problem:
    """A case's data on a device, the same for every provider.

    Attributes:
        case: What it is of.
        partition: Who owns each edge.
        weight: The parent's ``[N, K]``.
        x: Activations ``[M, K]``.
        dy: Gradients of the children's outputs ``[M, alpha * N]``.
    """

    case: Case
    partition: fpe.Partition
    weight: Tensor
    x: Tensor
    dy: Tensor

    @classmethod
    def make(cls, case: Case, device: str, seed: int = 0) -> "Problem":
        """Draws random data on the device itself: a host would take longer than the measurement."""
        generator = torch.Generator(device).manual_seed(seed)
        draw = partial(torch.randn, generator=generator, device=device, dtype=DTYPES[case.dtype])
        if case.structure == SEEDED:
            partition = fpe.Partition.seeded(case.n, case.k, case.alpha, seed).to(device)
        else:
            block = case.block if case.structure == BLOCK else None
            labels = _labels(case, generator, device)
            partition = fpe.Partition(labels, case.alpha, case.structure, block)  # type: ignore[arg-type]
        weight = draw(case.n, case.k) / case.k**0.5
        return cls(case, partition, weight, draw(case.m, case.k), draw(case.m, case.alpha * case.n))

    @property
    def wide(self) -> Tensor:
        """The expanded layer's dense weight, ``[alpha * N, K]``."""
        return torch.where(self.partition.masks(), self.weight, self.weight.new_zeros(())).flatten(0, 1)


def _labels(case: Case, generator: torch.Generator, device: str) -> Tensor:
    """Labels of the case's structure, each child's share equal but for rounding, without a sort of every edge."""
    n, k, alpha = case.n, case.k, case.alpha

    def dealt(rows: int, columns: int) -> Tensor:
        order = torch.rand(rows, columns, generator=generator, device=device).argsort(1)
        return (order % alpha).to(torch.uint8)

    if case.structure == BLOCK:
        down, across = -(-n // case.block[0]), -(-k // case.block[1])
        grid = dealt(down, across)
        return grid.repeat_interleave(case.block[0], 0).repeat_interleave(case.block[1], 1)[:n, :k].contiguous()
    if case.structure == TWO_FOUR:
        choice = torch.randint(len(QUADS), (n, -(-k // 4)), generator=generator, device=device)
        return QUADS.to(device, torch.uint8)[choice].flatten(1)[:, :k].contiguous()
    if case.structure == RANDOM:
        return torch.randint(alpha, (n, k), generator=generator, device=device, dtype=torch.uint8)
    host = torch.Generator().manual_seed(generator.initial_seed())
    return fpe.Partition.of(case.structure, n, k, alpha, generator=host).labels.to(device)  # type: ignore[arg-type]


class AbsentError(Exception):
    """A provider cannot run a case; the message says why."""


def dense_layer(weight: Tensor, bias: bool) -> nn.Linear:
    """A linear layer of a weight, its bias zero."""
    outputs, inputs = weight.shape
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=weight.device, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    if bias:
        layer.bias.data.zero_()
    return layer
