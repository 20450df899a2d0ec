"""Which entries of a weight exist, in bits or by a function of a seed: one thing to whoever reads kept values.

Registered operations take tensors and numbers. So a bitmap goes to them as its three tensors, and holes of a seed as
the seed and the number of entries that a row keeps.
"""

from collections.abc import Sequence

from torch import Tensor

from .holes import SeededHoles
from .layout import Bitmap, check_bitmap

Kept = Bitmap | SeededHoles
"""Which entries of a weight exist: in bits, or of the seed that its labels are of."""

Index = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The tensors of a bitmap; none of them where holes are of a seed."""


def index_of(kept: Kept) -> Index:
    """What is loaded to know which entries exist."""
    return kept.tensors if isinstance(kept, Bitmap) else (None, None, None)


def seed_of(kept: Kept) -> list[int]:
    """What is calculated from: seed and entries of a row; nothing of a bitmap."""
    return [] if isinstance(kept, Bitmap) else [kept.seed, kept.per_row]


def existing(index: Index, seed: Sequence[int] | None, shape: tuple[int, int], nnz: int, transposed: bool) -> Kept:
    """The inverse of :func:`index_of` and :func:`seed_of`.

    Args:
        index: Of a bitmap, or none.
        seed: Of holes; read where there is no index.
        shape: ``(N, K)`` as the values are stored.
        nnz: Number of kept values.
        transposed: Whether the transposed weight is meant.
    """
    bits, starts, bases = index
    if bits is None:
        assert seed
        number, per_row = seed
        return SeededHoles(number, shape, per_row, transposed)
    assert starts is not None and bases is not None
    return Bitmap(bits, starts, bases, shape, nnz, transposed)


def check_kept(op: str, kept: object, on: Tensor | None = None) -> None:
    """Raises unless ``kept`` is one of the two and in order, where ``on`` is.

    Raises:
        TypeError: It is neither, or a part has the wrong type.
        ValueError: A tensor has another shape or lies elsewhere, or a number is out of range.
    """
    if isinstance(kept, SeededHoles):
        kept.check(op)
    elif isinstance(kept, Bitmap):
        check_bitmap(op, kept, on)
    else:
        raise TypeError(f"{op}: kept must be a Bitmap or SeededHoles, got {type(kept).__name__}")
