"""Public partition operations: checks, leading batch dimensions, autocast, choice of backend."""

import torch
from torch import Tensor

from .. import ops
from ..checks import as_rows, autocast, check_tensor
from ..dispatch import choose_backend
from .eager import HOLE


def split_matmul(x: Tensor, w: Tensor, labels: Tensor, alpha: int, *, backend: str = "auto") -> Tensor:
    """Multiplies ``x`` by each child's share of the parent's weights: the forward of an expanded layer.

    ``y[m, a, n] = sum_k x[m, k] * w[n, k] * (labels[n, k] == a)``

    Gradients: ``dx = merge_matmul(dy, w.T, labels.T)`` and ``dw = partition_grad(dy, x, labels)``.

    Args:
        x: Activations ``[..., K]``, float16, bfloat16, float32 or float64.
        w: The parent's weight ``[N, K]``, same dtype and device.
        labels: uint8 ``[N, K]``, which child owns the edge; a label not below ``alpha`` (``HOLE`` by
            convention) means that no child does.
        alpha: Children per parent, 1 to 254.
        backend: ``"auto"`` or ``"eager"``.

    Returns:
        ``y[..., alpha, N]`` in the dtype of ``x``.

    Raises:
        TypeError: An operand is no tensor or has the wrong dtype.
        ValueError: Shapes, devices, ``alpha`` or ``backend`` do not fit.
    """
    op = "split_matmul"
    check_tensor(op, "w", w, (None, None))
    n, k = w.shape
    check_tensor(op, "x", x, (k,), batched=True, on=w)
    check_tensor(op, "labels", labels, (n, k), dtype=torch.uint8, on=w)
    _check_alpha(op, alpha)
    x, w = autocast(x, w)
    check_tensor(op, "x", x, (k,), batched=True, like=w)
    y = ops.split_matmul(as_rows(x, 1), w, labels, alpha, choose_backend(op, backend, w))
    return y.view(*x.shape[:-1], alpha, n)


def merge_matmul(z: Tensor, w: Tensor, labels: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiplies each parent edge by the child that owns it: the forward of the layer after a split.

    ``y[m, n] = sum_k z[m, labels[n, k], k] * w[n, k]``

    Gradients: ``dz = split_matmul(dy, w.T, labels.T, alpha)`` and
    ``dw = partition_grad(z, dy, labels.T).T``.

    Args:
        z: Children's activations ``[..., alpha, K]``, float16, bfloat16, float32 or float64.
        w: The parent's weight ``[N, K]``, same dtype and device.
        labels: uint8 ``[N, K]``, which child's activation the edge reads; a label not below ``alpha``
            (``HOLE`` by convention) contributes nothing.
        backend: ``"auto"`` or ``"eager"``.

    Returns:
        ``y[..., N]`` in the dtype of ``z``.

    Raises:
        TypeError: An operand is no tensor or has the wrong dtype.
        ValueError: Shapes, devices, alpha (``z.shape[-2]``, 1 to 254) or ``backend`` do not fit.
    """
    op = "merge_matmul"
    check_tensor(op, "w", w, (None, None))
    n, k = w.shape
    check_tensor(op, "z", z, (None, k), batched=True, on=w)
    check_tensor(op, "labels", labels, (n, k), dtype=torch.uint8, on=w)
    alpha = z.shape[-2]
    _check_alpha(op, alpha)
    z, w = autocast(z, w)
    check_tensor(op, "z", z, (None, k), batched=True, like=w)
    y = ops.merge_matmul(as_rows(z, 2), w, labels, choose_backend(op, backend, w))
    return y.view(*z.shape[:-2], n)


def partition_grad(dy: Tensor, x: Tensor, labels: Tensor, *, backend: str = "auto") -> Tensor:
    """Weight gradient of both partition matmuls, at the parent's size; zero where nobody owns the edge.

    ``dw[n, k] = sum_m dy[m, labels[n, k], n] * x[m, k]``

    Gradients: ``ddy = split_matmul(x, g, labels, alpha)`` and ``dx = merge_matmul(dy, g.T, labels.T)``
    for an incoming ``g[N, K]``.

    Args:
        dy: Gradient of the children ``[..., alpha, N]``, float16, bfloat16, float32 or float64.
        x: Activations ``[..., K]`` with the same leading dimensions, dtype and device.
        labels: uint8 ``[N, K]``.
        backend: ``"auto"`` or ``"eager"``.

    Returns:
        ``dw[N, K]`` in the dtype of ``x``.

    Raises:
        TypeError: An operand is no tensor or has the wrong dtype.
        ValueError: Shapes, devices, alpha (``dy.shape[-2]``, 1 to 254) or ``backend`` do not fit.
    """
    op = "partition_grad"
    check_tensor(op, "labels", labels, (None, None), dtype=torch.uint8)
    n, k = labels.shape
    check_tensor(op, "x", x, (k,), batched=True, on=labels)
    check_tensor(op, "dy", dy, (*x.shape[:-1], None, n), on=labels)
    dy, x = autocast(dy, x)
    check_tensor(op, "dy", dy, (*x.shape[:-1], None, n), like=x)
    alpha = dy.shape[-2]
    _check_alpha(op, alpha)
    return ops.partition_grad(as_rows(dy, 2), as_rows(x, 1), labels, choose_backend(op, backend, x))


def _check_alpha(op: str, alpha: object) -> None:
    if not isinstance(alpha, int) or isinstance(alpha, bool) or not 1 <= alpha < HOLE:
        raise ValueError(f"{op}: alpha must be an integer from 1 to {HOLE - 1}, got {alpha!r}")
