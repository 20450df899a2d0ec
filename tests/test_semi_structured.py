"""The operations on the 2:4 layout, on every backend that runs without a GPU."""

from unittest.mock import patch

import pytest
import torch
from semi_structured_cases import DENSE, OPS, Case, each_case, each_op, operands
from support import DTYPES, assert_as_accurate, readable_id, seeded
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fpe.bench.lab import sanitize
from fpe.kernels import (
    semi_structured_compress,
    semi_structured_grad,
    semi_structured_matmul,
)
from fpe.kernels.device import KNOWN
from fpe.kernels.semi_structured import quads
from fpe.kernels.semi_structured import triton as products
from fpe.kernels.semi_structured.config import Config

# The operations.

BY_KERNEL = (torch.float32, torch.float16, torch.bfloat16)
TRITON_KERNELS = (
    *((products, name) for name in ("_multiply", "_multiply_t", "_outer")),
    *((quads, name) for name in ("_compress", "_spread")),
)


@pytest.mark.parametrize("case", [Case(), Case(m=19, n=70, k=91, children=1), Case(m=3, n=20, k=300)], ids=readable_id)
def test_no_access_leaves_a_tensor_and_no_programs_race(case: Case) -> None:
    layout, (w, x, dy) = case.layout(), case.tensors(torch.float16)
    values, apart = layout.from_dense(w), torch.ones(case.m, case.k + 5, dtype=torch.float16)[:, : case.k].copy_(x)
    for run in (
        lambda: products.semi_structured_matmul_triton(apart, values, layout),
        lambda: products.semi_structured_matmul_t_triton(dy, values, layout),
        lambda: products.semi_structured_grad_triton(dy, apart, layout),
        lambda: quads.semi_structured_compress_triton(w, layout),
        lambda: quads.semi_structured_expand_triton(values, layout),
    ):
        assert sanitize.check(TRITON_KERNELS, run) == []


def as_double(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].double(), pair[1].double()


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@each_case
def test_the_eager_twin_is_the_masked_dense_product(case: Case, dtype: torch.dtype, op: str) -> None:
    pair, layout = operands(op, case, dtype), case.layout()
    truth = DENSE[op](*as_double(pair), layout)
    assert_as_accurate(OPS[op](*pair, layout, "eager"), DENSE[op](*pair, layout), truth)


@pytest.mark.usefixtures("poisoned")
@each_op
@pytest.mark.parametrize("dtype", BY_KERNEL, ids=readable_id)
@each_case
def test_the_triton_kernels_are_as_accurate(case: Case, dtype: torch.dtype, op: str) -> None:
    pair, layout = operands(op, case, dtype), case.layout()
    pair = tuple(_guarded(t) for t in pair)  # type: ignore[assignment]
    ours, eager = (OPS[op](*pair, layout, backend) for backend in ("triton", "eager"))
    assert_as_accurate(ours, eager, DENSE[op](*as_double(pair), layout))


@pytest.mark.usefixtures("poisoned")
@each_case
def test_the_turned_product_is_as_accurate(case: Case) -> None:
    """What runs where a computed weight must be the right operand."""
    pair, layout = operands("forward", case, torch.float16), case.layout()
    pair = tuple(_guarded(t) for t in pair)  # type: ignore[assignment]
    with patch("fpe.kernels.semi_structured.triton.device_of", return_value=KNOWN[90]):
        ours = OPS["forward"](*pair, layout, "triton")
    assert_as_accurate(ours, OPS["forward"](*pair, layout, "eager"), DENSE["forward"](*as_double(pair), layout))


def _guarded(t: Tensor) -> Tensor:
    """The same inside a buffer of NaN, where the last dimension stays contiguous."""
    buffer = t.new_full([size + 4 for size in t.shape], float("nan"))
    inner = buffer[tuple(slice(2, 2 + size) for size in t.shape)]
    return inner.copy_(t)


CONFIGS = (
    Config(block_m=16, block_n=16, block_k=32, split=1, group=1, num_warps=4, num_stages=2),
    Config(block_m=32, block_n=32, block_k=64, split=2, group=2, num_warps=4, num_stages=3),
    Config(block_m=64, block_n=16, block_k=32, split=8, group=8, num_warps=4, num_stages=3),
)


@each_op
@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: f"m{c.block_m}-n{c.block_n}-k{c.block_k}-split{c.split}")
def test_every_configuration_computes_the_same(cfg: Config, op: str) -> None:
    case = Case(m=70, n=40, k=107, holes=0.2)
    pair, layout = operands(op, case, torch.float32), case.layout()
    with patch("fpe.kernels.semi_structured.triton.choose", return_value=cfg):
        ours, again = OPS[op](*pair, layout, "triton"), OPS[op](*pair, layout, "triton")
    assert torch.equal(ours, again)
    assert_as_accurate(ours, OPS[op](*pair, layout, "eager"), DENSE[op](*as_double(pair), layout))


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", BY_KERNEL, ids=readable_id)
@each_case
def test_compress_takes_the_values_and_its_gradient_puts_them_back(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    layout, w = case.layout(), case.tensors(dtype)[0].requires_grad_()
    values = semi_structured_compress(w, layout, backend=backend)
    assert torch.equal(values, layout.from_dense(w))
    g = torch.randn(values.shape, generator=seeded(8)).to(dtype)
    (dw,) = torch.autograd.grad(values, w, g)
    kept = g if layout.kept is None else g * layout.kept
    assert torch.equal(dw, layout.to_dense(kept).sum(0))


@pytest.mark.parametrize("children", [1, 2])
def test_gradcheck(children: int) -> None:
    case = Case(m=3, n=4, k=11, children=children, holes=0.3)
    layout = case.layout()
    for op in OPS:
        pair = tuple(t.requires_grad_() for t in operands(op, case))
        assert gradcheck(lambda a, b, op=op: OPS[op](a, b, layout, "auto"), pair)
        assert gradgradcheck(lambda a, b, op=op: OPS[op](a, b, layout, "auto"), pair)
    w = case.tensors()[0].requires_grad_()
    assert gradcheck(lambda w: semi_structured_compress(w, layout), w)
    assert gradgradcheck(lambda w: semi_structured_compress(w, layout), w)


@each_case
def test_what_stands_for_no_edge_is_not_read_and_gets_no_gradient(case: Case) -> None:
    layout, (w, x, dy) = case.layout(), case.tensors()
    gone = ~layout.kept if layout.kept is not None else torch.zeros(layout.values_shape, dtype=torch.bool)
    clean = layout.from_dense(w)
    dirty = clean.masked_fill(gone, float("nan")).requires_grad_()
    y = semi_structured_matmul(x, dirty, layout)
    assert torch.equal(y, semi_structured_matmul(x, clean, layout))
    (dvalues,) = torch.autograd.grad(y, dirty, dy)
    assert (dvalues[gone] == 0).all()
    assert (semi_structured_grad(dy, x, layout)[gone] == 0).all()


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("children", [1, 2])
def test_opcheck(children: int, backend: str) -> None:
    case = Case(children=children, k=27)
    layout, (w, x, dy) = case.layout(), (t.float().requires_grad_() for t in case.tensors())
    values = layout.from_dense(w).detach().requires_grad_()
    calls = {
        "semi_structured_matmul": (x, values, layout.codes, torch.ones(children, 7), 27, True, backend),
        "semi_structured_matmul_t": (dy, values, layout.codes, 27, True, backend),
        "semi_structured_grad": (dy, x, layout.codes, backend),
        "semi_structured_compress": (w, layout.codes, children, backend),
        "semi_structured_expand": (values, layout.codes, 27, backend),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.fpe, name).default, arguments)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=["first", "second", "none"])
@each_op
def test_only_what_a_wanted_gradient_needs_is_saved(op: str, wanted: tuple[bool, bool]) -> None:
    layout = Case().layout()
    pair = tuple(t.clone().requires_grad_(w) for t, w in zip(operands(op, Case()), wanted, strict=True))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OPS[op](*pair, layout, "auto")
    assert [any(t.data_ptr() == own.data_ptr() for t in saved) for own in pair] == [wanted[1], wanted[0]]


@each_op
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_strided_and_batched_operands(backend: str, op: str) -> None:
    case = Case(m=6)
    layout, (first, second) = case.layout(), operands(op, case, torch.float32)
    want = OPS[op](first, second, layout, "eager")
    scattered = first.new_empty(*first.shape[1:], 6).movedim(-1, 0).copy_(first)
    batched = scattered.unflatten(0, (2, 3))
    other = second.unflatten(0, (2, 3)) if op == "dw" else second.mT.contiguous().mT
    got = OPS[op](batched, other, layout, backend)
    torch.testing.assert_close(got, want if op == "dw" else want.unflatten(0, (2, 3)))


@pytest.mark.parametrize("op", ["forward", "dx", "dw"])
def test_offsets_beyond_32_bits(op: str) -> None:
    """Rows 2**30 elements apart: the third begins past 2**31. Untouched pages of the buffer cost no memory."""
    case = Case(m=3, n=16, k=16, children=1)
    near, other = operands(op, case, torch.float32)
    far = torch.empty(2**31 + 64).as_strided(near.shape, (2**30, *near.stride()[1:]))
    far.copy_(near)
    layout = case.layout()
    assert torch.equal(OPS[op](far, other, layout, "triton"), OPS[op](near, other, layout, "triton"))


def test_autocast_reaches_the_operation() -> None:
    layout, (w, x, _) = Case().layout(), Case().tensors(torch.float32)
    values = layout.from_dense(w)
    with torch.autocast("cpu", torch.bfloat16):
        y = semi_structured_matmul(x, values, layout)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, semi_structured_matmul(x.bfloat16(), values.bfloat16(), layout))
