"""What the correctness gate asks of the families: one comparison with the eager twin, at awkward small sizes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ((17, 70, 90), (1, 16, 64), (64, 128, 256), (130, 257, 96), (5, 1, 33), (0, 8, 16), (3, 0, 16), (3, 8, 0))
"""``(M, N, K)``: tails, one row, whole tiles, primes, empty ones."""
SPARSE_BACKENDS = ("triton", "sparse_tensor_core", "torch")
"""Backends of what can run as a 2:4 matmul."""

Cast = Callable[[Tensor], Tensor]
"""What a check does to its float64 operands before it computes with them."""
Run = Callable[[Cast, str], list[Tensor]]
"""Computes a check's results from operands that were cast, by a backend."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: Operation or layer, and case.
        family: ``"bitmap"``, ``"partition"``, ``"block"``, ``"semi_structured"`` or ``"mlp"``.
        op: The operation; empty for a layer, which runs several.
        run: See :data:`Run`. With squared operands it gives the squares' sums, as products and sums alone do.
        backends: Those that insist, all of the family.
        by_yardstick: Whether it is more than products and sums.
    """

    name: str
    family: str
    op: str
    run: Run
    backends: tuple[str, ...] = ("triton",)
    by_yardstick: bool = False


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
