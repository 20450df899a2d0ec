"""The layer of which whole blocks are kept."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ..kernels import BlockLayout, block_matmul
from ..kernels.block.layout import tiles
from ..partition import check_block
from .base import ExpandedLinear, expect
from .dense_form import dense_weight

COPIED_IN_A_LOOP = 20_000
"""Entries that a CPU copies in the time that it takes for a row or column of blocks; measured on x86."""


class BlockLinear(ExpandedLinear):
    """A linear layer of which whole blocks are kept: an expanded layer or a successor.

    Rows or columns may lie in planes of children (``planes``); the block grid is laid over each plane on its
    own, so that a block never holds weights of two children of different number. A few weights inside a kept
    block may be removed too, where a non-zero count that no block divides demands it.

    Args:
        kept: bool ``[outputs, inputs]``, true where an edge exists.
        block: ``(bn, bk)``.
        planes: Planes along the outputs and along the inputs.
        bias: Whether outputs have a bias.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.
        device: As of ``nn.Linear``.
        dtype: As of ``nn.Linear``.

    Raises:
        ValueError: ``planes`` do not divide the sizes, or ``block`` is no pair of positive integers.
    """

    values: nn.Parameter
    block_mask: Tensor
    inside: Tensor | None
    rows: Tensor
    cols: Tensor
    made_of = ("values", "rows", "cols", "inside")

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
        outputs, inputs = kept.shape
        super().__init__(inputs, outputs, backend)
        self.block_shape = check_block("BlockLinear", block)
        self.planes = planes
        if outputs % planes[0] or inputs % planes[1]:
            raise ValueError(f"BlockLinear: planes {planes} must divide the weight's {outputs} x {inputs}")
        self._set_mask(kept.to(device=device))
        self.values = nn.Parameter(torch.empty(self.layout.values_shape, device=device, dtype=dtype))
        self.bias = self._make_bias(bias, device=device, dtype=dtype)
        self.reset_parameters(inputs)

    @property
    def layout(self) -> BlockLayout:
        """Where the kept blocks lie in the grid over the planes."""
        return BlockLayout(
            self._padded_shape(), self.block_shape, *(self.get_buffer(name) for name in BlockLayout._fields[2:])
        )

    def forward(self, x: Tensor) -> Tensor:
        """``y = x @ W.T + bias``, at the cost of the kept blocks."""
        dense = dense_weight(self, x)
        if dense is not None:
            return linear(x, dense, self.bias)
        if self.planes[1] > 1:
            x = self._pad_planes(x, -1, 1)
        bias = None if self.bias is None else self._pad_planes(self.bias, -1, 0)
        y = block_matmul(x, self._kept_values(), self.layout, bias, backend=self.backend)
        return self._crop_planes(y, -1, 0)

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[outputs, inputs]``."""
        return self._from_planes(self.layout.to_dense(self._kept_values()))

    def masked_copy(self) -> Tensor | None:
        """:meth:`wide_weight`, unless blocks are so large that a loop over their rows and columns is quicker."""
        loops = sum(self.block_mask.shape)
        if self.in_features * self.out_features > loops * COPIED_IN_A_LOOP:
            return None
        return self.wide_weight().contiguous()

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist."""
        inside = self.inside
        if inside is None:
            inside = self.values.new_ones(self.layout.values_shape, dtype=torch.bool)
        return self._from_planes(self.layout.to_dense(inside))

    @torch.no_grad()
    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask of whole blocks; see :meth:`ExpandedLinear.rewire`."""
        count = int(tiles(self._to_planes(kept), self.block_shape).flatten(2).any(-1).sum())
        if count != len(self.rows):
            raise ValueError(f"BlockLinear.rewire: expected a mask of {len(self.rows)} blocks, got {count}")
        tensors = (self.values.data, *followers)
        stay = self._to_planes(kept & self.kept())
        dense = [self.layout.to_dense(tensor) for tensor in tensors]
        self._set_mask(kept)
        for tensor, old in zip(tensors, dense, strict=True):
            tensor.copy_(self.layout.from_dense(torch.where(stay, old, 0)))

    @torch.no_grad()
    def clear_removed(self) -> None:
        """Sets the stored values of removed edges, and the padding of edge blocks, to zero."""
        self.set_wide_weight(self.wide_weight())

    @torch.no_grad()
    def set_wide_weight(self, weight: Tensor) -> None:
        """Takes the kept weights from a dense ``[outputs, inputs]``."""
        self.values.copy_(self.layout.from_dense(self._to_planes(torch.where(self.kept(), weight, 0))))

    def _kept_values(self) -> Tensor:
        if self.inside is None:
            return self.values
        return torch.where(self.inside, self.values, self.values.new_zeros(()))

    def _set_mask(self, kept: Tensor) -> None:
        """Lays out the blocks of a mask ``[outputs, inputs]``, and what is removed inside them."""
        kept_tiles = tiles(self._to_planes(kept), self.block_shape)
        self._set_topology(kept_tiles.flatten(2).any(-1))
        at = self.layout.rows.long(), self.layout.cols.long()
        real = tiles(self._to_planes(torch.ones_like(kept)), self.block_shape)[at]
        inside = kept_tiles[at]
        self.register_buffer("inside", None if torch.equal(inside, real) else inside)

    def _set_topology(self, block_mask: Tensor) -> None:
        layout = BlockLayout.from_mask(block_mask, self._padded_shape(), self.block_shape)
        self.register_buffer("block_mask", block_mask)
        for name, index in zip(BlockLayout._fields[2:], layout.tensors, strict=True):
            self.register_buffer(name, index, persistent=False)

    # Planes: [P * size] <-> [P * padded], so that the block grid starts anew in every plane.

    def _plane(self, axis: int) -> tuple[int, int]:
        """Size of a plane along the outputs (0) or the inputs (1), and that size padded to whole blocks."""
        size = (self.out_features, self.in_features)[axis] // self.planes[axis]
        return size, size if self.planes[axis] == 1 else size + -size % self.block_shape[axis]

    def _padded_shape(self) -> tuple[int, int]:
        return self.planes[0] * self._plane(0)[1], self.planes[1] * self._plane(1)[1]

    def _pad_planes(self, t: Tensor, dim: int, axis: int) -> Tensor:
        size, padded = self._plane(axis)
        if size == padded:
            return t
        t = t.movedim(dim, -1).unflatten(-1, (self.planes[axis], size))
        return pad(t, (0, padded - size)).flatten(-2).movedim(-1, dim)

    def _crop_planes(self, t: Tensor, dim: int, axis: int) -> Tensor:
        size, padded = self._plane(axis)
        if size == padded:
            return t
        t = t.movedim(dim, -1).unflatten(-1, (self.planes[axis], padded))
        return t[..., :size].flatten(-2).movedim(-1, dim)

    def _to_planes(self, wide: Tensor) -> Tensor:
        return self._pad_planes(self._pad_planes(wide, 0, 0), 1, 1)

    def _from_planes(self, padded: Tensor) -> Tensor:
        return self._crop_planes(self._crop_planes(padded, 0, 0), 1, 1)

    # The number of stored blocks belongs to the state, so that loading may change it.

    def _header(self) -> list[int]:
        return [*super()._header(), *self.block_shape, *self.planes]

    @classmethod
    def _empty(cls, header: list[int], own: Mapping[str, Tensor]) -> ExpandedLinear:
        inputs, outputs, bn, bk, *planes = header[2:]
        kept = torch.ones(outputs, inputs, dtype=torch.bool, device=own["values"].device)
        factory = {"device": kept.device, "dtype": own["values"].dtype}
        return cls(kept, (bn, bk), (planes[0], planes[1]), "bias" in own, **factory)  # type: ignore[arg-type]

    def _expected_tensors(self) -> dict[str, list[int]]:
        expected = super()._expected_tensors()
        expected.pop("inside", None)
        del expected["values"]
        return expected

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises unless the state fits, block mask included; see :meth:`ExpandedLinear.check_state`."""
        super().check_state(state, prefix)
        block_mask = state[f"{prefix}block_mask"]
        expect(f"{prefix}block_mask", block_mask.dtype, torch.bool)
        shape = [int(block_mask.sum()), *self.block_shape]
        values, inside = state.get(f"{prefix}values"), state.get(f"{prefix}inside")
        expect(f"{prefix}values", list(values.shape) if isinstance(values, Tensor) else values, shape)
        if inside is not None:
            expect(f"{prefix}inside", (list(inside.shape), inside.dtype), (shape, torch.bool))

    def _adopt_topology(self, state: Mapping[str, Any], prefix: str) -> None:
        device = self.block_mask.device
        incoming = state[f"{prefix}block_mask"].to(device)
        if not torch.equal(incoming, self.block_mask):
            self._set_topology(incoming.clone())
            shape = self.layout.values_shape
            self.values = nn.Parameter(self.values.new_empty(shape), self.values.requires_grad)
        inside = state.get(f"{prefix}inside")
        self.register_buffer("inside", None if inside is None else inside.to(device).clone())

    def _repr_details(self) -> str:
        return f"block={self.block_shape}, blocks={len(self.rows)} of {self.block_mask.numel()}, "
