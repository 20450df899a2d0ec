"""How the CPU kernels read a weight as it is stored, and who owns its edges: vectors written by hand.

A weight is all of its entries, or the kept ones with a bit for each position. Which it is, the type of an argument
says: none, or an array of bits for the entries that exist. Numba then compiles a kernel for each. Labels are words of
bits; those of a seed are made a tile at a time, as words of the same kind.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..cpu import compiled
from ..hashing import COLUMN, MIX, ROW
from ..vectors import I32, I64, LANES, WORDS, Emit
from .labels import digits

GROUP = 128
"""Edges whose labels lie together: see :class:`PackedLabels`."""
FOUR = ir.VectorType(I32, 4)
"""The words of a group's labels."""


EVEN, BYTE, FOUR_BYTES = np.uint32(0x55555555), np.uint32(0xFF), np.uint32(0x01010101)
TURNED = (np.uint32(0xFFFF0000), np.uint32(0xFF00FF00), np.uint32(0xAAAAAAAA))
"""Where the edges of a word have a one in their column's own digits."""


@intrinsic
def _hash(typing: Any, first, word, odd) -> Any:
    """The hash of a word of labels, in 32 bits: Numba's own arithmetic takes 64, half as many to a vector."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        mixed = b.add(args[0], b.mul(b.trunc(args[1], I32), I32(COLUMN)))
        for shift, factor in MIX:
            mixed = b.mul(b.xor(mixed, b.lshr(mixed, I32(shift))), I32(factor))
        return b.lshr(b.xor(mixed, b.lshr(mixed, I32(16))), args[2])

    return types.uint32(first, word, odd), codegen


@compiled
def make_labels(out, key, row, word, children):
    """Writes words of a row of labels of a seed, as :class:`PackedLabels` has them.

    A bit of the hash serves each child's edge of a group of consecutive ones, in the order of the bytes that
    ``docs/seeded.md`` gives; here it goes to each of them, turned over by the digits of the edge's own column.

    Args:
        out: uint32 ``[binary digits of a label, words]``.
        key: Of the labels.
        row: Of the weight.
        word: The first column's number, in words of 32.
        children: A tuple as long as there are children.
    """
    first = np.uint32(np.uint32(row // 2) * np.uint32(ROW) + key + np.uint32(word) * np.uint32(COLUMN))
    odd = np.uint32(row % 2)
    one, two, three = out[0], out[min(1, len(out) - 1)], out[len(out) - 1]
    for i in range(len(one)):
        bits = np.uint32(_hash(first, i, odd) & EVEN)
        if len(children) < 8:
            bits |= bits >> np.uint32(15)
        if len(children) == 2:
            half = np.uint32(bits & np.uint32(0xFFFF))
            one[i] = np.uint32(half | half << np.uint32(16)) ^ TURNED[0]
        elif len(children) == 4:
            one[i] = np.uint32((bits & BYTE) * FOUR_BYTES) ^ TURNED[0]
            two[i] = np.uint32((bits >> np.uint32(8) & BYTE) * FOUR_BYTES) ^ TURNED[1]
        else:
            bits |= bits << np.uint32(1)
            one[i] = np.uint32((bits & BYTE) * FOUR_BYTES) ^ TURNED[0]
            two[i] = np.uint32((bits >> np.uint32(8) & BYTE) * FOUR_BYTES) ^ TURNED[1]
            three[i] = np.uint32((bits >> np.uint32(16) & BYTE) * FOUR_BYTES) ^ TURNED[2]


def _bit(edge: int) -> int:
    """The bit of its word in which the label of an edge of a group stands."""
    pair = edge % 8
    return pair // 4 + 8 * (2 * (pair % 2) + pair // 2 % 2) + 2 * (edge // 32)


class Stored:
    """A part of a weight as instructions read it: some rows, from a column on.

    Args:
        emit: Writes the instructions.
        w: The number of the argument that holds the values, flat.
        exists: Of the one with the words of bits of the entries that exist, none for all.
        bits: Of the one with the words of labels, none for an only child.
        digit: Words of a plane of labels.
        children: How many there are.
    """

    def __init__(self, emit: Emit, w: int, exists: int, bits: int, digit: Any, children: int) -> None:
        self.emit, self.b, self.children = emit, emit.b, children
        self.w, self.exists, self.bits, self.digit = w, exists, bits, digit
        self.packs = not isinstance(emit.signature.args[exists], types.NoneType)

    def words(self, at: Any, group: Any, ahead: Any) -> list[Any]:
        """The four words of a group of labels, for each binary digit; none for an only child.

        Args:
            at: Place of the first word of the row's.
            group: Number of the group in the row.
            ahead: Words from there to those that are called from memory.
        """
        if self.children == 1:
            return []
        start = self.emit.plus(at, (group, 4))
        places = [self.emit.plus(start, (self.digit, digit)) for digit in range(digits(self.children))]
        for place in places:
            self.emit.fetch(self.bits, self.b.add(place, ahead))
        return [self.b.load(self.emit.at(self.bits, place, FOUR), align=4) for place in places]

    def owners(self, words: list[Any], edge: int) -> list[Any]:
        """Masks of the weights of each child, for the vector that begins at an edge of the group."""
        if self.children == 1:
            return [None]
        b, edges = self.b, range(edge, edge + LANES)
        which = ir.Constant(WORDS, [e % 32 // 8 for e in edges])
        zero = ir.Constant(WORDS, [0] * LANES)
        bits = ir.Constant(WORDS, [1 << _bit(e) for e in edges])
        ones = [b.icmp_unsigned("!=", b.and_(b.shuffle_vector(word, word, which), bits), zero) for word in words]
        masks = []
        for child in range(self.children):
            mask = None
            for digit, one in enumerate(ones):
                own = one if child >> digit & 1 else b.not_(one)
                mask = own if mask is None else b.and_(mask, own)
            masks.append(mask)
        return masks

    def begin(self, start: Any) -> Any:
        """Where a row's values are read from, to be handed to :meth:`weights`."""
        place = cgutils.alloca_once(self.b, I64)
        self.b.store(start, place)
        return place

    def weights(self, place: Any, exists_at: Any, group: Any, edge: int, ahead: Any) -> Any:
        """The vector of weights at an edge of a group, as float32; what lies ``ahead`` of them is called from memory.

        Vectors are taken in order, so that ``place`` moves on by the values that were read. The bits of the entries
        that exist begin at ``exists_at`` in the row's.
        """
        b, at = self.b, self.b.load(place)
        if not self.packs:
            b.store(b.add(at, I64(LANES)), place)
            return self.emit.weights(self.w, at, ahead)
        lanes = ir.IntType(LANES)
        words = self.emit.at(self.exists, self.emit.plus(exists_at, (group, 4)), I32)
        some = b.load(b.gep(b.bitcast(words, lanes.as_pointer()), [I64(edge // LANES)]), align=LANES // 8)
        b.store(b.add(at, b.zext(b.ctpop(some), I64)), place)
        if LANES < 16:
            return self.emit.weights(self.w, at, ahead, some)
        word = b.load(b.gep(words, [I64(edge // 32)]), align=4)
        return self.emit.expanded(self.emit.weights(self.w, at, ahead), word, edge % 32)
