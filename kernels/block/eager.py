"""The block operations in plain PyTorch: their definition. Only the kept blocks are multiplied."""

from itertools import pairwise

from torch import Tensor
from torch.nn.functional import linear, pad

from ..activations import finish
from .layout import BlockLayout


def block_matmul_eager(
    x: Tensor, values: Tensor, layout: BlockLayout, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Eager twin of :func:`fpe.kernels.block_matmul` on ``x[M, K]``: returns ``y[M, N]``."""
    bn, bk = layout.block
    x_tiles = _tile(x, bk)  # [M, C, bk]
    bias_tiles = _tile((x.new_zeros(layout.shape[0]) if bias is None else bias)[None], bn)[0]  # [R, bn]
    y = bias_tiles.repeat(x.shape[0], 1, 1)
    for row, start, stop in _segments(layout.row_ptr):
        weight = values[start:stop].transpose(0, 1).flatten(1)  # [bn, blocks * bk]
        columns = x_tiles[:, layout.cols[start:stop].long()].flatten(1)  # [M, blocks * bk]
        y[:, row] = linear(columns, weight, bias_tiles[row])
    return finish(y.flatten(1)[:, : layout.shape[0]], activation)


def block_matmul_t_eager(dy: Tensor, values: Tensor, layout: BlockLayout) -> Tensor:
    """Eager twin of :func:`fpe.kernels.block_matmul_t` on ``dy[M, N]``: returns ``dx[M, K]``."""
    bn, bk = layout.block
    dy_tiles = _tile(dy, bn)  # [M, R, bn]
    dx = dy.new_zeros(dy.shape[0], layout.grid[1], bk)
    for col, start, stop in _segments(layout.col_ptr):
        order = layout.col_order[start:stop].long()
        weight = values[order].flatten(0, 1)  # [blocks * bn, bk]
        dx[:, col] = dy_tiles[:, layout.col_rows[start:stop].long()].flatten(1) @ weight
    return dx.flatten(1)[:, : layout.shape[1]].contiguous()


def block_grad_eager(dy: Tensor, x: Tensor, layout: BlockLayout) -> Tensor:
    """Eager twin of :func:`fpe.kernels.block_grad`: returns ``dvalues[blocks, bn, bk]``."""
    bn, bk = layout.block
    dy_tiles, x_tiles = _tile(dy, bn), _tile(x, bk)
    dvalues = x.new_zeros(layout.values_shape)
    for row, start, stop in _segments(layout.row_ptr):
        columns = x_tiles[:, layout.cols[start:stop].long()].flatten(1)  # [M, blocks * bk]
        grad = dy_tiles[:, row].mT @ columns  # [bn, blocks * bk]
        dvalues[start:stop] = grad.unflatten(1, (-1, bk)).transpose(0, 1)
    return dvalues


def _tile(x: Tensor, size: int) -> Tensor:
    """Cuts the features into tiles, padded with zeros: ``[M, F]`` to ``[M, ceil(F / size), size]``."""
    return pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size)) if x.shape[1] else x.unsqueeze(-1)


def _segments(pointers: Tensor) -> list[tuple[int, int, int]]:
    """Segments that have blocks, as ``(segment, start, stop)``, from ``row_ptr`` or ``col_ptr``."""
    bounds = pointers.tolist()
    return [(i, a, b) for i, (a, b) in enumerate(pairwise(bounds)) if a < b]


OPERATIONS = {
    "block_matmul": block_matmul_eager,
    "block_matmul_t": block_matmul_t_eager,
    "block_grad": block_grad_eager,
}
