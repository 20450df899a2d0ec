"""Where the kept blocks of a block-masked weight lie, in the orders that forward and backward read them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_pair, check_readable, check_tensor


class BlockLayout(NamedTuple):
    """Positions of the kept ``bn x bk`` blocks of a weight ``W[N, K]``.

    Only the kept blocks are stored, ``[blocks, bn, bk]``, block row after block row. With ``R = ceil(N / bn)`` and
    ``C = ceil(K / bk)`` the weight has ``R x C`` blocks. Blocks at the lower and right edges reach past ``N`` and ``K``
    where these are no multiples. What lies outside is padding: finite values there change no result, and their gradient
    is zero.

    Attributes:
        shape: ``(N, K)``.
        block: ``(bn, bk)``.
        rows: int32 ``[blocks]``, block row of each stored block, ascending.
        cols: int32 ``[blocks]``, block column of each stored block, ascending within a row.
        row_ptr: int32 ``[R + 1]``; blocks ``row_ptr[r] .. row_ptr[r+1]-1`` form block row ``r``.
        col_ptr: int32 ``[C + 1]``, the same for block columns, counting in ``col_order``.
        col_order: int32 ``[blocks]``, storage positions ordered by column, then row.
        col_rows: int32 ``[blocks]``, block row of each entry of ``col_order``.
        longest_rows: int32 ``[R]``, block rows by falling number of blocks: the order in which programs start.
        longest_cols: int32 ``[C]``, the same for block columns.
        panels: int32 ``[blocks]``, storage positions by panels of 32 block rows, within a panel by column: dW taken
            in this order finds its operands in L2.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    rows: Tensor
    cols: Tensor
    row_ptr: Tensor
    col_ptr: Tensor
    col_order: Tensor
    col_rows: Tensor
    longest_rows: Tensor
    longest_cols: Tensor
    panels: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> "BlockLayout":
        """Builds the layout from a bool mask over the block grid.

        Args:
            mask: bool ``[ceil(N / bn), ceil(K / bk)]``, true where a block is kept. Any pattern.
            shape: ``(N, K)``.
            block: ``(bn, bk)``, each at least 1.

        Raises:
            TypeError: ``mask`` is not bool.
            ValueError: Its shape does not fit, a size is negative, or it is on the meta device.
        """
        op = "BlockLayout.from_mask"
        shape, block = check_pair(op, "shape", shape, 0), check_pair(op, "block", block, 1)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
        if tuple(mask.shape) != grid(shape, block):
            raise ValueError(
                f"{op}: mask must have shape {list(grid(shape, block))} for a weight {list(shape)} in blocks "
                f"{list(block)}, got {list(mask.shape)}"
            )
        check_readable(op, "mask", mask)
        rows, cols = mask.nonzero(as_tuple=True)
        order = cols.argsort(stable=True)
        int32 = torch.int32
        return cls(
            shape,
            block,
            rows.to(int32),
            cols.to(int32),
            _pointers(mask.sum(1)),
            _pointers(mask.sum(0)),
            order.to(int32),
            rows[order].to(int32),
            mask.sum(1).argsort(descending=True, stable=True).to(int32),
            mask.sum(0).argsort(descending=True, stable=True).to(int32),
            (rows // 32 * max(mask.shape[1], 1) + cols).argsort(stable=True).to(int32),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns, ``(R, C)``."""
        return grid(self.shape, self.block)

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """Shape of the stored values, ``(blocks, bn, bk)``."""
        return (self.rows.shape[0], *self.block)

    @property
    def tensors(self) -> list[Tensor]:
        """The index tensors, in the order in which the ``torch.library`` operations take them."""
        return list(self[2:])

    def mask(self) -> Tensor:
        """The bool mask over the block grid that the layout was built from, ``[R, C]``."""
        mask = self.rows.new_zeros(self.grid, dtype=torch.bool)
        mask[self.rows.long(), self.cols.long()] = True
        return mask

    def to_dense(self, values: Tensor) -> Tensor:
        """Expands values ``[blocks, bn, bk]`` of any dtype to the weight ``[N, K]``, zero elsewhere; differentiable."""
        check_tensor("BlockLayout.to_dense", "values", values, self.values_shape, any_dtype=True)
        (r, c), (bn, bk) = self.grid, self.block
        tiles = values.new_zeros(r, c, bn, bk).index_put((self.rows.long(), self.cols.long()), values)
        return tiles.transpose(1, 2).reshape(r * bn, c * bk)[: self.shape[0], : self.shape[1]]

    def from_dense(self, weight: Tensor) -> Tensor:
        """Takes the kept blocks ``[blocks, bn, bk]`` of a weight ``[N, K]`` of any dtype; padding is zero."""
        check_tensor("BlockLayout.from_dense", "weight", weight, self.shape, any_dtype=True)
        return tiles(weight, self.block)[self.rows.long(), self.cols.long()]

    def validate(self) -> "BlockLayout":
        """Reads the index tensors and checks that they describe one set of blocks; returns the layout.

        Raises:
            TypeError: An index is no int32 tensor.
            ValueError: An index has another length than it must have, or holds other numbers than
                :meth:`from_mask` would put there.
        """
        for name, index in zip(self._fields[2:], self.tensors, strict=True):
            check_tensor("BlockLayout.validate", name, index, (None,), dtype=torch.int32)
        fresh = None
        rows, cols = self.rows, self.cols
        inside = rows.shape == cols.shape and bool(
            ((rows >= 0) & (rows < self.grid[0]) & (cols >= 0) & (cols < self.grid[1])).all()
        )
        if inside:
            fresh = BlockLayout.from_mask(self.mask(), self.shape, self.block)
        if fresh is None or any(not torch.equal(a, b) for a, b in zip(fresh.tensors, self.tensors, strict=True)):
            raise ValueError(
                f"BlockLayout.validate: {', '.join(self._fields[2:])} do not describe one set of blocks in a grid of "
                f"{list(self.grid)}"
            )
        return self


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Block rows and columns that cover ``shape``: ``(ceil(N / bn), ceil(K / bk))``."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def tiles(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Cuts ``[N, K]`` into ``[R, C, bn, bk]``, padded with zeros (False for bool)."""
    (n, k), (bn, bk) = weight.shape, block
    r, c = grid((n, k), block)
    padded = torch.nn.functional.pad(weight, (0, c * bk - k, 0, r * bn - n))
    return padded.view(r, bn, c, bk).transpose(1, 2)


def _pointers(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
