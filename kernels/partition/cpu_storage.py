"""How the CPU kernels read a weight as it is stored, and who owns its edges: vectors written by hand.

A weight is all of its entries, or the kept ones with a bit for each position; labels are a table of bits, or made of a
seed. Which it is, the type of an argument says: none or an array of bits for the entries that exist, an array or a
number for labels. Numba then compiles a kernel for each.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..vectors import I32, I64, LANES, WORDS, Emit
from .labels import digits
from .seeded import COLUMN, MIX, ROW

GROUP = 128
"""Edges whose labels lie together: see :class:`PackedLabels`."""
FOUR = ir.VectorType(I32, 4)
"""The words of a group's labels."""


def _bit_packed(edge: int, digit: int, children: int) -> int:
    """The bit of its word in which a digit of the label of an edge of a group stands; each digit has its own words."""
    pair = edge % 8
    return pair // 4 + 8 * (2 * (pair % 2) + pair // 2 % 2) + 2 * (edge // 32)


def _bit_seeded(edge: int, digit: int, children: int) -> int:
    """The same in an even row of labels of a seed, where one word has all digits."""
    return 8 * (digits(children) * (edge % 8 // children) + digit) + 2 * (edge // 32)


class Stored:
    """A part of a weight as instructions read it: some rows, from a column on.

    Args:
        emit: Writes the instructions.
        w: The number of the argument that holds the values, flat.
        exists: Of the one with the words of bits of the entries that exist, none for all; a row has as many words as
            one of labels.
        bits: Of the one with the words of labels, or the key of a seed, or none for an only child.
        word: The column's number, in words of 32.
        row_words: Words of a row.
        digit: Words of a plane of labels.
        children: How many there are.
    """

    def __init__(
        self, emit: Emit, w: int, exists: int, bits: int, word: Any, row_words: Any, digit: Any, children: int
    ) -> None:
        self.emit, self.b, self.children = emit, emit.b, children
        self.w, self.exists, self.bits = w, exists, bits
        self.word, self.row_words, self.digit = word, row_words, digit
        self.packs = not isinstance(emit.signature.args[exists], types.NoneType)
        self.seeded = isinstance(emit.signature.args[bits], types.Integer)

    def _at(self, row: Any, group: Any) -> Any:
        """The place of the first word of a group of a row."""
        return self.emit.plus(self.b.add(self.b.mul(row, self.row_words), self.word), (group, 4))

    def words(self, row: Any, group: Any) -> list[Any]:
        """The four words of a group of labels, for each binary digit; none for an only child."""
        if self.children == 1:
            return []
        if self.seeded:
            return [self._hashed(row, group)] * digits(self.children)
        start = self._at(row, group)
        places = [self.emit.plus(start, (self.digit, digit)) for digit in range(digits(self.children))]
        return [self.b.load(self.emit.at(self.bits, place, FOUR), align=4) for place in places]

    def _hashed(self, row: Any, group: Any) -> Any:
        """The words of a group that a seed makes; bits of an odd row are moved to where an even one has its own."""
        b = self.b

        def four(scalar: Any) -> Any:
            return self.emit.splat(scalar, FOUR)

        word = b.trunc(self.emit.plus(self.word, (group, 4)), I32)
        first = b.add(b.mul(b.trunc(b.lshr(row, I64(1)), I32), I32(ROW)), b.mul(word, I32(COLUMN)))
        hashed = four(b.add(first, self.emit.args[self.bits]))
        hashed = b.add(hashed, ir.Constant(FOUR, [t * COLUMN % 2**32 for t in range(4)]))
        for shift, factor in MIX:
            mixed = b.xor(hashed, b.lshr(hashed, ir.Constant(FOUR, [shift] * 4)))
            hashed = b.mul(mixed, ir.Constant(FOUR, [factor] * 4))
        hashed = b.xor(hashed, b.lshr(hashed, ir.Constant(FOUR, [16] * 4)))
        return b.lshr(hashed, four(b.and_(b.trunc(row, I32), I32(1))))

    def owners(self, words: list[Any], edge: int) -> list[Any]:
        """Masks of the weights of each child, for the vector that begins at an edge of the group."""
        if self.children == 1:
            return [None]
        b, edges = self.b, range(edge, edge + LANES)
        which = ir.Constant(WORDS, [e % 32 // 8 for e in edges])
        zero = ir.Constant(WORDS, [0] * LANES)
        bit, ones = _bit_seeded if self.seeded else _bit_packed, []
        for digit, word in enumerate(words):
            bits = ir.Constant(WORDS, [1 << bit(e, digit, self.children) for e in edges])
            mine = b.shuffle_vector(word, word, which)
            if self.seeded:  # the label is the column's own digit, turned over where the bit is set
                mine = b.xor(mine, ir.Constant(WORDS, [-(e >> digit & 1) for e in edges]))
            one = b.icmp_unsigned("!=", b.and_(mine, bits), zero)
            ones.append(one)
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

    def weights(self, place: Any, row: Any, group: Any, edge: int, ahead: Any) -> Any:
        """The vector of weights at an edge of a group, as float32; what lies ``ahead`` of them is called from memory.

        Vectors are taken in order, so that ``place`` moves on by the values that were read.
        """
        b, at = self.b, self.b.load(place)
        if not self.packs:
            b.store(b.add(at, I64(LANES)), place)
            return self.emit.weights(self.w, at, ahead)
        lanes = ir.IntType(LANES)
        first = b.bitcast(self.emit.at(self.exists, self._at(row, group), I32), lanes.as_pointer())
        some = b.load(b.gep(first, [I64(edge // LANES)]), align=LANES // 8)
        b.store(b.add(at, b.zext(b.ctpop(some), I64)), place)
        return self.emit.weights(self.w, at, ahead, some)
