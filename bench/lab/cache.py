"""A simulated L2 and the order in which concurrent programs reach it."""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from ..families.accesses import Access, Launch

LINE, SECTOR = 128, 32
SECTORS = [SECTOR * bin(mask).count("1") for mask in range(16)]  # bytes of a line's sectors, by mask


class Unit(NamedTuple):
    """Lines of one tensor that a kernel always touches together, with the same sectors in each.

    Attributes:
        key: What they are; equal keys are the same lines.
        lines: How many.
        sectors: Which of a line's four sectors, a bit each.
    """

    key: tuple
    lines: int
    sectors: int


class L2:
    """A fully associative write-back cache of 128-byte lines with 32-byte sectors; the least recently used line leaves.

    A read miss fetches the sector; a written sector is never fetched, and goes to memory when its line leaves
    or at :meth:`flush`. It starts empty.

    Attributes:
        requested: Bytes of all accesses.
        read: Bytes fetched from memory.
        written: Bytes written back.
    """

    def __init__(self, capacity: float) -> None:
        """Takes the capacity in bytes."""
        self.requested = self.read = self.written = 0
        self._free = capacity // LINE
        self._held: OrderedDict[tuple, list[int]] = OrderedDict()  # key -> lines, valid sectors, dirty sectors
        self._units: dict[tuple[Access, bool], tuple[Unit, ...]] = {}
        self._seen: tuple[dict, dict] = ({}, {})  # read, written: key -> lines, sectors

    def access(self, access: Access, coarse: bool = True) -> None:
        """Reads or writes a rectangle; with ``coarse`` its lines come and go together where they can."""
        self.requested += access.rows * access.width
        store = access.store
        held, seen = self._held, self._seen[store]
        found = self._units.get((access, coarse))
        if found is None:
            found = self._units[access, coarse] = units(access, coarse)
        for key, lines, sectors in found:
            entry = held.get(key)
            if entry is None:
                entry = held[key] = [lines, 0, 0]
                self._free -= lines
                while self._free < 0:
                    self._evict()
            else:
                held.move_to_end(key)
            if store:
                entry[2] |= sectors
            else:
                self.read += SECTORS[sectors & ~entry[1]] * lines
            entry[1] |= sectors
            known = seen.get(key)
            if known is None or sectors & ~known[1]:
                seen[key] = (lines, sectors | (known[1] if known else 0))

    def flush(self) -> None:
        """Writes everything back that memory does not hold yet."""
        while self._held:
            self._evict()

    @property
    def unique(self) -> int:
        """Bytes of the distinct sectors read, plus those of the distinct sectors written."""
        return sum(SECTORS[sectors] * lines for seen in self._seen for lines, sectors in seen.values())

    def _evict(self) -> None:
        _, (lines, _, dirty) = self._held.popitem(last=False)
        self.written += SECTORS[dirty] * lines
        self._free += lines


CUT_ANEW = ("partial", "starts")
"""Scratch, which two kernels cut differently, and the starts of runs, of a tile's rows or of the one behind it."""


def units(access: Access, coarse: bool) -> tuple[Unit, ...]:
    """Splits a rectangle into units: its columns of lines, or one run where it has no gaps; single lines otherwise.

    Coarse units are sound because a kernel cuts each of its tensors into the same tiles throughout. What is cut in
    more ways than one (:data:`CUT_ANEW`), and tiles that are no whole lines, fall back to single lines.
    """
    name, _, row, rows, column, width, pitch = access
    if not width:
        return ()
    if not pitch:  # every row is the same bytes
        rows = 1
    start, size = row * pitch + column, rows * width
    solid = rows == 1 or width == pitch
    if coarse and solid and name not in CUT_ANEW and start % LINE == 0 and size % LINE == 0:
        return (Unit((name, start), size // LINE, 15),)
    if coarse and not solid and pitch % LINE == 0 and name not in CUT_ANEW:
        return tuple(Unit((name, row, line), rows, mask) for line, mask in _lines(column, width))
    masks: dict[int, int] = {}
    for first, length in [(start, size)] if solid else [(start + i * pitch, width) for i in range(rows)]:
        for line, mask in _lines(first, length):
            masks[line] = masks.get(line, 0) | mask
    return tuple(Unit((name, "line", line), 1, mask) for line, mask in masks.items())


def _lines(start: int, size: int) -> Iterator[tuple[int, int]]:
    """Lines that a run of bytes touches, and their sectors."""
    first, last = start // SECTOR, (start + size - 1) // SECTOR
    for line in range(first // 4, last // 4 + 1):
        low, high = max(first - 4 * line, 0), min(last - 4 * line, 3)
        yield line, (1 << (high + 1)) - (1 << low)


def schedule(launch: Launch, slots: int) -> Iterator[Access]:
    """All accesses of a launch in the order of a device that runs ``slots`` programs at a time.

    Programs start in launch order (axis 0 fastest). Those that run advance in lockstep, an iteration each in turn;
    one that ends gives its place to the next. Real programs drift apart by a few iterations, which this leaves out.
    """
    waiting = (launch.program(x, y) for y in range(launch.grid[1]) for x in range(launch.grid[0]))
    running = list(islice(waiting, slots))
    while running:
        still = []
        for program in running:
            step = next(program, None)
            if step is None:
                successor = next(waiting, None)
                if successor is None:
                    continue
                program, step = successor, next(successor)
            yield from step
            still.append(program)
        running = still
