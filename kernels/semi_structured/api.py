"""Public semi-structured operations: checks, leading batch dimensions, autocast, choice of backend."""

import torch
from torch import Tensor

from ..checks import as_rows, autocast, check_pair, check_tensor
from ..dispatch import choose_backend, stays
from . import ops
from .backends import BACKENDS
from .layout import SemiStructuredLayout


def semi_structured_matmul(
    x: Tensor,
    values: Tensor,
    layout: SemiStructuredLayout,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Multiplies by a 2:4 weight, or by those of a parent's two children: ``y[..., c, :] = x @ W[c].T + bias[c]``.

    Gradients: ``dx = semi_structured_matmul_t(dy, values, layout)`` and ``dvalues = semi_structured_grad(dy, x,
    layout)``.

    Args:
        x: Activations ``[..., K]``, float16, bfloat16, float32 or float64.
        values: Stored values ``[children, N, 2 * quads]``, same dtype and device. Those that are not edges
            (``layout.kept``) are read as zero.
        layout: Where the values lie.
        bias: ``[children, N]``, or none.
        backend: ``"auto"``, ``"eager"`` (the definition), ``"triton"`` (weights expanded in registers, dense tensor
            cores), ``"sparse_tensor_core"`` (``mma.sp``; 16-bit floats) or ``"torch"`` (``torch.sparse``: cuSPARSELt or
            CUTLASS; 16-bit floats).

    Returns:
        ``y[..., children, N]`` in the dtype of ``x``.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype, or ``layout`` is no :class:`SemiStructuredLayout`.
        ValueError: Shapes, devices or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "semi_structured_matmul"
    n, k = _check_values(op, values, layout)
    check_tensor(op, "x", x, (k,), batched=True, on=values)
    if bias is not None:
        check_tensor(op, "bias", bias, (layout.children, n), like=values)
        (bias,) = autocast(bias)
    given = values
    x, values = autocast(x, values)
    check_tensor(op, "x", x, (k,), batched=True, like=values)
    rows = as_rows(x, 1)
    used = _kept(values, layout)
    chosen = choose_backend(op, backend, rows, BACKENDS, layout.children * n, k, by_cost=True)
    y = ops.semi_structured_matmul(rows, used, layout.codes, bias, k, stays(given, used), chosen)
    return y.view(*x.shape[:-1], layout.children, n)


def semi_structured_matmul_t(
    dy: Tensor, values: Tensor, layout: SemiStructuredLayout, *, backend: str = "auto"
) -> Tensor:
    """Multiplies by a 2:4 weight from the other side: ``dx = sum over c of dy[..., c, :] @ W[c]``.

    With two children the transposed weight is 2:4 again (a quad is two parents times two children), so that this can
    run on sparse tensor cores too. With one it is not, and dense ones are used.

    Gradients: ``ddy = semi_structured_matmul(g, values, layout)`` and ``dvalues = semi_structured_grad(dy, g,
    layout)`` for an incoming ``g[..., K]``.

    Args:
        dy: ``[..., children, N]``, float16, bfloat16, float32 or float64.
        values: Stored values ``[children, N, 2 * quads]``, same dtype and device. Those that are not edges are read as
            zero.
        layout: Where the values lie.
        backend: As in :func:`semi_structured_matmul`.

    Returns:
        ``dx[..., K]`` in the dtype of ``dy``.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype, or ``layout`` is no :class:`SemiStructuredLayout`.
        ValueError: Shapes, devices or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "semi_structured_matmul_t"
    n, k = _check_values(op, values, layout)
    check_tensor(op, "dy", dy, (layout.children, n), batched=True, on=values)
    given = values
    dy, values = autocast(dy, values)
    check_tensor(op, "dy", dy, (layout.children, n), batched=True, like=values)
    rows = as_rows(dy, 2)
    used = _kept(values, layout)
    chosen = choose_backend(op, backend, rows, BACKENDS, layout.children * n, k, by_cost=True)
    dx = ops.semi_structured_matmul_t(rows, used, layout.codes, k, stays(given, used), chosen)
    return dx.view(*dy.shape[:-2], k)


def semi_structured_grad(dy: Tensor, x: Tensor, layout: SemiStructuredLayout, *, backend: str = "auto") -> Tensor:
    """Gradient of the stored values alone: the entries of ``dy[:, c].T @ x`` at their places.

    Gradients: ``ddy = semi_structured_matmul(x, g, layout)`` and ``dx = semi_structured_matmul_t(dy, g, layout)`` for
    an incoming ``g[children, N, 2 * quads]``.

    Args:
        dy: ``[..., children, N]``, float16, bfloat16, float32 or float64.
        x: ``[..., K]`` with the same leading dimensions, dtype and device.
        layout: Where the values lie.
        backend: As in :func:`semi_structured_matmul`.

    Returns:
        ``[children, N, 2 * quads]`` in the dtype of ``x``; zero where a value is not an edge.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype, or ``layout`` is no :class:`SemiStructuredLayout`.
        ValueError: Shapes, devices or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "semi_structured_grad"
    n, k = _check_layout(op, layout)
    check_tensor(op, "x", x, (k,), batched=True)
    check_tensor(op, "dy", dy, (*x.shape[:-1], layout.children, n), on=x)
    _check_index(op, layout, x)
    dy, x = autocast(dy, x)
    check_tensor(op, "dy", dy, (*x.shape[:-1], layout.children, n), like=x)
    rows = as_rows(x, 1)
    chosen = choose_backend(op, backend, rows, BACKENDS, layout.children * n, k, by_cost=True)
    dvalues = ops.semi_structured_grad(as_rows(dy, 2), rows, layout.codes, chosen)
    return _kept(dvalues, layout)


def semi_structured_compress(w: Tensor, layout: SemiStructuredLayout, *, backend: str = "auto") -> Tensor:
    """Takes the stored values of a weight, or of a parent's two children, in one pass; nothing is ranked.

    Gradient: the values' gradients at their places in ``w``, zero elsewhere.

    Args:
        w: The plain weight ``[N, K]``, or the parent's, of which each child takes its share; float16, bfloat16,
            float32 or float64.
        layout: Where the values lie.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``; the other backends of :func:`semi_structured_matmul` mean
            ``"auto"``.

    Returns:
        Values ``[children, N, 2 * quads]`` in the dtype of ``w``, zero where a value is not an edge.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype, or ``layout`` is no :class:`SemiStructuredLayout`.
        ValueError: Shapes, devices or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "semi_structured_compress"
    n, k = _check_layout(op, layout)
    check_tensor(op, "w", w, (n, k))
    _check_index(op, layout, w)
    copies = {name: BACKENDS[name] for name in ("triton", "eager")}
    wanted = "auto" if backend in BACKENDS and backend not in copies else backend
    chosen = choose_backend(op, wanted, w, copies, n, k)
    return _kept(ops.semi_structured_compress(w, layout.codes, layout.children, chosen), layout)


def _kept(values: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """Returns the values with zeros where there is no edge; their gradients are zero there too."""
    if layout.kept is None:
        return values
    return torch.where(layout.kept.to(values.device), values, values.new_zeros(()))  # moved to the meta device alone


def _check_layout(op: str, layout: object) -> tuple[int, int]:
    if not isinstance(layout, SemiStructuredLayout):
        raise TypeError(f"{op}: layout must be a SemiStructuredLayout, got {type(layout).__name__}")
    check_pair(op, "layout.shape", layout.shape, 0)
    if layout.children not in (1, 2):
        raise ValueError(f"{op}: layout.children must be 1 or 2, got {layout.children!r}")
    return layout.shape


def _check_index(op: str, layout: SemiStructuredLayout, operand: Tensor) -> None:
    """Raises unless codes and kept places have the sizes that they must have, and are where the operand is."""
    codes = (layout.shape[0], -(-layout.quads // 2))
    check_tensor(op, "layout.codes", layout.codes, codes, dtype=torch.uint8, on=operand, is_index=True)
    if layout.kept is not None:
        kept = layout.values_shape
        check_tensor(op, "layout.kept", layout.kept, kept, dtype=torch.bool, on=operand, is_index=True)


def _check_values(op: str, values: Tensor, layout: SemiStructuredLayout) -> tuple[int, int]:
    shape = _check_layout(op, layout)
    check_tensor(op, "values", values, layout.values_shape)
    _check_index(op, layout, values)
    return shape
