"""The expanded MLP as one operation on 2-D activations; where a gradient is wanted it is two."""

from torch import Tensor
from torch.nn.functional import linear

from ..library import define, implementation
from ..partition.ops import as_labels, merge_matmul, split_matmul
from .backends import BACKENDS


def _run_expanded_mlp(
    x: Tensor,
    w1: Tensor,
    labels1: Tensor,
    transposed1: bool,
    w2: Tensor,
    labels2: Tensor | None,
    transposed2: bool,
    alpha: int,
    bias1: Tensor | None,
    bias2: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    hidden, k = w1.shape
    first = as_labels(labels1, transposed1, hidden, k, alpha)
    second = None if labels2 is None else as_labels(labels2, transposed2, w2.shape[0], hidden, alpha)
    run = implementation(BACKENDS[backend].module, "expanded_mlp")
    return run(x, w1, first, w2, second, alpha, bias1, bias2, activation)


def _expanded_mlp_composed(
    x: Tensor,
    w1: Tensor,
    labels1: Tensor,
    transposed1: bool,
    w2: Tensor,
    labels2: Tensor | None,
    transposed2: bool,
    alpha: int,
    bias1: Tensor | None,
    bias2: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    h = split_matmul(x, w1, labels1, bias1, activation, alpha, transposed1, backend)
    if labels2 is None:
        return linear(h.flatten(1), w2, bias2)
    return merge_matmul(h, w2, labels2, bias2, None, False, transposed2, backend)


expanded_mlp = define(
    "expanded_mlp(Tensor x, Tensor w1, Tensor labels1, bool transposed1, Tensor w2, Tensor? labels2, bool transposed2, "
    "SymInt alpha, Tensor? bias1, Tensor? bias2, str? activation, str backend) -> Tensor",
    _run_expanded_mlp,
    lambda x, w1, labels1, transposed1, w2, *rest: x.new_empty(x.shape[0], w2.shape[0]),
    composed=_expanded_mlp_composed,
)
"""``x[M, K], w1[H, K], w2[N, alpha * H] or w2[N, H] -> y[M, N]``. Where a gradient is wanted it is two operations."""
