"""Which entries of a weight exist: a bit for each position, and how many come before each run of 256."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_readable, check_tensor

WORD = 32
"""Positions to a word of bits."""
RUN = 256
"""Positions to a number of values before them: 8 words, so that the index is 1.125 bits a position."""
NARROW = 2**31
"""Values from which on the numbers of values have 64 bits."""


class Bitmap(NamedTuple):
    """Which entries of a weight ``w[N, K]`` exist. The kept ones are stored alone, ``values[nnz]``, row after row.

    A value's place is ``starts`` of its run and the number of ones before its bit in that run, so that any tile can be
    read without those before it. One bitmap serves both orientations of the weight: ``w.T`` goes with ``bitmap.T`` and
    the same values.

    Attributes:
        bits: int32 ``[N, ceil(K / 32)]``: bit ``j`` of word ``s`` is position ``32 s + j``. Bits past ``K`` are zero.
        starts: ``[N, ceil(K / 256)]``: kept values before each run of 256 positions; int32, int64 from 2^31 values on.
        shape: ``(N, K)`` as the values are stored.
        nnz: Number of kept values.
        transposed: Whether this is the bitmap of the transposed weight.
    """

    bits: Tensor
    starts: Tensor
    shape: tuple[int, int]
    nnz: int
    transposed: bool = False

    @classmethod
    def pack(cls, mask: Tensor) -> "Bitmap":
        """Packs a mask; :meth:`unpack` is its exact inverse.

        Args:
            mask: bool ``[N, K]``, true where an entry exists. Any pattern.

        Raises:
            TypeError: ``mask`` is no bool tensor.
            ValueError: It is no matrix, or it is on the meta device.
        """
        op = "Bitmap.pack"
        check_tensor(op, "mask", mask, (None, None), dtype=torch.bool)
        check_readable(op, "mask", mask)
        n, k = mask.shape
        words, runs = -(-k // WORD), -(-k // RUN)
        octets = pad(mask, (0, words * WORD - k)).view(n, words * WORD // 8, 8).to(torch.uint8)
        octets = (octets << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)
        counts = pad(mask, (0, runs * RUN - k)).view(n, runs, RUN).sum(-1)
        ends = counts.flatten().cumsum(0)
        nnz = int(ends[-1]) if len(ends) else 0
        starts = (ends - counts.flatten()).view(n, runs).to(index_dtype(nnz))
        return cls(octets.view(torch.int32) if words else octets.int(), starts, (n, k), nnz)

    def unpack(self) -> Tensor:
        """The mask, bool ``[N, K]``, or ``[K, N]`` where transposed."""
        mask = self._mask()
        return mask.T if self.transposed else mask

    def _mask(self) -> Tensor:
        """The mask in stored order."""
        n, k = self.shape
        octets = self.bits.contiguous().view(torch.uint8) if k else self.bits.to(torch.uint8)
        ones = (octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
        return ones.view(n, self.bits.shape[1] * WORD)[:, :k].bool()

    @property
    def T(self) -> "Bitmap":  # noqa: N802 - as of a tensor
        """The bitmap of the transposed weight; shares the tensors."""
        return self._replace(transposed=not self.transposed)

    @property
    def sizes(self) -> tuple[int, int]:
        """``(N, K)`` of the weight that is meant: turned where transposed."""
        return self.shape[::-1] if self.transposed else self.shape

    def to(self, device: torch.device | str) -> "Bitmap":
        """The same bitmap on another device."""
        return self._replace(bits=self.bits.to(device), starts=self.starts.to(device))

    def to_dense(self, values: Tensor) -> Tensor:
        """Expands values ``[nnz]`` of any dtype to the weight, zero where no entry exists; differentiable."""
        check_tensor("Bitmap.to_dense", "values", values, (self.nnz,), any_dtype=True)
        dense = values.new_zeros(self.shape).masked_scatter(self._mask(), values)
        return dense.T if self.transposed else dense

    def from_dense(self, weight: Tensor) -> Tensor:
        """Takes the kept values of a weight of any dtype, ``[nnz]``; differentiable."""
        check_tensor("Bitmap.from_dense", "weight", weight, self.sizes, any_dtype=True)
        return (weight.T if self.transposed else weight)[self._mask()]

    def validate(self) -> "Bitmap":
        """Reads the tensors and checks that they fit each other; returns the bitmap.

        Raises:
            ValueError: Shapes or types differ, a bit past ``K`` is set, or ``starts`` or ``nnz`` do not count the bits.
        """
        check_bitmap("Bitmap.validate", self)
        fresh = Bitmap.pack(self._mask())
        if (
            fresh.nnz != self.nnz
            or not torch.equal(fresh.bits, self.bits)
            or not torch.equal(fresh.starts, self.starts)
        ):
            raise ValueError(
                f"Bitmap.validate: bits, starts and nnz = {self.nnz} do not describe one mask of {list(self.shape)}; "
                f"its bits are {fresh.nnz} entries"
            )
        return self


def index_dtype(nnz: int) -> torch.dtype:
    """What numbers of values are held in."""
    return torch.int32 if nnz < NARROW else torch.int64


def check_bitmap(op: str, kept: object, on: Tensor | None = None, name: str = "kept") -> None:
    """Raises unless ``kept`` is a bitmap whose tensors are as large as they must be, where ``on`` is.

    Raises:
        TypeError: It is no :class:`Bitmap`, or a tensor has another dtype.
        ValueError: A tensor has another shape, or lies elsewhere.
    """
    if not isinstance(kept, Bitmap):
        raise TypeError(f"{op}: {name} must be a Bitmap, got {type(kept).__name__}")
    n, k = kept.shape
    words, runs, on = (n, -(-k // WORD)), (n, -(-k // RUN)), kept.bits if on is None else on
    check_tensor(op, f"{name}.bits", kept.bits, words, dtype=torch.int32, on=on, is_index=True)
    check_tensor(op, f"{name}.starts", kept.starts, runs, dtype=index_dtype(kept.nnz), on=on, is_index=True)
