"""The structures that a division of a layer's edges among its children may have, by name."""

from typing import Literal, get_args

Structure = Literal["random", "2:4", "block"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
"""Their names, at the places by which state dicts know them: append only."""
RANDOM, TWO_FOUR, BLOCK = STRUCTURES


def admitted(alpha: int, inputs: int = 0) -> tuple[Structure, ...]:
    """The structures that a layer of so many children, and of so many inputs where they are given, can have."""
    return tuple(name for name in STRUCTURES if name != TWO_FOUR or (alpha == 2 and inputs % 4 == 0))
