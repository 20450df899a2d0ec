"""Which entries of a weight exist, in bits or by a function of a seed: one type for whatever reads kept values.

Registered operations take tensors and numbers. So they take a bitmap as its three tensors, and holes of a seed as the
seed and the number of entries that a row keeps.
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
    """The tensors of a bitmap; three times none for holes of a seed."""
    return kept.tensors if isinstance(kept, Bitmap) else (None, None, None)


def seed_of(kept: Kept) -> list[int]:
    """The seed of holes and the number of entries that a row keeps; empty for a bitmap."""
    return [] if isinstance(kept, Bitmap) else [kept.seed, kept.per_row]


def existing(index: Index, seed: Sequence[int] | None, shape: tuple[int, int], nnz: int, transposed: bool) -> Kept:
    """The inverse of :func:`index_of` and :func:`seed_of`.

    Args:
        index: The tensors of a bitmap, or none.
        seed: As :func:`seed_of` returns it; read where there is no index.
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
    """Raises unless ``kept`` is a bitmap or holes of a seed, with valid fields.

    Args:
        op: Name of the operation, for the message.
        kept: What the caller passed.
        on: A tensor on whose device those of a bitmap must be.

    Raises:
        TypeError: It is neither, or a field has the wrong type.
        ValueError: A tensor has another shape or another device, or a number is out of range.
    """
    if isinstance(kept, SeededHoles):
        kept.check(op)
    elif isinstance(kept, Bitmap):
        check_bitmap(op, kept, on)
    else:
        raise TypeError(f"{op}: kept must be a Bitmap or SeededHoles, got {type(kept).__name__}")
