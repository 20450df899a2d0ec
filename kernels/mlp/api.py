"""The public expanded MLP: checks, leading batch dimensions, autocast, one launch or two operations."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..activations import check_activation
from ..checks import as_rows, autocast, check_tensor
from ..dispatch import choose_backend
from ..partition.api import Given, by_labels, check_labels, merge_matmul, split_matmul
from ..partition.config import limit as too_many_children
from ..partition.eager import Labels
from ..partition.labels import check_alpha
from . import ops
from .backends import BACKENDS
from .config import limit


def expanded_mlp(
    x: Tensor,
    w1: Tensor,
    labels1: Labels,
    w2: Tensor,
    labels2: Labels | None = None,
    *,
    alpha: int,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str | None = "relu",
    backend: str = "auto",
) -> Tensor:
    """Computes an expanded layer, its activation and the layer after it, in one launch if they are small.

    ``h[m, a, i] = activation(sum_k x[m, k] * w1[i, k] * (labels1[i, k] == a) + bias1[a, i])`` and then
    ``y = h.flatten(-2) @ w2.T + bias2``, or ``y = merge_matmul(h, w2, labels2, bias2)``.

    If a gradient is needed, it runs :func:`split_matmul` and then :func:`merge_matmul` or a dense matmul, and has
    their gradients.

    Args:
        x: Activations ``[..., K]``, float16, bfloat16, float32 or float64.
        w1: The parents' weight ``[H, K]``, same dtype and device.
        labels1: Which child owns each edge of ``w1``: packed, seeded, or uint8 ``[H, K]``.
        w2: The second weight: ``[N, alpha * H]`` dense, its columns in planes of children; or ``[N, H]`` with
            ``labels2``.
        labels2: Which child each edge of ``w2`` reads: packed, seeded, or uint8 ``[N, H]``; ``None`` for a dense
            second layer.
        alpha: Children per parent, 1 to 254; at most 8 in one launch.
        bias1: ``[alpha, H]``, or none.
        bias2: ``[N]``, or none.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"silu"`` or none.
        backend: ``"auto"`` uses one launch on a GPU if the operands have 16 bits and the hidden layer fits into one
            program, and else the two operations; ``"triton"`` uses one launch or raises; ``"eager"`` is the twin.

    Returns:
        ``y[..., N]`` in the dtype of ``x``.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype.
        ValueError: Shapes, devices, ``alpha``, ``activation`` or ``backend`` do not fit.
        UnsupportedError: With ``backend="triton"``: the hidden layer is too large, the operands do not have 16 bits, a
            gradient is wanted, or Triton cannot run; a ``ValueError``.
    """
    op = "expanded_mlp"
    check_tensor(op, "w1", w1, (None, None))
    hidden, k = w1.shape
    check_alpha(op, alpha)
    check_tensor(op, "w2", w2, (None, hidden if labels2 is not None else alpha * hidden), like=w1)
    check_tensor(op, "x", x, (k,), batched=True, on=w1)
    check_activation(op, activation)
    first = check_labels(op, labels1, (hidden, k), alpha, w1, "labels1")
    second = Given(None, [], False)
    if labels2 is not None:
        second = check_labels(op, labels2, (w2.shape[0], hidden), alpha, w2, "labels2")
    for name, bias, shape in (("bias1", bias1, (alpha, hidden)), ("bias2", bias2, (w2.shape[0],))):
        if bias is not None:
            check_tensor(op, name, bias, shape, like=w1)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, w2, bias1, bias2))
    reason = "a gradient is wanted" if trains else too_many_children(alpha) or limit(hidden, alpha, w1.element_size())
    chosen = choose_backend(op, by_labels(op, backend, labels1, labels2), w1, BACKENDS, reason)
    if trains or (chosen == "eager" and backend == "auto"):
        h = split_matmul(x, w1, labels1, alpha, bias1, activation, backend=backend)
        if labels2 is not None:
            return merge_matmul(h, w2, labels2, bias2, backend=backend)
        return linear(h.flatten(-2), w2, bias2)
    given = [t if t is None else autocast(t)[0] for t in (x, w1, w2, bias1, bias2)]
    x, w1, w2 = (t for t in given[:3] if t is not None)
    check_tensor(op, "x", x, (k,), batched=True, like=w1)
    y = ops.expanded_mlp(as_rows(x, 1), w1, *first, w2, *second, alpha, given[3], given[4], activation, chosen)
    return y.view(*x.shape[:-1], w2.shape[0])
