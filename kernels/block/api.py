"""Public block operations: checks, leading batch dimensions, autocast, choice of backend."""

import torch
from torch import Tensor

from ..activations import check_activation
from ..checks import as_rows, autocast, check_pair, check_shape, check_tensor, from_rows, in_one_dtype
from ..dispatch import choose_backend
from . import ops
from .backends import BACKENDS
from .layout import BlockLayout

INDEX = tuple(f"layout.{name}" for name in ops.INDEX)
"""The index tensors, for messages."""


def block_matmul(
    x: Tensor,
    values: Tensor,
    layout: BlockLayout,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Multiplies by a block-masked weight: ``y = activation(x @ W.T + bias)``. Only kept blocks are multiplied.

    The activation joins the matmul's epilogue where no gradient is wanted; otherwise it runs after it, because its
    gradient needs its input.

    Gradients: ``dx = block_matmul_t(dy, values, layout)`` and ``dvalues = block_grad(dy, x, layout)``.

    Args:
        x: Activations ``[..., K]``, float16, bfloat16, float32 or float64.
        values: Kept blocks of ``W[N, K]``, ``[blocks, bn, bk]``, same dtype and device.
        layout: Where the blocks lie; rows and columns of blocks may be empty. The Triton kernels take blocks with sides
            of 16, 32, 64 and 128.
        bias: ``[N]``, or none.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"silu"`` or none.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"eager"``.

    Returns:
        ``y[..., N]`` in the dtype of ``x``.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype, or ``layout`` is no :class:`BlockLayout`.
        ValueError: Shapes, devices, ``activation`` or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "block_matmul"
    n, k = _check_values(op, values, layout)
    check_tensor(op, "x", x, (k,), batched=True, on=values)
    check_activation(op, activation)
    if bias is not None:
        check_tensor(op, "bias", bias, (n,), like=values)
        (bias,) = autocast(bias)
    x, values = in_one_dtype(op, "x", x, values)
    chosen = choose_backend(op, backend, x, BACKENDS, layout.block)
    y = ops.block_matmul(as_rows(x, 1), values, *layout.tensors, bias, activation, n, k, chosen)
    return from_rows(y, x, 1)


def block_matmul_t(dy: Tensor, values: Tensor, layout: BlockLayout, *, backend: str = "auto") -> Tensor:
    """Multiplies by a block-masked weight from the other side: ``dx = dy @ W``.

    Gradients: ``ddy = block_matmul(g, values, layout)`` and ``dvalues = block_grad(dy, g, layout)`` for an
    incoming ``g[..., K]``.

    Args:
        dy: ``[..., N]``, float16, bfloat16, float32 or float64.
        values: Kept blocks of ``W[N, K]``, ``[blocks, bn, bk]``, same dtype and device.
        layout: Where the blocks lie.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"eager"``.

    Returns:
        ``dx[..., K]`` in the dtype of ``dy``.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype, or ``layout`` is no :class:`BlockLayout`.
        ValueError: Shapes, devices or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "block_matmul_t"
    n, k = _check_values(op, values, layout)
    check_tensor(op, "dy", dy, (n,), batched=True, on=values)
    dy, values = in_one_dtype(op, "dy", dy, values)
    dx = ops.block_matmul_t(
        as_rows(dy, 1), values, *layout.tensors, n, k, choose_backend(op, backend, dy, BACKENDS, layout.block)
    )
    return from_rows(dx, dy, 1)


def block_grad(dy: Tensor, x: Tensor, layout: BlockLayout, *, backend: str = "auto") -> Tensor:
    """Gradient of the kept blocks alone: of block ``b``, ``dy[:, its rows].T @ x[:, its columns]``.

    Gradients: ``ddy = block_matmul(x, g, layout)`` and ``dx = block_matmul_t(dy, g, layout)`` for an incoming
    ``g[blocks, bn, bk]``.

    Args:
        dy: ``[..., N]``, float16, bfloat16, float32 or float64.
        x: ``[..., K]`` with the same leading dimensions, dtype and device.
        layout: Where the blocks lie.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"eager"``.

    Returns:
        ``[blocks, bn, bk]`` in the dtype of ``x``; zero in the padding of edge blocks.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype, or ``layout`` is no :class:`BlockLayout`.
        ValueError: Shapes, devices or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "block_grad"
    check_tensor(op, "x", x, None)
    n, k = _check_layout(op, layout, x)
    check_shape(op, "x", x, (k,), batched=True)
    check_tensor(op, "dy", dy, (*x.shape[:-1], n), on=x)
    dy, x = in_one_dtype(op, "dy", dy, x)
    chosen = choose_backend(op, backend, x, BACKENDS, layout.block)
    return ops.block_grad(as_rows(dy, 1), as_rows(x, 1), *layout.tensors, *layout.block, chosen)


def _check_values(op: str, values: Tensor, layout: BlockLayout) -> tuple[int, int]:
    """Raises unless values are the blocks of a layout that is in order; returns the sizes of the weight."""
    check_tensor(op, "values", values, None)
    shape = _check_layout(op, layout, values)
    check_shape(op, "values", values, layout.values_shape)
    return shape


def _check_layout(op: str, layout: object, operand: Tensor) -> tuple[int, int]:
    """Raises unless all index tensors are as long as they must be and where the operand is; returns the sizes."""
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"{op}: layout must be a BlockLayout, got {type(layout).__name__}")
    shape = check_pair(op, "layout.shape", layout.shape, 0)
    check_pair(op, "layout.block", layout.block, 1)
    check_tensor(op, "layout.rows", layout.rows, (None,), dtype=torch.int32, on=operand, is_index=True)
    (rows, columns), blocks = layout.grid, layout.rows.shape[0]
    sizes = (blocks, rows + 1, columns + 1, blocks, blocks, rows, columns, blocks)
    for name, index, size in zip(INDEX[1:], layout.tensors[1:], sizes, strict=True):
        check_tensor(op, name, index, (size,), dtype=torch.int32, on=operand, is_index=True)
    return shape
