"""``mma.sp::ordered_metadata`` of 16-bit floats on the CPU, written from the tables of the PTX ISA.

Section "Matrix multiply-accumulate operation using mma.sp instruction with sparse matrix A": the fragments of m16n8k16
and m16n8k32 with .f16 and .bf16 types, sparse matrix storage, and the sparsity selector. It shares no code with the
package: what packs weights is checked against it.
"""

import numpy as np

LANES = range(32)
ORDERED = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)


def a_place(lane: int, i: int) -> tuple[int, int]:
    """Row of A, and the first of the four columns, that element ``ai`` comes from."""
    group, thread = lane >> 2, lane % 4
    row = group if i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 4 + (0 if i < 4 else 16)


def b_place(lane: int, i: int) -> tuple[int, int]:
    """Row and column of B that ``bi`` holds."""
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + 8 * (i >> 1), group


def c_place(lane: int, i: int) -> tuple[int, int]:
    """Row and column of C and D that ``ci`` holds."""
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def metadata_place(row: int, quad: int, k: int, selector: int) -> tuple[int, int]:
    """The lane whose metadata register has the indices of a row's quad, and their lowest bit.

    m16n8k32: a pair of each four lanes contributes, T0 and T1 (selector 0) or T2 and T3 (1), of which the first
    has columns 0 to 15 and the second 16 to 31. m16n8k16: one lane of each four, the selector's. The low half of a
    register is for row ``group``, the high half for row ``group + 8``.
    """
    thread = 2 * selector + quad // 4 if k == 32 else selector
    return 4 * (row % 8) + thread, 16 * (row // 8) + 4 * (quad % 4)


def floats(registers: np.ndarray, kind: str) -> np.ndarray:
    """The two 16-bit floats of each 32-bit register, low half first: ``[..., r]`` to ``[..., 2 * r]``."""
    halves = np.ascontiguousarray(registers).view(np.uint16)
    if kind == "f16":
        return halves.view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def dense_a(a: np.ndarray, metadata: np.ndarray, k: int, selector: int, kind: str) -> np.ndarray:
    """Multiplicand A ``[..., 16, k]`` from its fragments ``[..., 32, k // 8]`` and metadata ``[..., 32]``.

    Raises:
        ValueError: The metadata of a quad is not ordered.
    """
    values = floats(a, kind)
    dense = np.zeros((*a.shape[:-2], 16, k))
    metadata = metadata.astype(np.int64) & 0xFFFFFFFF
    for lane in LANES:
        for i in range(0, k // 4, 2):
            row, first = a_place(lane, i)
            source, bit = metadata_place(row, first // 4, k, selector)
            indices = (metadata[..., source] >> bit) & 15
            if not np.isin(indices, ORDERED).all():
                raise ValueError(f"mma.sp::ordered_metadata: indices of row {row}, columns {first}..: {indices}")
            for which in (0, 1):
                column = first + ((indices >> (2 * which)) & 3)
                np.put_along_axis(dense[..., row, :], column[..., None], values[..., lane, i + which, None], -1)
    return dense


def mma_sp(
    c: np.ndarray, a: np.ndarray, b: np.ndarray, metadata: np.ndarray, selector: int, kind: str, k: int = 32
) -> np.ndarray:
    """``D = A @ B + C`` of a warp.

    Args:
        c: float32 ``[..., 32, 4]``, lanes and registers.
        a: int32 ``[..., 32, k // 8]``.
        b: int32 ``[..., 32, k // 8]``.
        metadata: int32 ``[..., 32]``.
        selector: Which lanes contribute metadata: 0 or 1 for m16n8k32, 0 to 3 for m16n8k16.
        kind: ``"bf16"`` or ``"f16"``.
        k: 32 or 16.
    """
    values = floats(b, kind)
    dense_b = np.zeros((*b.shape[:-2], k, 8))
    for lane in LANES:
        for i in range(k // 4):
            dense_b[(..., *b_place(lane, i))] = values[..., lane, i]
    product = dense_a(a, metadata, k, selector, kind) @ dense_b
    d = np.array(np.broadcast_to(c, np.broadcast_shapes(c.shape, (*product.shape[:-2], 32, 4))), np.float32)
    for lane in LANES:
        for i in range(4):
            d[..., lane, i] += product[(..., *c_place(lane, i))].astype(np.float32)
    return d
