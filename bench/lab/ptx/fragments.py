"""Which matrix element lies in which register of which lane: the fragments of the PTX ISA as index arrays.

Source: PTX ISA, "Matrix fragments for mma.m16n8k4 .. m16n8k32", "Matrix fragments for sparse mma.m16n8k32", "Sparse
matrix storage", "ldmatrix", "stmatrix" and "Register fragments" of wgmma.

Every function returns integer arrays ``[lanes, elements]``. Elements of a lane are numbered in the order of its
registers: element ``i`` of ``itemsize`` bytes lies in 32-bit register ``i * itemsize // 4``, at byte
``i * itemsize % 4``. The ISA calls ``lane // 4`` the group and ``lane % 4`` the thread in the group.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.intp]
Places = tuple[Indices, Indices]
WARP, WARPGROUP = 32, 128


def frozen(*arrays: Indices) -> tuple[Indices, ...]:
    """Returns the arrays at their common shape and read-only, so that they can be kept."""
    kept = tuple(np.array(a, np.intp) for a in np.broadcast_arrays(*arrays))
    for array in kept:
        array.flags.writeable = False
    return kept


def _lanes(lanes: int = WARP) -> Indices:
    return np.arange(lanes, dtype=np.intp)[:, None]


def _words(elements: int, itemsize: int) -> tuple[Indices, Indices, int]:
    """Returns the register of each element, its place in the register, and the number of elements in one."""
    if itemsize not in (1, 2, 4):
        raise ValueError(f"fragments: elements of 1, 2 or 4 bytes expected, got {itemsize}")
    held = 4 // itemsize
    i = np.arange(elements, dtype=np.intp)[None, :]
    return i // held, i % held, held


@cache
def mma_a(m: int, k: int, itemsize: int) -> Places:
    """Rows and columns of multiplicand A ``[m, k]`` of ``mma.sync``.

    Registers alternate between the rows ``group`` and ``group + 8`` and then step 16 bytes along the reduction.

    Args:
        m: 16.
        k: Length of the reduction: a multiple of 16 bytes.
        itemsize: Bytes of an element.

    Returns:
        Rows and columns ``[32, m * k / 32]``.

    Raises:
        ValueError: There is no such shape.
    """
    if m != 16 or k <= 0 or k * itemsize % 16:
        raise ValueError(
            f"mma_a: 16 rows and a multiple of 16 bytes along k expected, got {m} x {k} of {itemsize} bytes"
        )
    register, place, held = _words(m * k // WARP, itemsize)
    group, thread = _lanes() // 4, _lanes() % 4
    rows, columns = frozen(group + 8 * (register % 2), held * (thread + 4 * (register // 2)) + place)
    return rows, columns


@cache
def mma_b(k: int, n: int, itemsize: int) -> Places:
    """Rows (along k) and columns (along n) of multiplicand B ``[k, n]`` of ``mma.sync``, ``.col``.

    Args:
        k: Length of the reduction: a multiple of 16 bytes.
        n: 8.
        itemsize: Bytes of an element.

    Returns:
        Rows and columns ``[32, k * n / 32]``.

    Raises:
        ValueError: There is no such shape.
    """
    if n != 8 or k <= 0 or k * itemsize % 16:
        raise ValueError(
            f"mma_b: 8 columns and a multiple of 16 bytes along k expected, got {k} x {n} of {itemsize} bytes"
        )
    register, place, held = _words(k * n // WARP, itemsize)
    rows, columns = frozen(held * (_lanes() % 4 + 4 * register) + place, _lanes() // 4)
    return rows, columns


@cache
def mma_c(m: int, n: int) -> Places:
    """Rows and columns of the accumulators C and D ``[m, n]`` of ``mma.sync``, of either width.

    Args:
        m: 16.
        n: 8.

    Returns:
        Rows and columns ``[32, 4]``.

    Raises:
        ValueError: There is no such shape.
    """
    if (m, n) != (16, 8):
        raise ValueError(f"mma_c: 16 x 8 expected, got {m} x {n}")
    i = np.arange(4, dtype=np.intp)
    rows, columns = frozen(_lanes() // 4 + 8 * (i // 2), 2 * (_lanes() % 4) + i % 2)
    return rows, columns


@cache
def mma_sp_metadata(k: int, selector: int) -> Places:
    """Where the metadata of 16-bit ``mma.sp`` is: of each row's quads of columns the two 2-bit indices.

    Two of every four lanes contribute to m16n8k32: the pair 0, 1 with selector 0 and the pair 2, 3 with selector 1; the
    first has the columns 0 to 15. One lane contributes to m16n8k16. The low half of a register is for the row
    ``group``, the high half for ``group + 8``. (The values are a matrix of half the columns, as of :func:`mma_a`:
    elements ``2 * quad`` and ``2 * quad + 1`` belong to a quad.)

    Args:
        k: 32 or 16.
        selector: 0 or 1 for k = 32, 0 to 3 for k = 16.

    Returns:
        The lane and the lowest of four bits ``[16, k / 4]``: bits 1:0 are the first value's column in its quad, bits
        3:2 the second's.

    Raises:
        ValueError: There is no such shape or selector.
    """
    if k not in (16, 32) or not 0 <= selector < 64 // k:
        raise ValueError(f"mma_sp_metadata: k 16 or 32 and a selector below 64 / k expected, got k {k}, {selector}")
    rows, quads = np.arange(16, dtype=np.intp)[:, None], np.arange(k // 4, dtype=np.intp)
    thread = selector * (k // 16) + quads // 4
    lanes, bits = frozen(4 * (rows % 8) + thread, 16 * (rows // 8) + 4 * (quads % 4))
    return lanes, bits


@cache
def ldmatrix(count: int, transposed: bool) -> Places:
    """Which 16-bit elements of ``count`` 8 x 8 matrices a lane gets from ``ldmatrix`` and gives to ``stmatrix``.

    Row ``r`` of matrix ``j`` is the 16 bytes at the address that lane ``8 * j + r`` gives.

    Args:
        count: 1, 2 or 4 matrices, a register each.
        transposed: ``.trans``.

    Returns:
        The lane whose address points to the element's row, and the element's column in that row
        ``[32, 2 * count]``.

    Raises:
        ValueError: There is no such count.
    """
    if count not in (1, 2, 4):
        raise ValueError(f"ldmatrix: 1, 2 or 4 matrices expected, got {count}")
    matrix, place, _ = _words(2 * count, 2)
    row, column = _lanes() // 4, 2 * (_lanes() % 4) + place
    if transposed:
        row, column = column, row
    givers, columns = frozen(8 * matrix + row, column)
    return givers, columns


@cache
def wgmma_a(k: int, itemsize: int) -> Places:
    """Rows and columns of multiplicand A ``[64, k]`` of ``wgmma`` in registers: 16 rows a warp, each as of ``mma``.

    Args:
        k: Length of the reduction: 32 bytes.
        itemsize: Bytes of an element.

    Returns:
        Rows and columns ``[128, k / 2]``.

    Raises:
        ValueError: There is no such shape.
    """
    if k * itemsize != 32:
        raise ValueError(f"wgmma_a: 32 bytes along k expected, got {k} of {itemsize} bytes")
    rows, columns = mma_a(16, k, itemsize)
    rows, columns = frozen(np.tile(rows, (4, 1)) + _lanes(WARPGROUP) // WARP * 16, np.tile(columns, (4, 1)))
    return rows, columns


@cache
def wgmma_d(n: int) -> Places:
    """Rows and columns of the accumulator D ``[64, n]`` of ``wgmma``: 16 rows a warp, side by side as of ``mma``.

    Args:
        n: A multiple of 8 up to 256.

    Returns:
        Rows and columns ``[128, n / 2]``.

    Raises:
        ValueError: There is no such shape.
    """
    if n % 8 or not 8 <= n <= 256:
        raise ValueError(f"wgmma_d: a multiple of 8 from 8 to 256 columns expected, got {n}")
    i = np.arange(n // 2, dtype=np.intp)
    lane = _lanes(WARPGROUP)
    row = 16 * (lane // WARP) + lane % WARP // 4 + 8 * (i // 2 % 2)
    rows, columns = frozen(row, 8 * (i // 4) + 2 * (lane % 4) + i % 2)
    return rows, columns
