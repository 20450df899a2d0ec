"""Holes as a function of a seed: which entries of a weight exist, with no index.

``docs/seeded.md`` defines the function and has test vectors. Every row keeps the same number of entries, and so does
every word of 32 columns, up to rounding. So it is known without a table where the values of a row or word begin.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_pair, check_tensor
from ..hashing import COLUMN, ROW, WORD, check_seed, key_of, mixed, signed

BEGIN = 0x3C6EF372
"""What is added to a seed for its holes, as ``GOLDEN`` is for its labels."""
COLUMNS = 32
"""Columns of a word of bits."""
SWAPS = ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))
"""Distance of two places that may be exchanged, and a mask of the lower place of each pair."""

_CHUNK = 1 << 22  # entries made at a time: bounds the working memory of large layers


class SeededHoles(NamedTuple):
    """Which entries of a weight ``w[N, K]`` exist: ``per_row`` of every row, chosen by a function of a seed.

    Only the kept values are stored, row after row, ``values[N * per_row]``. It can replace a :class:`Bitmap` wherever
    the labels are :class:`SeededLabels` of a whole weight with the same seed.

    Attributes:
        seed: 0 to 2^32 - 1.
        shape: ``(N, K)`` as the values are stored.
        per_row: Entries that each row keeps, 1 to ``K``.
        transposed: Whether these are the holes of the transposed weight.
    """

    seed: int
    shape: tuple[int, int]
    per_row: int
    transposed: bool = False

    @classmethod
    def of(cls, seed: int, shape: tuple[int, int], count: int) -> "SeededHoles":
        """The holes of a seed, after checks.

        Args:
            seed: 0 to 2^32 - 1; that of the labels.
            shape: ``(N, K)`` of the weight.
            count: Entries that each row keeps, 1 to ``K``.

        Raises:
            TypeError: ``seed`` is not an integer.
            ValueError: Another argument is not what it must be, or a number is out of range.
        """
        op = "SeededHoles.of"
        return cls(seed, check_pair(op, "shape", shape, 0), count).check(op)

    def check(self, op: str, name: str = "kept") -> "SeededHoles":
        """Returns the holes, or raises ``TypeError`` or ``ValueError`` where a field is out of range."""
        check_seed(op, name, self.seed)
        check_pair(op, f"the shape of {name}", self.shape, 0)
        whole = isinstance(self.per_row, int) and not isinstance(self.per_row, bool)
        if not whole or not 1 <= self.per_row <= self.shape[1]:
            raise ValueError(f"{op}: {name} must keep 1 to {self.shape[1]} entries of each row, got {self.per_row!r}")
        return self

    @property
    def nnz(self) -> int:
        """Number of kept values."""
        return self.shape[0] * self.per_row

    @property
    def T(self) -> "SeededHoles":  # noqa: N802 - as of a tensor
        """The holes of the transposed weight."""
        return self._replace(transposed=not self.transposed)

    @property
    def sizes(self) -> tuple[int, int]:
        """``(N, K)`` of the weight, or ``(K, N)`` if transposed."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def key(self) -> int:
        """What a kernel adds to what it hashes, as a signed integer of 32 bits."""
        return signed(key_of(self.seed, BEGIN))

    def to(self, device: torch.device | str) -> "SeededHoles":
        """Returns the same object: it is on no device."""
        return self

    def unpack(self, device: torch.device | str | None = None) -> Tensor:
        """The mask, bool ``[N, K]``, or ``[K, N]`` where transposed."""
        mask = self._mask(device)
        return mask.T if self.transposed else mask

    def _mask(self, device: torch.device | str | None) -> Tensor:
        """The mask in stored order."""
        n, k = self.shape
        mask = torch.empty(n, k, dtype=torch.bool, device=device)
        step = max(1, _CHUNK // max(k, 1))
        bits = torch.arange(COLUMNS, device=device)
        for first in range(0, n, step):
            part = mask[first : first + step]
            words = _words(self, torch.arange(first, first + len(part), device=device))
            part.copy_(((words[..., None] >> bits) & 1).flatten(1)[:, :k])
        return mask

    def to_dense(self, values: Tensor) -> Tensor:
        """Expands values ``[nnz]`` of any dtype to ``w[N, K]``, zero where no entry exists; differentiable."""
        check_tensor("SeededHoles.to_dense", "values", values, (self.nnz,), any_dtype=True)
        dense = values.new_zeros(self.shape).masked_scatter(self._mask(values.device), values)
        return dense.T if self.transposed else dense

    def from_dense(self, weight: Tensor) -> Tensor:
        """Takes the kept values ``[nnz]`` of a weight ``[N, K]`` of any dtype; differentiable."""
        check_tensor("SeededHoles.from_dense", "weight", weight, self.sizes, any_dtype=True)
        return (weight.T if self.transposed else weight)[self._mask(weight.device)]


def _words(holes: SeededHoles, rows: Tensor) -> Tensor:
    """The bits of rows, int64 ``[rows, ceil(K / 32)]``: the definition."""
    k = holes.shape[1]
    first = torch.arange(0, k, COLUMNS, device=rows.device)
    size = (k - first).clamp(max=COLUMNS)
    kept = (first + size) * holes.per_row // k - first * holes.per_row // k
    ones = torch.ones_like(first)
    hashed = mixed(rows[:, None] * ROW + first // COLUMNS * COLUMN + key_of(holes.seed, BEGIN))
    words = ((ones << kept) - 1).expand_as(hashed)
    for distance, lower in SWAPS:
        inside = (ones << (size - distance).clamp(min=0)) - 1
        changed = (words ^ (words >> distance)) & hashed & lower & inside
        words = words ^ changed ^ (changed << distance)
        hashed = ((hashed ^ (hashed >> 15)) * ROW) & WORD
    return words
