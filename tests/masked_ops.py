"""The partition and block operations beside the same on masked dense weights, and problems for both."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import FORMS, changed_fields, convert, readable_id, seeded, strided
from torch import Tensor
from torch.nn.functional import linear

from fpe import kernels
from fpe.kernels import (
    HOLE,
    BlockLayout,
    block_grad,
    block_matmul,
    block_matmul_t,
    merge_matmul,
    partition_grad,
    split_matmul,
)


@dataclass(frozen=True)
class Case:
    """A problem size: activations ``[*lead, ...]``, parent ``[n, k]``."""

    lead: tuple[int, ...] = (5,)
    n: int = 7
    k: int = 11
    alpha: int = 2
    block: tuple[int, int] = (3, 4)
    labels: str = "holes"
    form: str = "contiguous"

    @property
    def id(self) -> str:
        return changed_fields(self) or "primes"


SIZES = (
    Case(),
    Case(labels="full"),
    Case(lead=(1,), n=1, k=1, block=(1, 1)),
    Case(lead=(0,)),
    Case(n=0),
    Case(k=0),
    Case(lead=(0,), n=0, k=0),
    Case(lead=()),
    Case(lead=(2, 1, 3), n=13, k=17, alpha=3),
    Case(lead=(2, 0)),
    Case(lead=(31,), n=64, k=128, alpha=4, block=(16, 32)),
    Case(lead=(3,), n=19, k=37, alpha=8, block=(5, 5)),
    Case(n=23, k=29, alpha=1, block=(64, 64)),
    Case(labels="none"),
)
STRIDES = tuple(Case(lead=(6,), n=8, k=12, alpha=3, form=form) for form in FORMS[1:])
CASES = SIZES + STRIDES


@dataclass(frozen=True)
class Topology:
    """Which edges exist, for both families."""

    labels: Tensor
    alpha: int
    layout: BlockLayout

    @classmethod
    def of(cls, case: Case) -> "Topology":
        generator = seeded(1)
        labels = torch.randint(case.alpha, (case.n, case.k), generator=generator).to(torch.uint8)
        mask = torch.rand(kernels.block.layout.grid((case.n, case.k), case.block), generator=generator) < 0.5
        if case.labels != "full":
            pruned = torch.rand(labels.shape, generator=generator) < (0.3 if case.labels == "holes" else 2.0)
            labels[pruned] = torch.tensor([HOLE, case.alpha], dtype=torch.uint8)[torch.arange(int(pruned.sum())) % 2]
        labels[:1], labels[1:2] = HOLE, 0  # a parent without edges, and one with a single child
        mask[:1], mask[1:2] = False, True  # an empty and a full row of blocks
        mask[2:, :1], mask[2:, -1:] = False, True  # and nearly so columns
        mask &= case.labels != "none"
        if case.form == "transposed":
            labels = labels.T.contiguous().T
        elif case.form == "expanded":
            labels = labels[1:2].expand(labels.shape)
        return cls(labels, case.alpha, BlockLayout.from_mask(mask, (case.n, case.k), case.block))

    @property
    def masks(self) -> Tensor:
        """``[alpha, n, k]``."""
        return self.labels == torch.arange(self.alpha, dtype=torch.uint8)[:, None, None]


Call = Callable[[Tensor, Tensor, Topology], Any]


@dataclass(frozen=True)
class Op:
    """An operation, the same on masked dense weights, and how to call its parts."""

    name: str
    ours: Call
    dense: Call
    twin: Call
    raw: Call
    shapes: Callable[[Case, Topology], tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def id(self) -> str:
        return self.name

    @property
    def registered(self) -> Any:
        return getattr(torch.ops.fpe, self.name).default

    def operands(self, case: Case, topology: Topology, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        generator = seeded(2)
        first, second = (strided(shape, case.form, generator) for shape in self.shapes(case, topology))
        return convert(first, dtype), convert(second, dtype)


def _rows(t: Tensor, features: int) -> Tensor:
    """Leading dimensions as one, the last ``features`` as they are; sizes may be zero."""
    return t.reshape(math.prod(t.shape[:-features]), *t.shape[-features:])


def _dense_split(x: Tensor, w: Tensor, t: Topology) -> Tensor:
    return linear(x, (w * t.masks).flatten(0, 1)).unflatten(-1, (t.alpha, w.shape[0]))


def _dense_merge(z: Tensor, w: Tensor, t: Topology) -> Tensor:
    return linear(z.flatten(-2), (w * t.masks).transpose(0, 1).flatten(1))


def _dense_partition_grad(dy: Tensor, x: Tensor, t: Topology) -> Tensor:
    wide = _rows(dy, 2).flatten(1).T @ _rows(x, 1)
    return (wide.view(t.masks.shape) * t.masks).sum(0)


OPS = (
    Op(
        "split_matmul",
        lambda x, w, t: split_matmul(x, w, t.labels, t.alpha),
        _dense_split,
        lambda x, w, t: kernels.split_matmul_eager(x, w, t.labels, t.alpha),
        lambda x, w, t: (x, w, t.labels, [], None, None, t.alpha, False, "eager"),
        lambda c, t: ((*c.lead, c.k), (c.n, c.k)),
    ),
    Op(
        "merge_matmul",
        lambda z, w, t: merge_matmul(z, w, t.labels),
        _dense_merge,
        lambda z, w, t: kernels.merge_matmul_eager(z, w, t.labels),
        lambda z, w, t: (z, w, t.labels, [], None, None, True, False, "eager"),
        lambda c, t: ((*c.lead, c.alpha, c.k), (c.n, c.k)),
    ),
    Op(
        "partition_grad",
        lambda dy, x, t: partition_grad(dy, x, t.labels),
        _dense_partition_grad,
        lambda dy, x, t: kernels.partition_grad_eager(dy, x, t.labels),
        lambda dy, x, t: (dy, x, t.labels, [], False, "eager"),
        lambda c, t: ((*c.lead, c.alpha, c.n), (*c.lead, c.k)),
    ),
    Op(
        "block_matmul",
        lambda x, v, t: block_matmul(x, v, t.layout),
        lambda x, v, t: linear(x, t.layout.to_dense(v)),
        lambda x, v, t: kernels.block_matmul_eager(x, v, t.layout),
        lambda x, v, t: (x, v, *t.layout.tensors, None, None, *t.layout.shape, "eager"),
        lambda c, t: ((*c.lead, c.k), t.layout.values_shape),
    ),
    Op(
        "block_matmul_t",
        lambda dy, v, t: block_matmul_t(dy, v, t.layout),
        lambda dy, v, t: linear(dy, t.layout.to_dense(v).T),
        lambda dy, v, t: kernels.block_matmul_t_eager(dy, v, t.layout),
        lambda dy, v, t: (dy, v, *t.layout.tensors, *t.layout.shape, "eager"),
        lambda c, t: ((*c.lead, c.n), t.layout.values_shape),
    ),
    Op(
        "block_grad",
        lambda dy, x, t: block_grad(dy, x, t.layout),
        lambda dy, x, t: t.layout.from_dense(_rows(dy, 1).T @ _rows(x, 1)),
        lambda dy, x, t: kernels.block_grad_eager(dy, x, t.layout),
        lambda dy, x, t: (dy, x, *t.layout.tensors, *t.layout.block, "eager"),
        lambda c, t: ((*c.lead, c.n), (*c.lead, c.k)),
    ),
)
each_op = pytest.mark.parametrize("op", OPS, ids=readable_id)


def forward_and_grads(call: Call, operands: tuple[Tensor, Tensor], topology: Topology) -> tuple[Tensor, ...]:
    """The result, and the gradients of both operands for a fixed random cotangent."""
    first, second = (t.detach().requires_grad_() for t in operands)
    y = call(first, second, topology)
    cotangent = convert(strided(tuple(y.shape), "contiguous", seeded(3)), y.dtype)
    return y, *torch.autograd.grad(y, (first, second), cotangent)
