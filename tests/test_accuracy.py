"""Bounds of error: every arithmetic that may be used stays inside, whatever its order, and wrong results do not."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from fpe.bench import accuracy
from fpe.kernels import split_matmul_eager

SHAPES = ((64, 1), (64, 16), (5, 33), (48, 256), (32, 2048))
"""Rows of both operands, and terms of each sum."""


def operands(rows: int, terms: int, mean: float, dtype: torch.dtype = torch.float32) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(terms)
    a, b = (mean + torch.randn(rows, terms, generator=generator) for _ in range(2))
    return a.to(dtype).float().numpy(), b.to(dtype).float().numpy()


def chain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Float32 sums, each one chain of fused multiply-adds."""
    total = np.zeros((len(a), len(b)), np.float32)
    for x, w in zip(a.T.astype(float), b.T.astype(float), strict=True):
        total = (total + np.outer(x, w)).astype(np.float32)
    return total


def truncated(a: np.ndarray, b: np.ndarray, step: int) -> np.ndarray:
    """Sums of a tensor core: ``step`` exact products at a time are added, and the sum is truncated to float32."""
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(0, a.shape[1], step):
        exact = total + a[:, k : k + step].astype(float) @ b[:, k : k + step].astype(float).T
        total = exact.astype(np.float32)
        over = np.abs(total.astype(float)) > np.abs(exact)
        total[over] = np.nextafter(total[over], np.float32(0))
    return total


def to_tf32(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def tf32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return truncated(to_tf32(a), to_tf32(b), 8)


def excess(got: np.ndarray | Tensor, a: np.ndarray, b: np.ndarray, dtype: str, by_torch: bool = False) -> float:
    a, b = a.astype(float), b.astype(float)
    truth, spread = torch.from_numpy(a @ b.T), torch.from_numpy(np.sqrt((a * a) @ (b * b).T))
    return accuracy.excess(torch.as_tensor(got), truth, spread, a.shape[1], dtype, by_torch)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "terms"), SHAPES)
def test_every_order_of_a_sum_is_allowed(rows: int, terms: int, mean: float) -> None:
    a, b = operands(rows, terms, mean)
    orders: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
        "a chain of fused multiply-adds": ("fp32", chain),
        "a library's tree": ("fp32", lambda a, b: a @ b.T),
        "truncated operands and sums": ("tf32", tf32),
        "full precision where TF32 is allowed": ("tf32", chain),
    }
    for name, (dtype, multiply) in orders.items():
        assert excess(multiply(a, b), a, b, dtype) <= 1, name
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = operands(rows, terms, mean, kind)
        once = torch.from_numpy(truncated(a, b, 16)).to(kind)
        assert excess(once, a, b, dtype) <= 1
        parts = [torch.from_numpy(truncated(a[:, i::4].copy(), b[:, i::4].copy(), 16)).to(kind) for i in range(4)]
        assert excess(parts[0] + parts[1] + parts[2] + parts[3], a, b, dtype, by_torch=True) <= 1


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "terms"), SHAPES)
def test_what_is_wrong_is_not_allowed(rows: int, terms: int, mean: float) -> None:
    a, b = operands(rows, terms, mean)
    assert excess(tf32(a, b), a, b, "fp32") > 50  # TF32 where float32 is meant
    assert excess(1.0001 * chain(a, b), a, b, "fp32") > 1
    assert excess(1.01 * tf32(a, b), a, b, "tf32") > 1
    missing = chain(a[:, 1:], b[:, 1:])
    assert excess(missing, a, b, "fp32") > 1  # a term is left out
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = operands(rows, terms, mean, kind)
        assert excess(torch.from_numpy(1.01 * truncated(a, b, 16)).to(kind), a, b, dtype) > 1
    one = chain(a, b)
    one[0, 0] = np.nan
    assert excess(one, a, b, "fp32") == float("inf") == excess(one[:1, :0], a, b, "fp32")


def test_a_products_twin_says_what_to_expect() -> None:
    """By hand: edges of two children, one of them missing; the terms that a child has are counted."""
    x, w = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, -1.0, 2.0]])
    labels = torch.tensor([[0, 1, 0]], dtype=torch.uint8)
    truth, spread, terms = accuracy.expected(partial(split_matmul_eager, x, w, labels, 2))
    assert truth.tolist() == [[[7.0], [-2.0]]] and terms.tolist() == [[[2.0], [1.0]]]
    assert torch.allclose(spread, torch.tensor([[[37.0**0.5], [2.0]]], dtype=torch.float64))
