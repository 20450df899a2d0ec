"""The kernels that Numba compiles for CPUs: against float64 truth, in autograd and compiled, and without Numba."""

import subprocess
import sys

import pytest
import torch
from cpu_cases import Case, needs_numba
from support import ROOT, assert_as_accurate, readable_id, seeded

from fpe.kernels import (
    BlockLayout,
    PackedLabels,
    UnsupportedError,
    block_matmul,
    block_matmul_eager,
    block_matmul_t,
    block_matmul_t_eager,
    split_matmul,
    split_matmul_eager,
)

CASES = (
    Case(),
    Case(alpha=3, m=5, turned=True),
    Case(merge=True, alpha=8, m=2),
    Case(merge=True, turned=True),
    Case(alpha=4, dtype=torch.bfloat16, activation="gelu"),
    Case(merge=True, m=5, dtype=torch.bfloat16, turned=True),
    Case(m=2, dtype=torch.float16, turned=True),
    Case(merge=True, alpha=5, dtype=torch.float16),
    Case(n=3, k=7),
    Case(n=50, k=2176, activation="relu"),
    Case(plain=True),
    Case(alpha=3, m=5, turned=True, n=1, k=128),
)
LABELS = CASES[0]


@needs_numba
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_triad(case: Case) -> None:
    assert_as_accurate(case.ours(), case.twin(case.dtype), case.twin(torch.float64))


@needs_numba
@pytest.mark.parametrize("size", [0, 1, 2], ids=["m", "n", "k"])
def test_nothing_to_multiply(size: int) -> None:
    sizes = [2, 3, 4]
    sizes[size] = 0
    case = Case(m=sizes[0], n=sizes[1], k=sizes[2])
    assert torch.equal(case.ours(), case.twin(torch.float32))


@needs_numba
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_with_its_child(value: float) -> None:
    x, w, labels, _ = LABELS.operands()
    assert isinstance(labels, PackedLabels)
    n, k = (labels.unpack() < 2).nonzero()[77].tolist()
    w[n, k] = value
    y = split_matmul(x, w, labels, 2, backend="cpu")
    expected = split_matmul_eager(x, w, labels, 2)
    assert torch.equal(y.isfinite(), expected.isfinite()) and int((~y.isfinite()).sum()) == 1


@needs_numba
@pytest.mark.parametrize(
    ("shape", "block", "m", "dtype"),
    [
        ((33, 30), (7, 8), 1, torch.float32),
        ((20, 170), (5, 80), 2, torch.float16),
        ((65, 200), (16, 64), 5, torch.float32),
        ((33, 40), (5, 16), 1, torch.bfloat16),
    ],
    ids=str,
)
def test_blocks(shape: tuple[int, int], block: tuple[int, int], m: int, dtype: torch.dtype) -> None:
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    layout = BlockLayout.from_mask(torch.rand(grid, generator=seeded()) > 0.4, shape, block)
    values = torch.randn(layout.values_shape, generator=seeded(1)).to(dtype)
    x, dy = (torch.randn(m, size, generator=seeded(2)).to(dtype) for size in (shape[1], shape[0]))
    for ours, twin, data in (
        (block_matmul, block_matmul_eager, x),
        (block_matmul_t, block_matmul_t_eager, dy),
    ):
        mine = ours(data, values, layout, backend="cpu")
        assert_as_accurate(mine, twin(data, values, layout), twin(data.double(), values.double(), layout))


@needs_numba
def test_gradients_are_those_of_the_twin() -> None:
    x, w, labels, bias = LABELS.operands()
    grads = []
    for backend, dtype in (("cpu", x.dtype), ("eager", x.dtype), ("eager", torch.float64)):
        own = [t.detach().to(dtype).requires_grad_() for t in (x, w, bias)]
        y = split_matmul(own[0], own[1], labels, 2, own[2], backend=backend)
        grads.append(torch.autograd.grad(y.square().sum(), own))
    for ours, twins, truth in zip(*grads, strict=True):
        assert_as_accurate(ours, twins, truth)


@needs_numba
def test_a_compiled_call_is_the_same() -> None:
    x, w, labels, bias = LABELS.operands()
    torch._dynamo.reset()
    call = torch.compile(
        lambda x: split_matmul(x, w, labels, 2, bias, backend="cpu"), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(call(x), LABELS.ours())


@needs_numba
def test_what_it_does_not_take() -> None:
    x, w, labels, _ = LABELS.operands()
    with pytest.raises(UnsupportedError, match="it takes float16, bfloat16 and float32, got"):
        split_matmul(x.double(), w.double(), labels, 2, backend="cpu")
    with pytest.raises(UnsupportedError, match="it takes up to 8 children, got 9"):
        split_matmul(x, w, torch.zeros(w.shape, dtype=torch.uint8), 9, backend="cpu")
    with pytest.raises(UnsupportedError, match="it needs tensors on a CPU, they are on meta"):
        split_matmul(x.to("meta"), w.to("meta"), labels, 2, backend="cpu")


WITHOUT = """
import sys
sys.modules["numba"] = None  # as Python has a module that cannot be imported
import torch
from fpe.kernels import UnsupportedError, split_matmul, split_matmul_eager
x, w, labels = torch.ones(1, 2048), torch.ones(2048, 2048), torch.zeros(2048, 2048, dtype=torch.uint8)
assert torch.equal(split_matmul(x, w, labels, 2), split_matmul_eager(x, w, labels, 2))
try:
    split_matmul(x, w, labels, 2, backend="cpu")
except UnsupportedError as error:
    print(error)
"""


def test_without_numba_the_twin_serves_and_the_backend_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT / "tests", capture_output=True, text=True, check=True
    )
    assert "'cpu' cannot run here: Numba is not installed; pip install 'fixed-parameter-expansion[cpu]'" in done.stdout
