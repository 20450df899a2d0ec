"""The expanded MLP as one operation on 2-D activations; where a gradient is wanted it is two."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from ..library import define, implementation
from ..partition.ops import Seed, as_labels, merge_matmul, split_matmul
from .backends import BACKENDS


class _Call(NamedTuple):
    """The arguments of the operation, in the order of its schema."""

    x: Tensor
    w1: Tensor
    labels1: Tensor | None
    seed1: Seed
    transposed1: bool
    w2: Tensor
    labels2: Tensor | None
    seed2: Seed
    transposed2: bool
    alpha: int
    bias1: Tensor | None
    bias2: Tensor | None
    activation: str | None
    backend: str

    @property
    def merges(self) -> bool:
        """Whether each edge of the second layer reads one child."""
        return self.labels2 is not None or bool(self.seed2)


def _run(*args: Any) -> Tensor:
    c = _Call(*args)
    (hidden, k), n = c.w1.shape, c.w2.shape[0]
    first = as_labels(c.labels1, c.seed1, c.transposed1, hidden, k, c.alpha)
    second = as_labels(c.labels2, c.seed2, c.transposed2, n, hidden, c.alpha) if c.merges else None
    run = implementation(BACKENDS[c.backend].module, "expanded_mlp")
    return run(c.x, c.w1, first, c.w2, second, c.alpha, c.bias1, c.bias2, c.activation)


def _composed(*args: Any) -> Tensor:
    c = _Call(*args)
    h = split_matmul(c.x, c.w1, c.labels1, c.seed1, c.bias1, c.activation, c.alpha, c.transposed1, c.backend)
    if not c.merges:
        return linear(h.flatten(1), c.w2, c.bias2)
    return merge_matmul(h, c.w2, c.labels2, c.seed2, c.bias2, None, False, c.transposed2, c.backend)


expanded_mlp = define(
    "expanded_mlp(Tensor x, Tensor w1, Tensor? labels1, int[]? seed1, bool transposed1, Tensor w2, Tensor? labels2, "
    "int[]? seed2, bool transposed2, SymInt alpha, Tensor? bias1, Tensor? bias2, str? activation, str backend) "
    "-> Tensor",
    _run,
    lambda x, w1, labels1, seed1, transposed1, w2, *rest: x.new_empty(x.shape[0], w2.shape[0]),
    composed=_composed,
)
"""``x[M, K], w1[H, K], w2[N, alpha * H] or w2[N, H] -> y[M, N]``. Where a gradient is wanted it is two operations."""
