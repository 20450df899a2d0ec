"""Labels as bits: which child owns each edge, in ``log2(alpha)`` bits a weight."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_readable, check_tensor

HOLE = 255
"""Label of an edge that no child owns. Any label outside ``0 .. alpha-1`` means the same."""

ROW_BYTES = 16
"""A row of bits is padded to whole multiples of this, so that every row of bits starts aligned."""


class PackedLabels(NamedTuple):
    """The labels of a weight ``w[N, K]``, a plane of bits for each binary digit of the label.

    One table serves both orientations of the weight: ``w.T`` goes with ``labels.T``, which copies nothing.

    The bits of a row lie in groups of 128 edges, 16 bytes. Edge ``32 s + 8 t + 4 h + 2 l + p`` of a group (``s`` and
    ``t`` of 0 .. 3, the others of 0 and 1) is bit ``2 s + h`` of byte ``4 t + 2 p + l``. In the 32-bit word ``t`` the
    bits of two neighbouring 16-bit weights stand 16 bits apart, and one word serves the lane of a warp that holds the
    eight edges ``t`` of every 32.

    An edge that nobody owns (a hole) has label 0 and a zero in one more plane. Only dW reads that plane: **in the
    kernels' forward a hole is a weight that is stored as zero.** Whoever packs labels with holes must store zeros
    there. The layers of ``fpe`` pack labels without holes, and a :class:`Bitmap` says which edges exist.

    Attributes:
        planes: uint8 ``[P, N, bytes]``, ``P = max(ceil(log2(alpha)), 1)``; ``[P + 1, ...]`` with holes, the last plane
            being one where a child owns the edge.
        shape: ``(N, K)`` as the planes store it.
        alpha: Number of children.
        transposed: Whether these are the labels of the transposed weight.
    """

    planes: Tensor
    shape: tuple[int, int]
    alpha: int
    transposed: bool = False

    @classmethod
    def pack(cls, labels: Tensor, alpha: int) -> "PackedLabels":
        """Packs a table of labels; :meth:`unpack` is its exact inverse, up to holes becoming ``HOLE``.

        Args:
            labels: uint8 ``[N, K]``; any label not below ``alpha`` is a hole.
            alpha: Number of children, 1 to 254.

        Raises:
            TypeError: ``labels`` is not a uint8 tensor.
            ValueError: Its shape or ``alpha`` does not fit, or it is on the meta device.
        """
        op = "PackedLabels.pack"
        check_tensor(op, "labels", labels, (None, None), dtype=torch.uint8)
        check_readable(op, "labels", labels)
        check_alpha(op, alpha)
        planes = pack_planes(labels, alpha)
        holes = bool((labels >= alpha).any())
        return cls(planes if holes else planes[:-1], (labels.shape[0], labels.shape[1]), alpha)

    def unpack(self) -> Tensor:
        """The labels, uint8: ``[N, K]``, or ``[K, N]`` where transposed; ``HOLE`` where nobody owns the edge."""
        return unpack_planes(self.planes, *self.shape, self.alpha, self.transposed)

    @property
    def T(self) -> "PackedLabels":  # noqa: N802 - as of a tensor
        """The labels of the transposed weight; shares the planes."""
        return self._replace(transposed=not self.transposed)

    @property
    def sizes(self) -> tuple[int, int]:
        """``(N, K)`` of the weight that is meant: turned where transposed."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def words(self) -> Tensor:
        """The planes as the kernels read them: int32 ``[P, N, bytes / 4]``, the same memory."""
        return self.planes.view(torch.int32) if self.shape[1] else self.planes.int()

    @property
    def has_holes(self) -> bool:
        """Whether there is a plane of owned edges."""
        return self.planes.shape[0] > digits(self.alpha)

    def to(self, device: torch.device | str) -> "PackedLabels":
        """The same labels on another device."""
        return self._replace(planes=self.planes.to(device))


def check_alpha(op: str, alpha: object) -> None:
    """Raises unless ``alpha`` is a number of children that labels can hold."""
    if not isinstance(alpha, int) or isinstance(alpha, bool) or not 1 <= alpha < HOLE:
        raise ValueError(f"{op}: alpha must be an integer from 1 to {HOLE - 1}, got {alpha!r}")


def digits(alpha: int) -> int:
    """Planes that labels below ``alpha`` take."""
    return max((alpha - 1).bit_length(), 1)


def row_bytes(k: int) -> int:
    """Bytes of a row of ``k`` bits."""
    return -(-k // (8 * ROW_BYTES)) * ROW_BYTES


def pack_planes(labels: Tensor, alpha: int) -> Tensor:
    """Planes of ``labels[N, K]`` with the plane of owned edges last: ``[digits(alpha) + 1, N, row_bytes(K)]``."""
    owned = labels < alpha
    code = torch.where(owned, labels, labels.new_zeros(()))
    planes = [(code >> digit) & 1 for digit in range(digits(alpha))]
    bits = torch.stack([*planes, owned.to(torch.uint8)])
    k = labels.shape[1]
    return _in_order(pad(bits, (0, 8 * row_bytes(k) - k)))


def _in_order(bits: Tensor) -> Tensor:
    """Bytes of bits ``[P, N, edges]``, whole groups of 128 edges, each in its place."""
    p, n, edges = bits.shape
    bits = bits.view(p, n, edges // (8 * ROW_BYTES), 4, 4, 2, 2, 2)  # group, s, t, h, l, p
    bits = bits.permute(0, 1, 2, 4, 7, 6, 3, 5).reshape(p, n, edges // 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def from_nibbles(planes: Tensor) -> Tensor:
    """Planes in the order of :class:`PackedLabels` from the older order in which state dicts of format 2 were written.

    There byte ``b`` of a row holds edges ``8 b .. 8 b + 7``: in its low four bits those of even ``k``, in its high four
    bits those of odd ``k``.
    """
    bits = (planes[..., None] >> torch.arange(8, dtype=torch.uint8, device=planes.device)) & 1
    return _in_order(bits.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(2))


def unpack_planes(planes: Tensor, n: int, k: int, alpha: int, transposed: bool) -> Tensor:
    """Labels of packed planes: uint8 ``[n, k]``, or ``[k, n]`` where transposed."""
    by_edge = planes.view(len(planes), n, row_bytes(k) // ROW_BYTES, 4, 2, 2).transpose(-1, -2).contiguous()  # t, l, p
    pairs = [torch.stack([(by_edge >> bit) & 1, (by_edge >> bit + 1) & 1], 4) for bit in (0, 2, 4, 6)]  # t, h, l, p
    bits = torch.stack(pairs, 3).flatten(2)[:, :, :k]
    labels = bits[0]
    for digit in range(1, digits(alpha)):
        labels = labels | (bits[digit] << digit)
    if planes.shape[0] > digits(alpha):
        labels = torch.where(bits[-1] == 1, labels, labels.new_full((), HOLE))
    return labels.T if transposed else labels
