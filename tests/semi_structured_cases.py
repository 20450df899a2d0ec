"""What the tests of the 2:4 layout and of its operations share: shapes of parents, their labels and tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import changed_fields, readable_id, seeded
from torch import Tensor
from torch.nn.functional import linear

from fpe import Partition
from fpe.kernels import (
    HOLE,
    SemiStructuredLayout,
    semi_structured_grad,
    semi_structured_matmul,
    semi_structured_matmul_t,
)


@dataclass(frozen=True)
class Case:
    """A parent ``[n, k]``, its children, how many edges are gone, and a batch."""

    m: int = 5
    n: int = 7
    k: int = 24
    children: int = 2
    holes: float = 0.0

    @property
    def id(self) -> str:
        return changed_fields(self) or "default"

    def labels(self) -> Tensor:
        """2:4, ``HOLE`` where an edge is gone; rows of one kind at the top: none gone, all gone."""
        full = Partition.semi_structured(max(self.n, 1), max(self.k + -self.k % 4, 4), generator=seeded(1)).labels
        labels = full[: self.n, : self.k].clone()
        gone = torch.rand(labels.shape, generator=seeded(2)) < self.holes
        gone[:1] = False
        if self.holes:
            gone[1:2] = True
        return labels.masked_fill(gone, HOLE)

    def masks(self) -> Tensor:
        """``[children, n, k]``."""
        return self.labels() == torch.arange(self.children, dtype=torch.uint8)[:, None, None]

    def layout(self) -> SemiStructuredLayout:
        if self.children == 2:
            return SemiStructuredLayout.from_labels(self.labels())
        return SemiStructuredLayout.from_mask(self.masks()[0])

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """A parent's weight, activations and the gradient of the result."""
        shapes = ((self.n, self.k), (self.m, self.k), (self.m, self.children, self.n))
        return tuple(torch.randn(s, dtype=torch.float64, generator=seeded(3)).to(dtype) for s in shapes)  # type: ignore[return-value]


CASES = (
    Case(),
    Case(children=1),
    Case(m=17, n=70, k=132, holes=0.3),
    Case(m=33, n=33, k=203, holes=0.3),
    Case(m=1, n=130, k=67, children=1, holes=0.3),
    Case(m=1, n=1, k=1),
    Case(m=3, n=2, k=2, children=1),
    Case(m=0),
    Case(n=0),
    Case(k=0),
)
each_case = pytest.mark.parametrize("case", CASES, ids=readable_id)


Call = Callable[[Tensor, Tensor, SemiStructuredLayout, str], Tensor]
OPS: dict[str, Call] = {
    "forward": lambda x, v, layout, b: semi_structured_matmul(x, v, layout, backend=b),
    "dx": lambda dy, v, layout, b: semi_structured_matmul_t(dy, v, layout, backend=b),
    "dw": lambda dy, x, layout, b: semi_structured_grad(dy, x, layout, backend=b),
}
DENSE: dict[str, Callable[[Tensor, Tensor, SemiStructuredLayout], Tensor]] = {
    "forward": lambda x, v, layout: linear(x, layout.to_dense(v).flatten(0, 1)).unflatten(-1, layout.values_shape[:2]),
    "dx": lambda dy, v, layout: linear(dy.flatten(1), layout.to_dense(v).flatten(0, 1).T),
    "dw": lambda dy, x, layout: layout.from_dense((dy.flatten(1).T @ x).unflatten(0, layout.values_shape[:2])),
}
each_op = pytest.mark.parametrize("op", OPS)


def operands(op: str, case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    w, x, dy = case.tensors(dtype)
    values = case.layout().from_dense(w)
    return {"forward": (x, values), "dx": (dy, values), "dw": (dy, x)}[op]
