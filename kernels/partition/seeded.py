"""Labels as a function of a seed: who owns each edge, with nothing stored.

``docs/seeded.md`` defines the function and has test vectors. The function never changes, because a checkpoint holds the
seed alone. It is written here, and for the kernels in ``tiles.py``, ``fragments.py``, ``cpu_storage.py`` and
``semi_structured/gluon.py``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_pair
from ..hashing import COLUMN, ROW, SEEDS, WORD, check_seed, key_of, mixed, signed
from ..structures import SEEDED_CHILDREN as CHILDREN

VERSION, TURNED = 1, 2
"""Versions of the function: the first, and the one with rows and columns exchanged. Another one gets another number."""

VERSIONS = 1 << 8
"""Versions are below this: a state dict has eight bits for them."""

ALIGNED = (2, 128)
"""Multiples at which the rows and columns of a part of a weight begin for a kernel to make the part's labels."""

_CHUNK = 1 << 22  # edges unpacked at a time: bounds the working memory of large layers


class SeededLabels(NamedTuple):
    """The labels of a weight ``w[N, K]`` as a function of a seed: nothing is stored, loaded or sharded.

    Each child owns one of every ``alpha`` consecutive inputs of a row, counted from column 0 of the whole weight. It
    can be used wherever :class:`PackedLabels` can. There are no holes: every edge has an owner.

    A part of a weight, as a shard has it, knows where it begins, and computes the labels that the whole weight has
    there. The kernels take parts that begin at even rows and at multiples of 128 columns; the twins take any part.

    Attributes:
        seed: 0 to 2^32 - 1.
        shape: ``(N, K)`` as the weight is stored.
        alpha: Number of children: 2, 4 or 8.
        offsets: Row and column of the whole weight at which this part begins.
        transposed: Whether these are the labels of the transposed weight.
    """

    seed: int
    shape: tuple[int, int]
    alpha: int
    offsets: tuple[int, int] = (0, 0)
    transposed: bool = False

    @classmethod
    def of(cls, seed: int, shape: tuple[int, int], alpha: int, offsets: tuple[int, int] = (0, 0)) -> "SeededLabels":
        """The labels of a seed, after checks.

        Args:
            seed: 0 to 2^32 - 1.
            shape: ``(N, K)`` of the weight, or of the part of one.
            alpha: Number of children: 2, 4 or 8.
            offsets: Row and column of the whole weight at which the part begins.

        Raises:
            TypeError: ``seed`` is not an integer.
            ValueError: Another argument is not what it must be, or a number is out of range.
        """
        op = "SeededLabels.of"
        shape, offsets = check_pair(op, "shape", shape, 0), check_pair(op, "offsets", offsets, 0)
        return cls(seed, shape, alpha, offsets).check(op)

    def check(self, op: str, name: str = "labels") -> "SeededLabels":
        """Returns the labels, or raises ``TypeError`` or ``ValueError`` where a field is out of range."""
        check_seed(op, name, self.seed)
        if not isinstance(self.alpha, int) or self.alpha not in CHILDREN:
            raise ValueError(f"{op}: labels of a seed know {CHILDREN} children, got alpha = {self.alpha!r}")
        check_pair(op, f"the shape of {name}", self.shape, 0)
        check_pair(op, f"the offsets of {name}", self.offsets, 0)
        return self

    def unpack(self, device: torch.device | str | None = None) -> Tensor:
        """The labels, uint8: ``[N, K]``, or ``[K, N]`` where transposed."""
        (n, k), (first_n, first_k) = self.shape, self.offsets
        labels = torch.empty(n, k, dtype=torch.uint8, device=device)
        step = max(1, _CHUNK // max(k, 1))
        for first in range(0, n, step):
            part = labels[first : first + step]
            sizes = (len(part), k)
            part.copy_(_labels(key_of(self.seed), first_n + first, first_k, sizes, self.alpha, device))
        return labels.T if self.transposed else labels

    @property
    def T(self) -> "SeededLabels":  # noqa: N802 - as of a tensor
        """The labels of the transposed weight."""
        return self._replace(transposed=not self.transposed)

    @property
    def sizes(self) -> tuple[int, int]:
        """``(N, K)`` of the weight, or ``(K, N)`` if transposed."""
        return self.shape[::-1] if self.transposed else self.shape

    def part(self, rows: tuple[int, int], columns: tuple[int, int]) -> "SeededLabels":
        """The labels of a part of the weight: of ``rows[0] .. rows[1] - 1`` and ``columns[0] .. columns[1] - 1``.

        Rows and columns are those of the transposed weight where these are its labels.

        Raises:
            ValueError: A range does not lie within the weight.
        """
        for name, span, size in zip(("rows", "columns"), (rows, columns), self.sizes, strict=True):
            first, stop = check_pair("SeededLabels.part", name, span, 0)
            if not first <= stop <= size:
                raise ValueError(f"SeededLabels.part: {name} must lie within 0 .. {size}, got {span!r}")
        spans = (columns, rows) if self.transposed else (rows, columns)
        (top, bottom), (left, right) = spans
        offsets = (self.offsets[0] + top, self.offsets[1] + left)
        return self._replace(shape=(bottom - top, right - left), offsets=offsets)

    @property
    def key(self) -> int:
        """What a kernel adds to what it hashes, signed 32 bits: the seed, and where the part begins."""
        row, column = self.offsets
        return signed((key_of(self.seed) + row // 2 * ROW + column // 32 * COLUMN) & WORD)

    @property
    def why_no_kernel(self) -> str | None:
        """Why the kernels cannot take these labels, or ``None`` if they can."""
        if any(offset % step for offset, step in zip(self.offsets, ALIGNED, strict=True)):
            rows, columns = ALIGNED
            return (
                f"of a part of a weight it takes labels of a seed from multiples of {rows} rows and {columns} columns "
                f"on, got {self.offsets}"
            )
        return None

    @property
    def has_holes(self) -> bool:
        """Whether there are edges without an owner: never."""
        return False

    def to(self, device: torch.device | str) -> "SeededLabels":
        """Returns the same object: it is on no device."""
        return self


def _labels(key: int, row: int, column: int, shape: tuple[int, int], alpha: int, device: Any) -> Tensor:
    """Labels of ``shape`` from a row and a column of the whole weight on: the definition."""
    digits = alpha.bit_length() - 1
    rows = torch.arange(row, row + shape[0], dtype=torch.int64, device=device)
    columns = torch.arange(column, column + shape[1], dtype=torch.int64, device=device)
    pairs = torch.arange(row // 2, (row + shape[0]) // 2 + 1, dtype=torch.int64, device=device)
    first_word, last_word = column // 128 * 4, (column + shape[1]) // 128 * 4 + 4  # four to 128 columns
    known = torch.arange(first_word, last_word, dtype=torch.int64, device=device)
    hashed = mixed(pairs[:, None] * ROW + known * COLUMN + key).to(torch.int32)  # of whose bits none is lost
    eight = columns // 8
    bits = hashed[rows // 2 - row // 2][:, eight // 16 * 4 + eight % 4 - first_word]
    bits = bits >> (rows[:, None] % 2).to(torch.int32)
    first = (8 * digits * (columns % 8 // alpha) + 2 * (eight // 4 % 4)).to(torch.int32)
    labels = columns.to(torch.int32) & (alpha - 1)
    for digit in range(digits):
        labels = labels ^ ((bits >> (first + 8 * digit)) & 1) << digit
    return labels


def beside(seed: int, places: int = 1) -> int:
    """The seed some places further on: that of another layer, whose labels have nothing to do with the first's."""
    return (seed + places) % SEEDS
