"""Where ``wgmma`` and ``tcgen05`` find their operands: descriptors of shared memory, and the layout of tensor memory.

Source: PTX ISA, "Matrix descriptor format" and "Shared memory matrix layout" of wgmma; "Shared memory descriptor",
"Instruction descriptor", "Data path layout organization" and "Data movement shape" of tcgen05.

A matrix is made of atoms of 8 rows of ``swizzle`` bytes (16 without swizzle), each atom contiguous. The bytes of a row
run along the major dimension: along the reduction in a K-major matrix, along rows or columns in an MN-major one. The
two byte offsets of a descriptor lead from atom to atom. A swizzle exchanges the 16-byte chunks of a row: bits 4 and up
of the address are combined by exclusive or with bits 7 and up.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .fragments import Places, frozen

Bytes = NDArray[np.intp]
CHUNK = 16
ATOM_ROWS = 8
WGMMA_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}
TCGEN05_SWIZZLES = {0: 0, 2: 128, 4: 64, 6: 32}
TMEM_LANES, TMEM_COLUMNS = 128, 512


@dataclass(frozen=True)
class Matrix:
    """What a descriptor says of a matrix in shared memory.

    Attributes:
        start: Address of its first element, in bytes.
        leading: Leading dimension byte offset.
        stride: Stride dimension byte offset.
        base: Where the repeating pattern of the swizzle starts, in rows of 128 bytes modulo 8.
        swizzle: 0, 32, 64 or 128 bytes.
    """

    start: int
    leading: int
    stride: int
    base: int
    swizzle: int

    def addresses(self, mn: int, k: int, itemsize: int, mn_major: bool) -> Bytes:
        """The address in shared memory of every element's first byte.

        Args:
            mn: Rows of A, or columns of B.
            k: Length of the reduction that an instruction takes.
            itemsize: Bytes of an element.
            mn_major: Neighbours in memory are neighbours along ``mn``: the instruction's transposed form.

        Returns:
            ``[mn, k]``.

        Raises:
            ValueError: A K-major row is longer than an atom of the swizzle.
        """
        width = self.swizzle or CHUNK
        along_mn, along_k = np.arange(mn, dtype=np.intp)[:, None], np.arange(k, dtype=np.intp)[None, :]
        major, minor = (along_mn, along_k) if mn_major else (along_k, along_mn)
        byte = major * itemsize
        if not mn_major and self.swizzle and k * itemsize > width:
            raise ValueError(f"descriptor: {k * itemsize} bytes along k in a K-major matrix swizzled by {width} bytes")
        next_major, next_minor = self.leading, self.stride
        if mn_major and not self.swizzle:
            next_major, next_minor = next_minor, next_major
        address = self.start + byte % width + minor % ATOM_ROWS * width
        address = address + byte // width * next_major + minor // ATOM_ROWS * next_minor
        row = (address >> 7) - self.base
        return address ^ ((row & (self.swizzle // CHUNK - 1 if self.swizzle else 0)) * CHUNK)


def _decode(descriptor: int, swizzle: int) -> Matrix:
    def field(bit: int) -> int:
        return (descriptor >> bit & 0x3FFF) * 16

    return Matrix(field(0), field(16), field(32), descriptor >> 49 & 7, swizzle)


def wgmma_matrix(descriptor: int) -> Matrix:
    """Reads a 64-bit matrix descriptor of ``wgmma``.

    Raises:
        ValueError: A reserved bit is set.
    """
    if descriptor & 0x3FF1_C000_C000_C000:
        raise ValueError(f"wgmma descriptor {descriptor:#018x}: reserved bits are set")
    return _decode(descriptor, WGMMA_SWIZZLES[descriptor >> 62 & 3])


def tcgen05_matrix(descriptor: int) -> Matrix:
    """Reads a 64-bit matrix descriptor of ``tcgen05``.

    Raises:
        ValueError: A reserved bit is set, a constant one is not, or the mode is one that is not emulated: absolute
            leading addresses, or 128 bytes with an atomicity of 32.
    """
    if descriptor & 0x1FE0_0000_C000_C000 or descriptor >> 46 & 7 != 1:
        raise ValueError(f"tcgen05 descriptor {descriptor:#018x}: reserved bits are wrong")
    mode = descriptor >> 61 & 7
    if descriptor >> 52 & 1 or mode not in TCGEN05_SWIZZLES:
        raise ValueError(f"tcgen05 descriptor {descriptor:#018x}: not emulated: absolute offset or swizzle {mode}")
    return _decode(descriptor, TCGEN05_SWIZZLES[mode])


@dataclass(frozen=True)
class Product:
    """What an instruction descriptor of ``tcgen05.mma``, kind f16 or tf32, says.

    Attributes:
        d: Type of the accumulator: ``"f16"`` or ``"f32"``.
        a: Type of A: ``"f16"``, ``"bf16"`` or ``"tf32"``.
        b: Type of B.
        a_mn_major: A is M-major.
        b_mn_major: B is N-major.
        m: Rows.
        n: Columns.
    """

    d: str
    a: str
    b: str
    a_mn_major: bool
    b_mn_major: bool
    m: int
    n: int


def tcgen05_product(descriptor: int, kind: str) -> Product:
    """Reads a 32-bit instruction descriptor.

    Args:
        descriptor: The operand ``idesc``.
        kind: ``"f16"`` or ``"tf32"``.

    Raises:
        ValueError: It asks for what is not emulated: sparsity, negation, saturation, a shift; or for types that are not
            the kind's, or a shape that does not exist for one CTA.
    """
    if descriptor & 0xE080_604F:
        raise ValueError(f"tcgen05 instruction descriptor {descriptor:#010x}: not emulated, or reserved bits are set")
    inputs = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}}[kind]
    outputs = {"f16": {0: "f16", 1: "f32"}, "tf32": {1: "f32"}}[kind]
    d, a, b = descriptor >> 4 & 3, descriptor >> 7 & 7, descriptor >> 10 & 7
    if d not in outputs or a not in inputs or b not in inputs:
        raise ValueError(f"tcgen05 instruction descriptor {descriptor:#010x}: types {d}, {a}, {b} of kind {kind}")
    m, n = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
    if m not in (64, 128) or not 0 < n <= 256 or n % (m // 8):
        raise ValueError(f"tcgen05 instruction descriptor {descriptor:#010x}: no shape {m} x {n}")
    return Product(outputs[d], inputs[a], inputs[b], bool(descriptor >> 15 & 1), bool(descriptor >> 16 & 1), m, n)


@cache
def tmem_lanes(m: int) -> Bytes:
    """The lane of tensor memory that holds each row of D or of A, for one CTA.

    128 rows fill the lanes. 64 rows are dealt to the four warps' quarters, 16 lanes of each.

    Args:
        m: 64 or 128.

    Raises:
        ValueError: Another size.
    """
    if m not in (64, 128):
        raise ValueError(f"tmem_lanes: 64 or 128 rows expected, got {m}")
    rows = np.arange(m, dtype=np.intp)
    (lanes,) = frozen(rows if m == 128 else rows // 16 * 32 + rows % 16)
    return lanes


@cache
def tmem_places(shape: str, count: int, split: int = 0) -> Places:
    """Which cells of tensor memory the registers of a warp are in ``tcgen05.ld`` and ``tcgen05.st``.

    Args:
        shape: ``"32x32b"``: a lane of memory for a lane of the warp; or ``"16x32bx2"``: the first 16 lanes of memory,
            once for each half of the warp.
        count: Registers: of ``.x32`` it is 32.
        split: Columns from the first half's to the second half's, of ``"16x32bx2"``.

    Returns:
        Lanes and columns ``[32, count]``, relative to the address.

    Raises:
        ValueError: A shape that is not emulated.
    """
    thread, register = np.arange(32, dtype=np.intp)[:, None], np.arange(count, dtype=np.intp)[None, :]
    if shape == "32x32b":
        lanes, columns = frozen(thread, register)
    elif shape == "16x32bx2":
        lanes, columns = frozen(thread % 16, register + thread // 16 * split)
    else:
        raise ValueError(f"tmem_places: not emulated: {shape}")
    return lanes, columns
