"""The hash from which a seed's labels and holes are made; ``docs/seeded.md`` defines it and has test vectors."""

from typing import TypeVar

from torch import Tensor

SEEDS = 1 << 32
"""Seeds are integers from 0 to ``SEEDS - 1``."""

WORD = (1 << 32) - 1
GOLDEN = 0x9E3779B9
ROW, COLUMN = 0x9E3779B1, 0x85EBCA77
"""What a step to the next row, or to the next word of columns, adds to the number that is hashed."""
MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
"""Shifts and factors of the rounds of MurmurHash3's finaliser; a last shift by 16 follows them."""

Integers = TypeVar("Integers", int, Tensor)


def mixed(x: Integers) -> Integers:
    """A hash of integers modulo 2^32."""
    x = x & WORD
    for shift, factor in MIX:
        x = ((x ^ (x >> shift)) * factor) & WORD
    return x ^ (x >> 16)


def key_of(seed: int, begin: int = GOLDEN) -> int:
    """The number that hashing begins with for a seed; neighbouring seeds have numbers far apart."""
    return mixed(seed + begin)


def check_seed(op: str, name: str, seed: object) -> None:
    """Raises unless ``seed`` is an integer from 0 to 2^32 - 1.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is out of range.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{op}: the seed of {name} must be an integer, got {type(seed).__name__}")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"{op}: the seed of {name} must be from 0 to 2^32 - 1, got {seed}")


def signed(constant: int) -> int:
    """The signed 32-bit integer with the bits of an unsigned one, as the kernels take constants."""
    return constant - (constant >> 31 << 32)
