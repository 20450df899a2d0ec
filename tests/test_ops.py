"""The partition and block operations against masked dense layers, in every dtype, shape and stride."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import DTYPES, FORMS, assert_as_accurate, changed_fields, convert, readable_id, seeded, strided
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
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
        lambda x, w, t: (x, w, t.labels, None, None, t.alpha, False, "eager"),
        lambda c, t: ((*c.lead, c.k), (c.n, c.k)),
    ),
    Op(
        "merge_matmul",
        lambda z, w, t: merge_matmul(z, w, t.labels),
        _dense_merge,
        lambda z, w, t: kernels.merge_matmul_eager(z, w, t.labels),
        lambda z, w, t: (z, w, t.labels, None, None, True, False, "eager"),
        lambda c, t: ((*c.lead, c.alpha, c.k), (c.n, c.k)),
    ),
    Op(
        "partition_grad",
        lambda dy, x, t: partition_grad(dy, x, t.labels),
        _dense_partition_grad,
        lambda dy, x, t: kernels.partition_grad_eager(dy, x, t.labels),
        lambda dy, x, t: (dy, x, t.labels, False, "eager"),
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


# Values and gradients


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_triad(op: Op, case: Case, dtype: torch.dtype) -> None:
    topology = Topology.of(case)
    operands = op.operands(case, topology, dtype)
    exact = (operands[0].double(), operands[1].double())
    ours = forward_and_grads(op.ours, operands, topology)
    yardstick = forward_and_grads(op.dense, operands, topology)
    truth = forward_and_grads(op.dense, exact, topology)
    for mine, theirs, right in zip(ours, yardstick, truth, strict=True):
        assert_as_accurate(mine, theirs, right)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_public_op_is_its_eager_twin(op: Op, dtype: torch.dtype) -> None:
    topology = Topology.of(Case())
    operands = op.operands(Case(), topology, dtype)
    assert torch.equal(op.ours(*operands, topology), op.twin(*operands, topology))


@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_edges_nobody_owns_get_exactly_zero(case: Case) -> None:
    topology = Topology.of(case)
    x, w = OPS[0].operands(case, topology)
    z, _ = OPS[1].operands(case, topology)
    for call, data in ((OPS[0].ours, x), (OPS[1].ours, z)):
        _, _, dw = forward_and_grads(call, (data, w), topology)
        assert (dw[topology.labels >= case.alpha] == 0).all()
    padding = topology.layout.from_dense(torch.ones(topology.layout.shape)) == 0
    for op in OPS[3:5]:
        _, _, dvalues = forward_and_grads(op.ours, op.operands(case, topology), topology)
        assert (dvalues[padding] == 0).all()
    dvalues = OPS[5].ours(*OPS[5].operands(case, topology), topology)
    assert (dvalues[padding] == 0).all()


@pytest.mark.parametrize("op", OPS[3:5], ids=readable_id)
def test_what_stands_in_the_padding_is_not_read(op: Op) -> None:
    topology = Topology.of(Case())
    data, values = op.operands(Case(), topology)
    padding = topology.layout.from_dense(torch.ones(topology.layout.shape)) == 0
    assert padding.any()
    clean, dirty = values.masked_fill(padding, 0), values.masked_fill(padding, 1e6)
    assert torch.equal(op.ours(data, clean, topology), op.ours(data, dirty, topology))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_stands_at_a_hole_is_not_read(value: float) -> None:
    topology = Topology.of(Case())
    for op in OPS[:2]:
        data, w = op.operands(Case(), topology)
        dirty = w.masked_fill(topology.labels >= topology.alpha, value)
        assert torch.equal(op.ours(data, w, topology), op.ours(data, dirty, topology))


@each_op
def test_gradcheck(op: Op) -> None:
    case = Case(lead=(3,), n=4, k=5, alpha=3, block=(2, 3))
    topology = Topology.of(case)
    operands = tuple(t.requires_grad_() for t in op.operands(case, topology))
    assert gradcheck(lambda a, b: op.ours(a, b, topology), operands)
    assert gradgradcheck(lambda a, b: op.ours(a, b, topology), operands)


# Identities


@pytest.mark.parametrize("alpha", [2, 3, 4, 8])
def test_children_sum_to_the_dense_parent(alpha: int) -> None:
    labels = torch.randint(alpha, (7, 13), generator=seeded(0)).to(torch.uint8)
    x, w = (torch.randint(-9, 10, (size, 13), generator=seeded(size)).double() for size in (5, 7))
    assert torch.equal(split_matmul(x, w, labels, alpha).sum(-2), linear(x, w))


@pytest.mark.parametrize("alpha", [2, 3, 4, 8])
def test_merge_reads_back_what_split_of_the_transpose_sends(alpha: int) -> None:
    """``<z, split(x, w)> == <x, merge(z, w.T)>``: each is the other's adjoint."""
    labels = torch.randint(alpha, (7, 13), generator=seeded(0)).to(torch.uint8)
    x = torch.randint(-9, 10, (5, 13), generator=seeded(1)).double()
    w = torch.randint(-9, 10, (7, 13), generator=seeded(2)).double()
    z = torch.randint(-9, 10, (5, alpha, 7), generator=seeded(3)).double()
    through_split = (z * split_matmul(x, w, labels, alpha)).sum()
    assert torch.equal(through_split, (x * merge_matmul(z, w.T, labels.T)).sum())
    assert torch.equal(through_split, (w * partition_grad(z, x, labels)).sum())


def test_merge_of_equal_children_is_the_dense_layer() -> None:
    labels = torch.randint(3, (7, 13), generator=seeded(0)).to(torch.uint8)
    x, w = (torch.randint(-9, 10, (size, 13), generator=seeded(size)).double() for size in (5, 7))
    assert torch.equal(merge_matmul(x[:, None].expand(5, 3, 13), w, labels), linear(x, w))


# Autograd, torch.library, torch.compile, autocast


@each_op
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=["first", "second", "none"])
def test_only_what_a_wanted_gradient_needs_is_saved(op: Op, wanted: tuple[bool, bool]) -> None:
    topology = Topology.of(Case())
    operands = tuple(t.requires_grad_(w) for t, w in zip(op.operands(Case(), topology), wanted, strict=True))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = op.ours(*operands, topology)
    kept = [any(t.data_ptr() == operand.data_ptr() for t in saved) for operand in operands]
    assert kept == [wanted[1], wanted[0]]
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.sum().backward()
    assert [operand.grad is not None for operand in operands] == list(wanted)


@each_op
def test_inputs_are_not_mutated(op: Op) -> None:
    topology = Topology.of(Case())
    operands = op.operands(Case(), topology)
    inputs = [*operands, topology.labels, *topology.layout.tensors]
    before = [t.clone() for t in inputs]
    forward_and_grads(op.ours, operands, topology)
    for t, copy in zip(inputs, before, strict=True):
        assert torch.equal(t, copy)


@each_op
@pytest.mark.parametrize("form", FORMS[:2])
def test_opcheck(op: Op, form: str) -> None:
    case = Case(form=form)
    topology = Topology.of(case)
    operands = tuple(t.requires_grad_() for t in op.operands(case, topology, torch.float32))
    torch.library.opcheck(op.registered, op.raw(*operands, topology))


def check_compiled(op: Op, backend: str, case: Case) -> None:
    topology = Topology.of(case)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(op.ours, backend=counter, fullgraph=True, dynamic=True)
    for rows in (6, 9):
        sized = Case(lead=(rows,), n=case.n, k=case.k, alpha=case.alpha, block=case.block, form=case.form)
        operands = op.operands(sized, topology, torch.float32)
        got, wanted = (forward_and_grads(call, operands, topology) for call in (compiled, op.ours))
        for mine, right in zip(got, wanted, strict=True):
            assert torch.equal(mine, right)
    assert counter.frame_count == 1


@each_op
@pytest.mark.parametrize("form", FORMS[:2])
def test_compiles_whole_with_dynamic_batch(op: Op, form: str) -> None:
    check_compiled(op, "aot_eager", Case(form=form))


@pytest.mark.parametrize("op", [OPS[1], OPS[3]], ids=readable_id)
def test_compiles_with_inductor(op: Op) -> None:
    check_compiled(op, "inductor", Case())


@each_op
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_operands(op: Op) -> None:
    topology = Topology.of(Case())
    operands = op.operands(Case(), topology, torch.float32)
    low = tuple(t.to(torch.bfloat16) for t in operands)
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = forward_and_grads(op.ours, operands, topology)
        mixed = op.ours(low[0], operands[1], topology)
        double = op.ours(*(t.double() for t in operands), topology)
    wanted, *low_grads = forward_and_grads(op.ours, low, topology)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wanted)
    assert torch.equal(mixed, wanted)
    assert double.dtype == torch.float64
    for mine, right in zip(grads, low_grads, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, right.float())
