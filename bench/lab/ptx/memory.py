"""The two memories of a launch, and what is known of every byte of them.

Both keep bytes in flat arrays with planes of the same length beside them, a ``uint8`` for each byte, so that an access
of 16 bytes gathers 16 facts of a plane as one element. A thread's access is one element of one-dimensional arrays:
which program (CTA), which warp, which address.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

ORIGIN = 1 << 40
"""Address of the first byte of global memory."""

GUARD = 1 << 16
"""Bytes between two allocations that nobody may touch: an excess tile of rows would not reach further."""

ELEMENT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
"""A type to move accesses of so many bytes with; a complex number is two words to NumPy, and copied as they are."""

LAST_INTERVAL = 250

Array = np.ndarray
"""Of any type and shape."""


class Fault(Exception):  # noqa: N818 - it is the kernel's, not ours
    """Something that a kernel must not do.

    Attributes:
        kind: What class of mistakes it is of, as ``"race"``.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(frozen=True)
class Threads:
    """The threads that make an access, in their order: one-dimensional arrays.

    Attributes:
        cta: Number of each one's program within the launch.
        warp: Number of each one's warp within its program.
        mask: ``[ctas, threads]``, or ``None`` where it is all of them.
    """

    cta: Array
    warp: Array
    mask: Array | None

    def of(self, array: Array) -> Array:
        """Returns these threads' elements of ``[ctas, threads]``, as one dimension."""
        return array.reshape(-1) if self.mask is None else array[self.mask]


def _aligned(offset: Array, width: int, space: str) -> None:
    if (offset & (width - 1)).any():
        off = offset[(offset & (width - 1)) != 0][0]
        raise Fault("alignment", f"access of {width} bytes at {off:#x} of {space} memory")


def _bytes(elements: Array, width: int) -> Array:
    return elements.view(np.uint8).reshape(-1, width)


def _packed(values: Array, width: int) -> Array:
    return np.ascontiguousarray(values).view(ELEMENT[width]).reshape(-1)


class Shared:
    """Shared memory of all programs of a launch.

    Accesses are ordered by barriers: two of them to a byte race if they are made by different warps in the interval
    between two barriers and one of them writes.

    Attributes:
        size: Bytes of one program.
        pitch: Distance of two programs' bytes in the flat arrays.
        data: The bytes, flat.
        writer: For each byte 1 + the warp that wrote it last, or 0 where nobody did.
        interval: Number of each program's interval between barriers, as the planes below remember it.
        written: For each byte the interval in which it was written last.
        readers: ``[warps, bytes]``: the interval in which each warp last read a byte.
        pending: 1 where an asynchronous copy that nobody has waited for writes a byte.
        locked: 1 where an asynchronous operation reads a byte: to write it is a race. For the handlers of operations
            that read shared memory by themselves (``wgmma``, ``tcgen05``).
        unfenced: 1 where the last write was the generic proxy's and no fence has followed. Likewise.
    """

    def __init__(self, ctas: int, warps: int, size: int) -> None:
        self.size, self.pitch = size, -(-size // 16) * 16
        total = ctas * self.pitch
        self.data, self.writer, self.written, self.pending, self.locked, self.unfenced = np.zeros((6, total), np.uint8)
        self.readers = np.zeros((warps, total), np.uint8)
        self.interval = np.ones(ctas, np.uint8)
        self.has_pending = self.has_locked = False

    def barrier(self, ctas: Array) -> None:
        """Begins a new interval in some programs (``[ctas]`` bool)."""
        self.interval[ctas] += 1
        for cta in map(int, np.flatnonzero(self.interval > LAST_INTERVAL)):
            # What came before a barrier is ordered, however long ago: it may be forgotten.
            self.written[self.span(cta)] = self.readers[:, self.span(cta)] = 0
            self.interval[cta] = 1

    def span(self, cta: int) -> slice:
        """A program's bytes in the flat arrays."""
        return slice(cta * self.pitch, (cta + 1) * self.pitch)

    def place(self, cta: Array, offset: Array, width: int) -> Array:
        """Indices of accesses into the flat arrays, in elements of their width, after bounds and alignment.

        Raises:
            Fault: An access is out of bounds or not aligned.
        """
        offset = offset.astype(np.int64)
        if len(offset) and (int(offset.max()) + width > self.size or int(offset.min()) < 0):
            raise Fault("bounds", f"access of {width} bytes at {offset.max():#x} of {self.size:#x} of shared memory")
        _aligned(offset, width, "shared")
        return (cta * self.pitch + offset) >> (width.bit_length() - 1)

    def load(self, cta: Array, warp: Array, offset: Array, width: int) -> Array:
        """Reads.

        Args:
            cta: ``[n]``, see :class:`Threads`.
            warp: ``[n]``.
            offset: ``[n]``, in bytes.
            width: Bytes of each access: 1, 2, 4, 8 or 16.

        Returns:
            ``[n, width]`` uint8.

        Raises:
            Fault: Out of bounds, not aligned, nothing was written there, a race, or an asynchronous copy is under way.
        """
        at = self.place(cta, offset, width)
        self.check_read(cta, warp, at, width)
        self.readers.reshape(-1).view(ELEMENT[width])[at + warp * (self.data.size // width)] = _packed(
            np.repeat(self.interval[cta], width), width
        )
        return _bytes(self.data.view(ELEMENT[width])[at], width)

    def check_read(self, cta: Array, warp: Array, at: Array, width: int) -> None:
        """The checks of :meth:`load` on places of :meth:`place`. To ``warp`` -1, no warp, every write counts."""
        element = ELEMENT[width]
        writer = _bytes(self.writer.view(element)[at], width)
        if not writer.all():
            lane = np.flatnonzero((writer == 0).any(1))[0]
            raise Fault("uninitialised shared memory", f"read at {self._offset(at[lane], width):#x}")
        if self.has_pending and _bytes(self.pending.view(element)[at], width).any():
            lane = np.flatnonzero(_bytes(self.pending.view(element)[at], width).any(1))[0]
            raise Fault("asynchronous copy", f"read at {self._offset(at[lane], width):#x} before the wait for it")
        written = _bytes(self.written.view(element)[at], width)
        clash = (written == self.interval[cta][:, None]) & (writer != (warp + 1)[:, None])
        if clash.any():
            lane, byte = np.argwhere(clash)[0]
            where = self._offset(at[lane], width) + byte
            raise Fault(
                "race", f"warp {warp[lane]} reads shared byte {where:#x} that warp {writer[lane, byte] - 1} wrote"
            )

    def store(self, cta: Array, warp: Array, offset: Array, values: Array) -> None:
        """Writes ``values[n, width]`` uint8; the other arguments and the faults are those of :meth:`load`."""
        width = values.shape[1]
        at = self.place(cta, offset, width)
        self.check_write(cta, warp, at, values)
        element = ELEMENT[width]
        self.data.view(element)[at] = _packed(values, width)
        if (_bytes(self.data.view(element)[at], width) != values).any():
            raise Fault("race", "two threads store different values to one place in shared memory")
        self.mark(cta, warp, at, width)

    def mark(self, cta: Array, warp: Array, at: Array, width: int) -> None:
        """Notes that bytes are written by warps in the present interval."""
        element = ELEMENT[width]
        self.writer.view(element)[at] = _packed(np.repeat((warp + 1).astype(np.uint8), width), width)
        self.written.view(element)[at] = _packed(np.repeat(self.interval[cta], width), width)
        self.unfenced.view(element)[at] = _packed(np.ones(len(at) * width, np.uint8), width)

    def check_write(self, cta: Array, warp: Array, at: Array, values: Array) -> None:
        """The checks of :meth:`store` on places of :meth:`place`: races, copies and operations under way."""
        width = values.shape[1]
        element, now = ELEMENT[width], self.interval[cta][:, None]
        for name, plane, some in (
            ("an asynchronous copy writes", self.pending, self.has_pending),
            ("an asynchronous operation reads", self.locked, self.has_locked),
        ):
            if some and _bytes(plane.view(element)[at], width).any():
                lane = np.flatnonzero(_bytes(plane.view(element)[at], width).any(1))[0]
                raise Fault("asynchronous copy", f"write at {self._offset(at[lane], width):#x} while {name} it")
        writer = _bytes(self.writer.view(element)[at], width)
        clash = (_bytes(self.written.view(element)[at], width) == now) & (writer != (warp + 1)[:, None])
        # Threads that hold the same element of a tile store it several times: harmless while they agree.
        clash &= _bytes(self.data.view(element)[at], width) != values
        if clash.any():
            lane, byte = np.argwhere(clash)[0]
            where = self._offset(at[lane], width) + byte
            raise Fault("race", f"warps {warp[lane]} and {writer[lane, byte] - 1} write shared byte {where:#x}")
        for other, plane in enumerate(self.readers):
            read = (_bytes(plane.view(element)[at], width) == now) & (warp != other)[:, None]
            if read.any():
                lane, byte = np.argwhere(read)[0]
                where = self._offset(at[lane], width) + byte
                raise Fault("race", f"warp {warp[lane]} writes shared byte {where:#x} that warp {other} read")

    def _offset(self, at: int, width: int) -> int:
        return int(at) * width % self.pitch


@dataclass
class Region:
    """A tensor's storage as a kernel sees it.

    Attributes:
        name: Of the argument that it came by.
        data: ``[bytes]`` uint8: the storage itself, which :meth:`Global.write_back` changes.
        accessible: ``[bytes]`` bool: bytes of elements.
        initialised: ``[bytes]`` bool: bytes that somebody has written.
    """

    name: str
    data: Array
    accessible: Array
    initialised: Array


ACCESSIBLE, INITIALISED, WRITTEN, READ = 1, 2, 4, 8
"""Facts of a byte of global memory; the last two are of this launch."""


class Global:
    """Global memory of a launch: named regions with guard bands between them.

    Attributes:
        addresses: Where each region begins, in their order.
        data: The bytes, flat.
        facts: Of each byte.
        stamp: Who wrote each byte: program, warp and number of the interval between barriers.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = list(regions)
        self.starts: list[int] = []
        size = GUARD
        for region in self.regions:
            self.starts.append(size)
            size += -(-len(region.data) // GUARD) * GUARD + GUARD
        self.addresses = [ORIGIN + start for start in self.starts]
        self.data, self.facts = np.zeros((2, size), np.uint8)
        self.stamp = np.zeros(size, np.int64)
        self.loads: list[tuple[Array, Array, int]] = []
        for region, start in zip(self.regions, self.starts, strict=True):
            self.data[start : start + len(region.data)] = region.data
            self.facts[start : start + len(region.data)] = region.accessible + INITIALISED * region.initialised

    def write_back(self) -> None:
        """Copies what the launch wrote into the regions."""
        for region, start in zip(self.regions, self.starts, strict=True):
            span = slice(start, start + len(region.data))
            wrote = (self.facts[span] & WRITTEN) != 0
            region.data[wrote] = self.data[span][wrote]
            region.initialised |= wrote

    def load(self, stamp: Array, address: Array, width: int) -> Array:
        """Reads.

        Args:
            stamp: ``[n]``: who reads, see :func:`stamps`.
            address: ``[n]`` uint64.
            width: Bytes of each access.

        Returns:
            ``[n, width]`` uint8.

        Raises:
            Fault: Out of bounds, not aligned, nothing was written there, or a race.
        """
        at, facts = self._place(address, width)
        if not (facts & INITIALISED).all():
            lane = np.flatnonzero((facts & INITIALISED == 0).any(1))[0]
            raise Fault("uninitialised global memory", f"read of {self._name(address[lane])}")
        if (facts & WRITTEN).any():
            self._ordered(stamp, address, width, "reads")
        self.facts.view(ELEMENT[width])[at] = _packed(facts | READ, width)
        self.loads.append((stamp, address, width))
        return _bytes(self.data.view(ELEMENT[width])[at], width)

    def prefetch(self, address: Array) -> None:
        """Reads nothing, because a prefetch is only a hint; its address must be that of an element all the same."""
        self._place(address, 1)

    def store(self, stamp: Array, address: Array, values: Array) -> None:
        """Writes ``values[n, width]``; the other arguments and the faults are those of :meth:`load`."""
        width = values.shape[1]
        at, facts = self._place(address, width)
        if (facts & WRITTEN).any():
            self._ordered(stamp, address, width, "writes")
        if (facts & READ).any():
            for theirs, read, size in self.loads:
                self._unread(stamp, address, width, theirs, read, size)
        order = np.argsort(at, kind="stable")
        twice = np.flatnonzero(at[order][1:] == at[order][:-1])
        if len(twice):
            one, other = order[twice[0]], order[twice[0] + 1]
            who, also = _who(stamp[other]), _who(stamp[one])
            raise Fault("race", f"{who} writes {self._name(address[one])}, and so does {also}")
        self.data.view(ELEMENT[width])[at] = _packed(values, width)
        self.facts.view(ELEMENT[width])[at] = _packed(facts | (WRITTEN | INITIALISED), width)
        self.stamp[self._each_byte(address, width)] = stamp[:, None]

    def _place(self, address: Array, width: int) -> tuple[Array, Array]:
        offset = address.astype(np.int64) - ORIGIN
        _aligned(offset, width, "global")
        if len(offset) and (offset.min() < 0 or offset.max() + width > len(self.data)):
            wild = address[(offset < 0) | (offset + width > len(self.data))][0]
            raise Fault("bounds", f"access of {width} bytes at {wild:#x}, far from every tensor")
        at = offset >> (width.bit_length() - 1)
        facts = _bytes(self.facts.view(ELEMENT[width])[at], width)
        if not (facts & ACCESSIBLE).all():
            lane = np.flatnonzero((facts & ACCESSIBLE == 0).any(1))[0]
            raise Fault("bounds", f"access of {width} bytes at {self._name(address[lane])}")
        return at, facts

    def _each_byte(self, address: Array, width: int) -> Array:
        return (address.astype(np.int64) - ORIGIN)[:, None] + np.arange(width)

    def _ordered(self, stamp: Array, address: Array, width: int, verb: str) -> None:
        each = self._each_byte(address, width)
        other = self.stamp[each]
        clash = ((self.facts[each] & WRITTEN) != 0) & _unordered(stamp[:, None], other)
        if clash.any():
            lane, byte = np.argwhere(clash)[0]
            who, before = _who(stamp[lane]), _who(other[lane, byte])
            raise Fault("race", f"{who} {verb} {self._name(address[lane])}, which {before} wrote")

    def _unread(self, stamp: Array, address: Array, width: int, theirs: Array, read: Array, size: int) -> None:
        first, last = address.astype(np.int64), read.astype(np.int64)
        order = np.argsort(first)
        for shift in range(0, size, width):
            found = np.clip(np.searchsorted(first[order], last + shift, "right") - 1, 0, None)
            mine = order[found]
            overlap = (first[mine] <= last + shift) & (last + shift < first[mine] + width)
            clash = overlap & _unordered(stamp[mine], theirs)
            if clash.any():
                i = np.flatnonzero(clash)[0]
                who, before = _who(stamp[mine[i]]), _who(theirs[i])
                raise Fault("race", f"{who} writes {self._name(read[i])}, which {before} read")

    def _name(self, address: int) -> str:
        """An address in words."""
        offset = int(address) - ORIGIN
        before = [i for i, start in enumerate(self.starts) if start <= offset]
        if not before:
            return f"{address:#x}, before every tensor"
        region, start = self.regions[before[-1]], self.starts[before[-1]]
        return f"byte {offset - start} of {region.name} ({len(region.data)} bytes)"


def stamps(threads: Threads, intervals: Array) -> Array:
    """Who makes an access, ``[n]`` int64: program, warp and interval between barriers (``intervals[ctas]``)."""
    return (threads.cta.astype(np.int64) << 40) | (threads.warp.astype(np.int64) << 32) | intervals[threads.cta]


def _unordered(one: Array, other: Array) -> Array:
    """Whether no barrier orders two accesses: another program, or another warp in the same interval."""
    programs = (one >> 40) != (other >> 40)
    return programs | (((one & 0xFFFFFFFF) == (other & 0xFFFFFFFF)) & (one != other))


def _who(stamp: int) -> str:
    return f"warp {int(stamp) >> 32 & 0xFF} of program {int(stamp) >> 40}"
