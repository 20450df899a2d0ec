"""Random calls of every operation, exactly equal to float64 on dense masked weights: values and derivatives.

A few hundred cases run with the suite, the same every time; ``--fuzz N`` runs N of each kind, ``--fuzz-seed S`` others.
"""

import random
from typing import Any

import pytest
import torch
from every_op import FORMS, OPS, WITH_BIAS, WITH_EPILOGUE, Case, Function, Maker
from support import readable_id, seeded
from torch import Tensor
from torch.autograd import forward_ad

SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17)
LEADS = ((), (0,), (1,), (2,), (5,), (9,), (2, 3), (1, 1, 4), (2, 0, 3))
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
DTYPES = {
    "eager": (torch.float64, torch.float64, torch.float32, *SIXTEEN_BITS),
    "triton": (torch.float32, *SIXTEEN_BITS),
}
SHARE = {"eager": 4, "triton": 1}
"""Cases of each operation and backend, over those of the slower one: the interpreter takes most of the time."""

SIXTEEN, THIRTY_TWO = {"dtype": torch.float16}, {"dtype": torch.float32}
FOUND = (
    Case("partition_grad", "triton", **THIRTY_TWO, labels="packed"),
    Case("partition_grad", "triton", **THIRTY_TWO, labels="turned"),
    Case("split_matmul", "triton", **THIRTY_TWO, labels="packed"),
    Case("merge_matmul", "triton", **THIRTY_TWO, labels="turned"),
    *(Case(op, "triton", **SIXTEEN, k=0) for op in OPS if not op.startswith("block")),
    Case("semi_structured_matmul", "triton", **THIRTY_TWO, k=0, bias=True),
    Case("split_matmul", "triton", **SIXTEEN, n=8, k=1, labels="turned", form="shifted"),
    Case("split_matmul", "triton", **SIXTEEN, n=1, labels="packed", form="reversed"),
    Case("merge_matmul", "triton", **SIXTEEN, n=1, labels="packed", form="reversed"),
    Case("expanded_mlp", "triton", **SIXTEEN, n=1, outputs=1, merged=True, labels="packed", form="reversed"),
    Case("expanded_mlp", "triton", **SIXTEEN, n=16, outputs=1, merged=True, labels="packed", form="reversed"),
)
"""What failed once, small: second derivatives and tangents at holes, and views of what is one element or none."""


def draw(op: str, backend: str, number: int, seed: int) -> Case:
    """The case of a number: the same on every machine and in every process."""
    r = random.Random(f"{op} {backend} {number} {seed}")
    family = op.split("_")[0]
    more: dict[str, Any] = {}
    if family == "block":
        sides = (16, 32) if backend == "triton" else (1, 2, 3, 4, 8, 16)
        more["block"] = r.choice(sides), r.choice(sides)
    elif family == "semi":
        more["alpha"] = r.choice((1, 2))
    else:
        more["alpha"] = r.choice((1, 2, 2, 3, 4, 5, 8))
        more["labels"] = r.choice(("plain", "packed", "turned"))
    if op == "expanded_mlp":
        more["outputs"], more["merged"] = r.choice(SIZES), r.random() < 0.5
    if op in WITH_BIAS:
        more["bias"] = r.random() < 0.5
    if op in WITH_EPILOGUE:
        more["activation"] = r.choice((None, "relu"))
    dtypes = DTYPES[backend] if (op, backend) != ("expanded_mlp", "triton") else SIXTEEN_BITS
    return Case(
        op,
        backend,
        r.choice(dtypes),
        r.choice(LEADS),
        r.choice(SIZES),
        r.choice((*SIZES, 33)),
        holes=r.choice((0.0, 0.3, 0.3, 1.0)),
        form=r.choice(tuple(FORMS)),
        seed=number,
        **more,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    count, seed = option("--fuzz"), option("--fuzz-seed")
    cases = [draw(op, b, i, seed) for op in OPS for b, share in SHARE.items() for i in range(share * count)]
    metafunc.parametrize("case", (*FOUND, *cases), ids=readable_id)


def weights_like(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Minus one, zero and one, of given shapes and types."""
    return tuple(torch.randint(-1, 2, t.shape, generator=seeded(seed + i)).to(t.dtype) for i, t in enumerate(tensors))


def derivatives(f: Function, operands: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    """The result, its gradients, the gradients of a sum of these, and its tangent."""
    leaves = tuple(t.detach().requires_grad_() for t in operands)
    y = f(*leaves)
    dy = weights_like((y,), 1)[0].requires_grad_()
    grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
    found: dict[str, Tensor | None] = {"y": y, **{f"grad{i}": g for i, g in enumerate(grads)}}
    total = sum((g * d).sum() for g, d in zip(grads, weights_like(grads, 11), strict=True))
    assert isinstance(total, Tensor)
    second = torch.autograd.grad(total, (*leaves, dy), allow_unused=True)
    found |= {f"second{i}": g for i, g in enumerate(second)}
    with forward_ad.dual_level():
        each = (
            t.contiguous() if 0 in t.stride() else t for t in operands
        )  # PyTorch has no tangents of expanded tensors
        duals = (forward_ad.make_dual(t, d) for t, d in zip(each, weights_like(operands, 21), strict=True))
        found["tangent"] = forward_ad.unpack_dual(f(*duals)).tangent
    return found


def values_only(f: Function, operands: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    return {"y": f(*operands)}


@pytest.mark.usefixtures("poisoned")
def test_random_call(case: Case) -> None:
    problem = Maker(case).problem()
    # One launch of a whole MLP has no gradient; everything else has all.
    of: Any = values_only if (case.op, case.backend) == ("expanded_mlp", "triton") else derivatives
    ours = of(problem.ours, problem.operands)
    truth = of(problem.dense, tuple(t.double() for t in problem.operands))
    for name, right in truth.items():
        mine = ours[name]
        if right is None or mine is None:
            assert all(t is None or not t.any() for t in (mine, right)), name
            continue
        assert mine.dtype == case.dtype, name
        assert torch.equal(mine, right.to(case.dtype)), name
