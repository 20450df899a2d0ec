"""The partition and block operations against masked dense layers, in every dtype, shape and stride."""

import math

import pytest
import torch
from masked_ops import CASES, OPS, Case, Op, Topology, each_op, forward_and_grads
from support import DTYPES, assert_as_accurate, readable_id, seeded
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

from fpe.kernels import (
    merge_matmul,
    partition_grad,
    split_matmul,
)

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
