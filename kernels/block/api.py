"""Public block operations: checks, leading batch dimensions, autocast, choice of backend."""

import torch
from torch import Tensor

from ..activations import check_activation
from ..checks import as_rows, autocast, check_pair, check_tensor
from ..dispatch import choose_backend
from . import ops
from .backends import BACKENDS
from .layout import BlockLayout


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
    x, values = autocast(x, values)
    check_tensor(op, "x", x, (k,), batched=True, like=values)
    chosen = choose_backend(op, backend, x, BACKENDS, layout.block)
    y = ops.block_matmul(as_rows(x, 1), values, *layout.tensors, bias, activation, n, k, chosen)
    return y.view(*x.shape[:-1], n)


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
    dy, values = autocast(dy, values)
    check_tensor(op, "dy", dy, (n,), batched=True, like=values)
    dx = ops.block_matmul_t(
        as_rows(dy, 1), values, *layout.tensors, n, k, choose_backend(op, backend, dy, BACKENDS, layout.block)
    )
    return dx.view(*dy.shape[:-1], k)


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
    _check_layout(op, layout)
    n, k = layout.shape
    check_tensor(op, "x", x, (k,), batched=True)
    check_tensor(op, "dy", dy, (*x.shape[:-1], n), on=x)
    _check_index(op, layout, x)
    dy, x = autocast(dy, x)
    check_tensor(op, "dy", dy, (*x.shape[:-1], n), like=x)
    chosen = choose_backend(op, backend, x, BACKENDS, layout.block)
    return ops.block_grad(as_rows(dy, 1), as_rows(x, 1), *layout.tensors, *layout.block, chosen)


def _check_values(op: str, values: Tensor, layout: BlockLayout) -> tuple[int, int]:
    _check_layout(op, layout)
    check_tensor(op, "values", values, layout.values_shape)
    _check_index(op, layout, values)
    return layout.shape


def _check_layout(op: str, layout: object) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"{op}: layout must be a BlockLayout, got {type(layout).__name__}")
    check_pair(op, "layout.shape", layout.shape, 0)
    check_pair(op, "layout.block", layout.block, 1)
    check_tensor(op, "layout.rows", layout.rows, (None,), dtype=torch.int32)


def _check_index(op: str, layout: BlockLayout, operand: Tensor) -> None:
    """Raises unless all index tensors are as long as they must be and where the operand is."""
    (rows, columns), blocks = layout.grid, layout.rows.shape[0]
    sizes = (blocks, blocks, rows + 1, columns + 1, blocks, blocks, rows, columns, blocks)
    for name, index, size in zip(BlockLayout._fields[2:], layout.tensors, sizes, strict=True):
        check_tensor(op, f"layout.{name}", index, (size,), dtype=torch.int32, on=operand, is_index=True)
