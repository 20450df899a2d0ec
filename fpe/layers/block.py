"""The layer of which whole blocks are kept."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpe.kernels import BlockLayout, block_matmul
from fpe.kernels.bitmap.layout import pack_bits, unpack_bits
from fpe.kernels.block.layout import tiles

from ..partition import check_block
from .base import ExpandedLinear, check_known
from .grid import PlaneGrid
from .placement import overwrite, whole
from .state import Header, to_bits, to_words

COPIED_IN_A_LOOP = 20_000
"""Entries that a CPU copies in the time that the loop takes for one row or column of blocks; measured on x86."""


class Partial(NamedTuple):
    """Blocks that are kept in part.

    Attributes:
        blocks: Their places among the stored ones, int64 ``[P]``.
        bits: Which of their entries are edges, a row for each: :func:`.pack_bits`.
    """

    blocks: Tensor
    bits: Tensor

    @classmethod
    def of(cls, inside: Tensor, real: Tensor) -> "Partial | None":
        """The blocks of ``inside[blocks, bn, bk]`` that lack some of their ``real`` entries."""
        blocks = (inside != real).flatten(1).any(1).nonzero().squeeze(1)
        return cls(blocks, pack_bits(inside[blocks].flatten(1))) if len(blocks) else None

    def edges_of(self, block: tuple[int, int]) -> Tensor:
        """Which entries are edges, bool ``[P, bn, bk]``."""
        return unpack_bits(self.bits, block[0] * block[1]).unflatten(1, block)


class BlockLinear(ExpandedLinear):
    """A linear layer that keeps whole blocks of its weight: an expanded layer or a successor.

    Rows or columns may be grouped in planes of children (``planes``). Each plane has a block grid of its own, so a
    block never holds weights of children with different numbers. A few weights inside a kept block may be removed
    too, if the number of non-zeros is not a multiple of the block's size.

    ``edge_weight`` holds the kept blocks, ``[blocks, bn, bk]``. Blocks that reach beyond the weight are padded with
    zeros.

    Args:
        kept: bool ``[outputs, inputs]``, true where an edge exists.
        block: ``(bn, bk)``.
        planes: Planes along the outputs and along the inputs.
        bias: Whether outputs have a bias.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"eager"``.
        device: As in ``nn.Linear``.
        dtype: As in ``nn.Linear``.

    Raises:
        TypeError: ``kept`` is not a bool tensor.
        ValueError: ``kept`` is not a matrix or is on ``"meta"``, ``planes`` do not divide the sizes, or ``block`` is
            not a pair of positive integers.

    Example:
        >>> kept = torch.eye(2, dtype=torch.bool).repeat_interleave(4, 0).repeat_interleave(4, 1)
        >>> layer = fpe.BlockLinear(kept, block=(4, 4))
        >>> layer(torch.ones(3, 8)).shape, layer.edge_weight.shape
        (torch.Size([3, 8]), torch.Size([2, 4, 4]))
    """

    KIND = 3
    STORED = ("layout", "block_mask", "partial")
    layout: BlockLayout
    """Where the kept blocks lie in the grid over the planes."""
    block_mask: Tensor
    """Which blocks are kept, bool ``[block rows, block columns]``."""
    planes: tuple[int, int] = (1, 1)
    partial: "Partial | None"
    """The blocks that lack some of their edges, or ``None``; a policy leaves at most one of them."""

    def __init__(
        self,
        kept: Tensor,
        block: tuple[int, int],
        planes: tuple[int, int] = (1, 1),
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        outputs, inputs = check_known("BlockLinear", "kept", kept, torch.bool).shape
        super().__init__(inputs, outputs, backend)
        self.block_shape = check_block("BlockLinear", block)
        self.planes = planes
        if outputs % planes[0] or inputs % planes[1]:
            raise ValueError(f"BlockLinear: planes {planes} must divide the weight's {outputs} x {inputs}")
        self._build((_count(kept, self.grid), *self.block_shape), bias, kept, device=device, dtype=dtype)

    @property
    def unit(self) -> tuple[int, int]:
        """A block."""
        return self.block_shape

    @property
    def grid(self) -> PlaneGrid:
        """How the wide weight is cut into planes and blocks."""
        return PlaneGrid(self.out_features, self.in_features, self.block_shape, self.planes)

    def _multiply(self, x: Tensor) -> Tensor:
        grid, layout = self.grid, self._beside(self.edge_weight, self.layout)
        if self.planes[1] > 1:
            x = grid.pad(x, -1, 1)
        values = self._kept_values(self.edge_weight)
        bias = None if self.bias is None else grid.pad(self.bias, -1, 0)
        y = block_matmul(x, values, layout, bias, backend=self.backend)
        return grid.crop(y, -1, 0)

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[outputs, inputs]``."""
        values = self._kept_values(whole(self.edge_weight))
        return self.grid.from_planes(self._beside(values, self.layout).to_dense(values))

    def masked_copy(self) -> Tensor | None:
        """:meth:`wide_weight` if blocks are small; ``None`` if a loop over rows and columns of blocks is faster."""
        loops = sum(self.block_mask.shape)
        if self.in_features * self.out_features > loops * COPIED_IN_A_LOOP:
            return None
        return self.wide_weight().contiguous()

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist."""
        inside = self.block_mask.new_ones(self.layout.values_shape)
        return self.grid.from_planes(self.layout.to_dense(self._kept_values(inside)))

    @torch.no_grad()
    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask of whole blocks; see :meth:`ExpandedLinear.rewire`."""
        count = _count(kept, self.grid)
        if count != len(self.layout.rows):
            raise ValueError(f"BlockLinear.rewire: expected a mask of {len(self.layout.rows)} blocks, got {count}")
        tensors = (self.edge_weight, *followers)
        stay = self.grid.to_planes(kept & self.kept())
        dense = [self.layout.to_dense(whole(tensor)) for tensor in tensors]
        self._set_topology(kept)
        for tensor, old in zip(tensors, dense, strict=True):
            overwrite(tensor, self.layout.from_dense(torch.where(stay, old, 0)))

    @torch.no_grad()
    def set_wide_weight(self, weight: Tensor) -> None:
        """Takes the weights of the kept edges from a dense weight ``[outputs, inputs]``."""
        self._check_weight("set_wide_weight", weight, (self.out_features, self.in_features))
        self.set_edge_weight(self.layout.from_dense(self.grid.to_planes(torch.where(self.kept(), weight, 0))))

    def _removed(self) -> Tensor:
        """Returns the entries that are not edges, the padding of edge blocks among them."""
        return ~self.layout.from_dense(self.grid.to_planes(self.kept()))

    def _kept_values(self, values: Tensor) -> Tensor:
        """Values of any dtype, zero at the edges that partly kept blocks lack."""
        partial = self._beside(values, self.partial)
        if partial is None:
            return values
        own = torch.where(partial.edges_of(self.block_shape), values[partial.blocks], values.new_zeros(()))
        return values.index_copy(0, partial.blocks, own)

    def _set_topology(self, topology: Tensor) -> None:
        """Lays out the blocks of a mask ``[outputs, inputs]``, and what is removed inside them."""
        grid = self.grid
        kept_tiles = tiles(grid.to_planes(topology), grid.block)
        self.block_mask = kept_tiles.flatten(2).any(-1)
        self.layout = BlockLayout.from_mask(self.block_mask, grid.padded_shape, grid.block)
        at = self.layout.rows.long(), self.layout.cols.long()
        real = tiles(grid.to_planes(torch.ones_like(topology)), grid.block)[at]
        inside = kept_tiles[at]
        self.partial = Partial.of(inside, real)
        words = [self.block_mask] if self.partial is None else [self.block_mask, inside]
        self._topology_is(torch.cat([to_words(t) for t in words]))

    def _header(self) -> Header:
        return super()._header()._replace(settings=(*self.block_shape, *self.planes))

    @classmethod
    def _parse(cls, header: Header, words: Tensor) -> Tensor:
        bn, bk, p, q = header.settings
        if min(header.settings) < 1 or header.out_features % p or header.in_features % q:
            raise ValueError(
                f"blocks {bn} x {bk} in planes ({p}, {q}) fit no {header.out_features} x {header.in_features}"
            )
        grid = PlaneGrid(header.out_features, header.in_features, (bn, bk), (p, q))
        block_mask, rest = to_bits(words, *grid.blocks_shape)
        layout = BlockLayout.from_mask(block_mask, grid.padded_shape, grid.block)
        inside = block_mask.new_ones(layout.values_shape)
        if len(rest):
            inside, rest = to_bits(rest, *layout.values_shape)
        kept = grid.from_planes(layout.to_dense(inside))
        if len(rest) or _count(kept, grid) != len(layout.rows):
            raise ValueError(f"the mask of blocks and the masks inside them disagree ({len(rest)} words left over)")
        return kept

    def _fit(self, topology: Tensor, name: str) -> None:
        count, own = _count(topology, self.grid), len(self.layout.rows)
        if count != own:
            raise ValueError(
                f"state dict: '{name}' has {count} blocks, this layer {own}: its parameter would have to be another, "
                "which no optimizer knows; build the model from the state with fpe.restore"
            )

    @classmethod
    def _of(cls, header: Header, topology: Tensor, bias: bool, **factory: Any) -> "BlockLinear":
        bn, bk, p, q = header.settings
        return cls(topology, (bn, bk), (p, q), bias, **factory)

    def _repr_details(self) -> str:
        return f"block={self.block_shape}, blocks={len(self.layout.rows)} of {self.block_mask.numel()}, "


def _count(kept: Tensor, grid: PlaneGrid) -> int:
    """Blocks that hold an edge."""
    return int(tiles(grid.to_planes(kept), grid.block).flatten(2).any(-1).sum())
