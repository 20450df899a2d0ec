"""Which entries of a weight exist: a bit for each position, and how many come before each run of 1024."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_readable, check_tensor

WORD = 32
"""Positions of a word of bits."""
RUN = 1024
"""Positions for each of :attr:`Bitmap.starts`: 32 words, which a warp counts at once."""
BASE = 64 * RUN
"""Positions for each of :attr:`Bitmap.bases`, to which starts are relative, so that 16 bits are enough for these."""
NARROW = 2**31
"""From so many values on :attr:`Bitmap.bases` have 64 bits."""


class Bitmap(NamedTuple):
    """Which entries of a weight ``w[N, K]`` exist. Only the kept ones are stored, ``values[nnz]``, row after row.

    A value's place is the sum of its run's entries of ``bases`` and ``starts`` and of the number of ones before its bit
    in that run. So a tile can be read without those before it. Runs do not end with a row: a short row costs no start
    of its own. One bitmap serves both orientations of the weight: ``w.T`` goes with ``bitmap.T`` and the same values.

    Attributes:
        bits: int32 ``[N, ceil(K / 32)]``: bit ``j`` of word ``s`` of a row is position ``32 s + j``. Bits past ``K``
            are zero.
        starts: int16 ``[runs]``, read as unsigned: how many values are kept before each run of 32 words, counted from
            the last of ``bases``.
        bases: ``[ceil(runs / 64)]``: how many values are kept before each 64 runs; int32, int64 from 2^31 values on.
        shape: ``(N, K)`` as the values are stored.
        nnz: Number of kept values.
        transposed: Whether this is the bitmap of the transposed weight.
    """

    bits: Tensor
    starts: Tensor
    bases: Tensor
    shape: tuple[int, int]
    nnz: int
    transposed: bool = False

    @classmethod
    def pack(cls, mask: Tensor) -> "Bitmap":
        """Packs a mask; :meth:`unpack` is its exact inverse.

        Args:
            mask: bool ``[N, K]``, true where an entry exists. Any pattern.

        Raises:
            TypeError: ``mask`` is not a bool tensor.
            ValueError: It is not a matrix, or it is on the meta device.
        """
        op = "Bitmap.pack"
        check_tensor(op, "mask", mask, (None, None), dtype=torch.bool)
        check_readable(op, "mask", mask)
        n, k = mask.shape
        words, (runs, _) = -(-k // WORD), index_sizes((n, k))
        whole = pad(mask, (0, words * WORD - k)).flatten()
        counts = pad(whole, (0, runs * RUN - len(whole))).view(runs, RUN).sum(-1)
        before = counts.cumsum(0) - counts
        nnz, bases = int(counts.sum()), before[:: BASE // RUN]
        starts = before - bases.repeat_interleave(BASE // RUN)[:runs]
        return cls(pack_bits(mask), starts.to(torch.int16), bases.to(index_dtype(nnz)), (n, k), nnz)

    def unpack(self) -> Tensor:
        """The mask, bool ``[N, K]``, or ``[K, N]`` where transposed."""
        mask = self._mask()
        return mask.T if self.transposed else mask

    def _mask(self) -> Tensor:
        """The mask in stored order."""
        return unpack_bits(self.bits, self.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bits, starts and bases."""
        return self.bits, self.starts, self.bases

    @property
    def T(self) -> "Bitmap":  # noqa: N802 - as of a tensor
        """The bitmap of the transposed weight; shares the tensors."""
        return self._replace(transposed=not self.transposed)

    @property
    def sizes(self) -> tuple[int, int]:
        """``(N, K)`` of the weight, or ``(K, N)`` if transposed."""
        return self.shape[::-1] if self.transposed else self.shape

    def to(self, device: torch.device | str) -> "Bitmap":
        """The same bitmap on another device."""
        bits, starts, bases = (t.to(device) for t in self.tensors)
        return self._replace(bits=bits, starts=starts, bases=bases)

    def to_dense(self, values: Tensor) -> Tensor:
        """Expands values ``[nnz]`` of any dtype to ``w[N, K]``, zero where no entry exists; differentiable."""
        check_tensor("Bitmap.to_dense", "values", values, (self.nnz,), any_dtype=True)
        dense = values.new_zeros(self.shape).masked_scatter(self._mask(), values)
        return dense.T if self.transposed else dense

    def from_dense(self, weight: Tensor) -> Tensor:
        """Takes the kept values ``[nnz]`` of a weight ``[N, K]`` of any dtype; differentiable."""
        check_tensor("Bitmap.from_dense", "weight", weight, self.sizes, any_dtype=True)
        return (weight.T if self.transposed else weight)[self._mask()]

    def validate(self) -> "Bitmap":
        """Reads the tensors and checks that they fit each other; returns the bitmap.

        Raises:
            TypeError: A tensor has another dtype than it must have.
            ValueError: Shapes differ, a bit past ``K`` is set, or ``starts``, ``bases`` or ``nnz`` do not count the
                bits.
        """
        check_bitmap("Bitmap.validate", self)
        fresh = Bitmap.pack(self._mask())
        if fresh.nnz != self.nnz or not all(map(torch.equal, fresh.tensors, self.tensors)):
            raise ValueError(
                f"Bitmap.validate: bits, starts, bases and nnz = {self.nnz} do not describe one mask of "
                f"{list(self.shape)}; its bits are {fresh.nnz} entries"
            )
        return self


def pack_bits(mask: Tensor) -> Tensor:
    """Masks ``[N, K]`` as :attr:`Bitmap.bits`."""
    if not mask.shape[1]:
        return mask.int()
    octets = pad(mask, (0, -mask.shape[1] % WORD)).unflatten(1, (-1, 8)).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (octets << places).sum(-1, dtype=torch.uint8).view(torch.int32)


def unpack_bits(bits: Tensor, k: int) -> Tensor:
    """The exact inverse of :func:`pack_bits`, bool ``[N, K]``."""
    octets = bits.contiguous().view(torch.uint8) if k else bits.to(torch.uint8)
    ones = (octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
    return ones.flatten(1)[:, :k].bool()


def index_sizes(shape: tuple[int, int]) -> tuple[int, int]:
    """How many starts and bases the bitmap of a stored weight ``[N, K]`` has."""
    positions = shape[0] * -(-shape[1] // WORD) * WORD
    return -(-positions // RUN), -(-positions // BASE)


def index_dtype(nnz: int) -> torch.dtype:
    """The dtype of :attr:`Bitmap.bases`."""
    return torch.int32 if nnz < NARROW else torch.int64


def check_bitmap(op: str, kept: object, on: Tensor | None = None, name: str = "kept") -> None:
    """Raises unless ``kept`` is a bitmap whose tensors have the right shapes and dtypes, on the device of ``on``.

    Raises:
        TypeError: It is no :class:`Bitmap`, or a tensor has another dtype.
        ValueError: A tensor has another shape, or is on another device.
    """
    if not isinstance(kept, Bitmap):
        raise TypeError(f"{op}: {name} must be a Bitmap, got {type(kept).__name__}")
    (n, k), (runs, bases), on = kept.shape, index_sizes(kept.shape), kept.bits if on is None else on
    wanted = (((n, -(-k // WORD)), torch.int32), ((runs,), torch.int16), ((bases,), index_dtype(kept.nnz)))
    for part, tensor, (shape, dtype) in zip(("bits", "starts", "bases"), kept.tensors, wanted, strict=True):
        check_tensor(op, f"{name}.{part}", tensor, shape, dtype=dtype, on=on, is_index=True)
