"""The hash that labels and holes of a seed are made with; ``docs/seeded.md`` says it with test vectors."""

from typing import TypeVar

from torch import Tensor

SEEDS = 1 << 32
"""Seeds are integers from 0 to below this."""

WORD = (1 << 32) - 1
GOLDEN = 0x9E3779B9
ROW, COLUMN = 0x9E3779B1, 0x85EBCA77
"""What two neighbouring rows, and the words of columns, add to what is hashed."""
MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
"""Shifts and factors of the rounds of the hash, MurmurHash3's finaliser; a last shift by 16 follows."""

Integers = TypeVar("Integers", int, Tensor)


def mixed(x: Integers) -> Integers:
    """A hash of integers modulo 2^32."""
    x = x & WORD
    for shift, factor in MIX:
        x = ((x ^ (x >> shift)) * factor) & WORD
    return x ^ (x >> 16)


def key_of(seed: int, begin: int = GOLDEN) -> int:
    """A seed as what is hashed begins with it: seeds beside each other begin far apart."""
    return mixed(seed + begin)


def check_seed(op: str, name: str, seed: object) -> None:
    """Raises unless a seed of something is one."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{op}: the seed of {name} must be an integer, got {type(seed).__name__}")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"{op}: the seed of {name} must be from 0 to 2^32 - 1, got {seed}")


def signed(constant: int) -> int:
    """A word as the 32-bit integer that has its bits: what the kernels' constants are."""
    return constant - (constant >> 31 << 32)
