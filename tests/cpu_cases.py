"""Products of weights as CPUs have them stored, for the tests of the kernels that Numba compiles."""

from dataclasses import dataclass

import pytest
import torch
from support import changed_fields, guarded, seeded
from torch import Tensor

from fpe.kernels import (
    HOLE,
    PackedLabels,
    cpu,
    merge_matmul,
    merge_matmul_eager,
    split_matmul,
    split_matmul_eager,
)

needs_numba = pytest.mark.skipif(not cpu.numba_installed(), reason="Numba is not installed")


@dataclass(frozen=True)
class Case:
    """A product with a weight ``[n, k]`` as it is stored; ``turned`` takes its transpose."""

    merge: bool = False
    alpha: int = 2
    m: int = 1
    dtype: torch.dtype = torch.float32
    turned: bool = False
    n: int = 37
    k: int = 300
    plain: bool = False
    activation: str | None = None

    @property
    def id(self) -> str:
        return changed_fields(self) or "default"

    def operands(self) -> tuple[Tensor, Tensor, Tensor | PackedLabels, Tensor]:
        """Activations, weight and labels as the operation takes them, and a bias."""
        table = torch.randint(self.alpha + 1, (self.n, self.k), generator=seeded(1)).to(torch.uint8)
        table[table == self.alpha] = HOLE
        w = guarded(self.n, self.k, seed=2) * (table != HOLE)
        labels: Tensor | PackedLabels = table if self.plain else PackedLabels.pack(table, self.alpha)
        if self.turned:
            w, labels = w.T, labels.T
        n, k = w.shape
        x = torch.randn(*((self.m, self.alpha, k) if self.merge else (self.m, k)), generator=seeded(3)).double()
        bias = torch.randn(*((n,) if self.merge else (self.alpha, n)), generator=seeded(4)).double()
        return x.to(self.dtype), w.to(self.dtype), labels, bias.to(self.dtype)

    def ours(self) -> Tensor:
        x, w, labels, bias = self.operands()
        if self.merge:
            return merge_matmul(x, w, labels, bias, self.activation, backend="cpu")
        return split_matmul(x, w, labels, self.alpha, bias, self.activation, backend="cpu")

    def twin(self, dtype: torch.dtype) -> Tensor:
        x, w, labels, bias = self.operands()
        x, w, bias = (t.to(dtype) for t in (x, w, bias))
        if self.merge:
            return merge_matmul_eager(x, w, labels, bias, self.activation)
        return split_matmul_eager(x, w, labels, self.alpha, bias, self.activation)
