"""What a layer must compute: each pass of a case on some rows in float64, with the bound that its arithmetic allows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fpe.layers import ExpandedLinear

from .. import accuracy
from . import peers
from .problems import Problem
from .providers import OURS, Provider

SAMPLED = 16
"""Rows of a result that are compared, spread over all; every element must be a number."""


class WrongResultError(ValueError):
    """A provider's result is not the layer's."""


class Expected(NamedTuple):
    """Rows of a result in float64, and what bounds their error; see :mod:`fpe.bench.accuracy`."""

    rows: Tensor
    truth: Tensor
    spread: Tensor
    terms: Tensor


class Truth:
    """The true results of a case, made when they are first asked for and kept for all its providers.

    Args:
        problem: Of the case.
        level: ``"op"``, ``"layer"`` (the expanded layer, biases zero) or ``"merge"`` (its successor); others have none.
    """

    def __init__(self, problem: Problem, level: str) -> None:
        self.problem = problem
        self.level = level
        self._kept: dict[str, Expected] = {}

    def check(self, provider: Provider, module: nn.Module, name: str, made: Callable[[], object]) -> float | None:
        """Makes a call and compares its result.

        Returns:
            The error over the error allowed; ``None`` where nothing is compared: a pass of several results, a network,
            a provider of another function.

        Raises:
            WrongResultError: It is more than 1.
        """
        with poisoned():
            result = made()
        if not provider.exact or name not in ("forward", "dX", "dW") or self.level not in ("op", "merge", "layer"):
            return None
        ours = result if isinstance(result, Tensor) else result[0]  # type: ignore[index]
        if not bool(ours.isfinite().all()):
            raise WrongResultError(f"{name} holds what is no number")
        expected = self._expected(name)
        if name == "dW":
            ours, kept = as_wide(module, ours)
            expected = _where(expected, kept[expected.rows])
        by_torch = provider.name.removeprefix(OURS) not in accuracy.OWN or self.level == "layer"
        error = accuracy.excess(ours[expected.rows], *expected[1:], self.problem.case.dtype, by_torch)
        if not error <= 1:
            raise WrongResultError(f"{name} is off by {error:.3g} times the error allowed")
        return error

    def _expected(self, name: str) -> Expected:
        if name not in self._kept:
            self._kept[name] = self._compute(name)
        return self._kept[name]

    def _compute(self, name: str) -> Expected:
        """``y = x W^T``, ``dx = dy W`` or ``dW = dy^T x`` on some rows, with squares and with ones."""
        x, dy = (self.problem.dy, self.problem.x) if self.level == "merge" else (self.problem.x, self.problem.dy)
        if name == "dW":
            left, right = dy.T, x
        else:
            wide = wide_weight(self.problem, self.level)
            left, right = (x, wide.T) if name == "forward" else (dy, wide)
        rows = torch.linspace(0, len(left) - 1, min(SAMPLED, len(left)), device=left.device).round().long()
        return Expected(rows, *accuracy.expected(partial(torch.matmul, left[rows], right)))


def wide_weight(problem: Problem, level: str) -> Tensor:
    """The dense weight of a level's layer: ``[alpha * N, K]``, or ``[K, alpha * N]`` of the successor."""
    if level != "merge":
        return problem.wide
    masks = problem.partition.masks().transpose(1, 2)  # [alpha, K, N]
    return torch.where(masks, problem.weight.T, problem.weight.new_zeros(())).transpose(0, 1).flatten(1)


def as_wide(module: nn.Module, grad: Tensor) -> tuple[Tensor, Tensor]:
    """A weight's gradient at the wide dense size, and which of its entries exist."""
    (parameter,) = module.parameters()
    if not isinstance(module, (ExpandedLinear, peers.Masked)):
        return grad, torch.ones_like(grad, dtype=torch.bool)
    before = parameter.data
    parameter.data = grad
    try:
        with torch.no_grad():
            return module.wide_weight().detach().clone(), module.kept()
    finally:
        parameter.data = before


def _where(expected: Expected, kept: Tensor) -> Expected:
    """The same with zeros where nothing exists."""
    zeroed = [torch.where(kept, t, t.new_zeros(())) for t in expected[1:]]
    return Expected(expected.rows, *zeroed)


@contextmanager
def poisoned() -> Iterator[None]:
    """Makes ``torch.empty`` return NaN, which PyTorch does in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
