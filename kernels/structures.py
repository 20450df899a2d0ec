"""The structures that a division of a layer's edges among its children may have, by name."""

from typing import Literal, get_args

Structure = Literal["random", "2:4", "block", "seeded"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
"""Their names. State dicts hold their indices: only append."""
RANDOM, TWO_FOUR, BLOCK, SEEDED = STRUCTURES
SEEDED_CHILDREN = (2, 4, 8)
"""Numbers of children that labels of a seed can have."""


def admitted(alpha: int, inputs: int = 0) -> tuple[Structure, ...]:
    """The structures that a layer can have.

    Args:
        alpha: Children per parent.
        inputs: Inputs of the layer; 0 if they do not matter.
    """
    able = {TWO_FOUR: alpha == 2 and inputs % 4 == 0, SEEDED: alpha in SEEDED_CHILDREN}
    return tuple(name for name in STRUCTURES if able.get(name, True))
