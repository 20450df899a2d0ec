"""A bias is added before a 16-bit result is rounded: every operation, backend, batch shape and activation."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from every_op import ACTIVATIONS, WITH_EPILOGUE, Case, Maker, Problem
from support import assert_as_accurate, readable_id, seeded
from torch.nn.functional import linear

import fpe
from fpe.bench import accuracy

CASES = tuple(
    Case(op, backend, dtype, lead, n=n, k=k, alpha=alpha, block=(16, 32), bias=True, holes=0.2)
    for (op, alpha), backend, dtype, (lead, n, k) in product(
        (
            ("split_matmul", 3),
            ("merge_matmul", 2),
            ("block_matmul", 2),
            ("semi_structured_matmul", 1),
            ("semi_structured_matmul", 2),
        ),
        ("eager", "triton"),
        (torch.float16, torch.bfloat16),
        (((), 33, 64), ((3,), 64, 33), ((3, 1), 16, 260)),
    )
)
each_case = pytest.mark.parametrize("case", CASES, ids=readable_id)


def problem_of(case: Case) -> Problem:
    """With normal numbers, and a bias as large as the sums that it joins."""
    made = Maker(case).problem()
    normal = [torch.randn(t.shape, generator=seeded(i)) for i, t in enumerate(made.operands)]
    normal[2] *= case.k**0.5
    return replace(made, operands=tuple(t.to(case.dtype) for t in normal))


@each_case
def test_one_rounding(case: Case) -> None:
    problem = problem_of(case)
    expected = accuracy.expected(partial(problem.dense, *problem.operands))
    assert accuracy.excess(problem.ours(*problem.operands), *expected, accuracy.dtype_name(case.dtype)) <= 1


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
@pytest.mark.parametrize("case", [c for c in CASES if c.op in WITH_EPILOGUE and c.lead == (3,)], ids=readable_id)
def test_as_accurate_as_pytorchs_layer_with_an_activation(case: Case, activation: str) -> None:
    problem = problem_of(replace(case, activation=activation))
    truth = problem.dense(*(t.double() for t in problem.operands))
    assert_as_accurate(problem.ours(*problem.operands), problem.dense(*problem.operands), truth)


@pytest.mark.parametrize("case", [c for c in CASES if c.lead == (3,)], ids=readable_id)
def test_the_gradient_of_a_bias(case: Case) -> None:
    problem = problem_of(replace(case, dtype=torch.float32))
    leaves = [t.requires_grad_() for t in problem.operands]
    ours, dense = (torch.autograd.grad(f(*leaves).square().sum(), leaves[2])[0] for f in (problem.ours, problem.dense))
    torch.testing.assert_close(ours, dense)


def _two_to_four() -> fpe.SplitLinear:
    return fpe.SplitLinear(fpe.Partition.semi_structured(33, 64, generator=seeded()), backend="triton")


def _ragged_planes() -> fpe.BlockLinear:
    kept = torch.rand(66, 64, generator=seeded()) < 0.7
    return fpe.BlockLinear(kept, (16, 16), planes=(2, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=readable_id)
@pytest.mark.parametrize("make", [_two_to_four, _ragged_planes], ids=["2:4", "ragged-planes"])
@torch.no_grad()
def test_layers_that_give_their_bias_to_an_operation(make: Callable[[], Any], dtype: torch.dtype) -> None:
    layer = make().to(dtype)
    torch.nn.init.normal_(layer.bias, std=5, generator=seeded(1))
    x = torch.randn(7, 64, generator=seeded(2)).to(dtype)
    expected = accuracy.expected(partial(linear, x, layer.wide_weight(), layer.bias))
    assert accuracy.excess(layer(x), *expected, accuracy.dtype_name(dtype)) <= 1
