"""Blocks over planes of children: every plane has a block grid of its own."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad


class PlaneGrid(NamedTuple):
    """How a wide weight is cut into planes, and each plane into blocks.

    Along an axis with several planes, each plane is padded to whole blocks, so that a block never holds weights of two
    children with different numbers: ``P * size`` rows or columns become ``P * padded``.

    Attributes:
        outputs: Rows of the wide weight.
        inputs: Columns of the wide weight.
        block: ``(bn, bk)``.
        planes: Planes along the outputs and along the inputs.
    """

    outputs: int
    inputs: int
    block: tuple[int, int]
    planes: tuple[int, int]

    def plane(self, axis: int) -> tuple[int, int]:
        """Size of a plane along the outputs (0) or the inputs (1), and that size padded to whole blocks."""
        size = (self.outputs, self.inputs)[axis] // self.planes[axis]
        return size, size if self.planes[axis] == 1 else size + -size % self.block[axis]

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Shape of the weight with every plane padded."""
        return self.planes[0] * self.plane(0)[1], self.planes[1] * self.plane(1)[1]

    @property
    def blocks_shape(self) -> tuple[int, int]:
        """Block rows and block columns."""
        rows, columns = (-(-size // side) for size, side in zip(self.padded_shape, self.block, strict=True))
        return rows, columns

    def pad(self, t: Tensor, dim: int, axis: int) -> Tensor:
        """Pads the planes that lie along a dimension."""
        size, padded = self.plane(axis)
        if size == padded:
            return t
        t = t.movedim(dim, -1).unflatten(-1, (self.planes[axis], size))
        return pad(t, (0, padded - size)).flatten(-2).movedim(-1, dim)

    def crop(self, t: Tensor, dim: int, axis: int) -> Tensor:
        """Takes the padding away again."""
        size, padded = self.plane(axis)
        if size == padded:
            return t
        t = t.movedim(dim, -1).unflatten(-1, (self.planes[axis], padded))
        return t[..., :size].flatten(-2).movedim(-1, dim)

    def to_planes(self, wide: Tensor) -> Tensor:
        """A wide weight with its planes padded."""
        return self.pad(self.pad(wide, 0, 0), 1, 1)

    def from_planes(self, padded: Tensor) -> Tensor:
        """The wide weight again."""
        return self.crop(self.crop(padded, 0, 0), 1, 1)

    @property
    def padding(self) -> float:
        """Entries of all blocks of the grid over the entries of the weight; 1 for an empty weight."""
        rows, columns = self.blocks_shape
        area = self.outputs * self.inputs
        return rows * columns * self.block[0] * self.block[1] / area if area else 1.0

    def thriftiest(self, least: int = 1) -> "PlaneGrid":
        """The grid that pads least when the sides of the block are halved any number of times; of equals, the largest.

        Args:
            least: Sides are not halved below this. A side that is smaller already stays.
        """
        sides = [[side, *(side >> i for i in range(1, side.bit_length()) if side >> i >= least)] for side in self.block]
        grids = [self._replace(block=(bn, bk)) for bn in sides[0] for bk in sides[1]]
        return min(grids, key=lambda grid: (grid.padding, -grid.block[0] * grid.block[1]))
