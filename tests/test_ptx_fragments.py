"""Fragments, descriptors and swizzles, element by element: the PTX ISA's formulas, and Triton's linear layouts.

The formulas are written here a second time, as the ISA states them, for one lane and one element. Triton's layouts are
a second source: they are what its code generator takes registers and shared memory from.
"""

from collections.abc import Iterable
from typing import Any

import mma_sp
import numpy as np
import pytest

from fpe.bench.lab.ptx.descriptors import (
    Matrix,
    tcgen05_matrix,
    tcgen05_product,
    tmem_lanes,
    tmem_places,
    wgmma_matrix,
)
from fpe.bench.lab.ptx.fragments import ldmatrix, mma_a, mma_b, mma_c, mma_sp_metadata, wgmma_a, wgmma_d

pytest.importorskip("triton")
from triton._C.libtriton import gluon_ir, ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.experimental.gluon.language import DotOperandLayout, NVMMADistributedLayout, NVMMASharedLayout, float32
from triton.experimental.gluon.language.nvidia.blackwell import TensorMemoryLayout

Place = tuple[int, int]


def a_place(k: int, itemsize: int, lane: int, i: int) -> Place:
    """Row and column of ``ai``, from the section of each shape."""
    group, thread = lane >> 2, lane % 4
    if itemsize == 4:
        return group + 8 * (i in (1, 3)), thread + 4 * (i >= 2)
    if k == 8:
        return group + 8 * (i >= 2), thread * 2 + (i & 1)
    if itemsize == 2:
        return (group if i < 2 or 4 <= i < 6 else group + 8), thread * 2 + (i & 1) + 8 * (i >= 4)
    return (group if i < 4 or 8 <= i < 12 else group + 8), thread * 4 + (i & 3) + 16 * (i >= 8)


def b_place(k: int, itemsize: int, lane: int, i: int) -> Place:
    """Row and column of ``bi``."""
    group, thread = lane >> 2, lane % 4
    if itemsize == 4:
        return thread + 4 * (i == 1), group
    if itemsize == 2:
        return thread * 2 + (i & 1) + 8 * (i >> 1), group
    return thread * 4 + (i & 3) + 16 * (i >= 4), group


SHAPES = [(4, 4), (8, 4), (8, 2), (16, 2), (16, 1), (32, 1)]


@pytest.mark.parametrize(("k", "itemsize"), SHAPES)
def test_mma_a_and_b_are_the_isas(k: int, itemsize: int) -> None:
    for places, formula, elements in (
        (mma_a(16, k, itemsize), a_place, k // 2),
        (mma_b(k, 8, itemsize), b_place, k // 4),
    ):
        assert places[0].shape == places[1].shape == (32, elements)
        for lane, i in np.ndindex(32, elements):
            assert (places[0][lane, i], places[1][lane, i]) == formula(k, itemsize, lane, i)


def test_sparse_fragments_are_the_isas() -> None:
    """B of m16n8k32 and the accumulators, and which lane and bits tell the columns of each quad."""
    rows, columns = mma_b(32, 8, 2)
    assert all((rows[lane, i], columns[lane, i]) == mma_sp.b_place(lane, i) for lane, i in np.ndindex(32, 8))
    rows, columns = mma_c(16, 8)
    assert all((rows[lane, i], columns[lane, i]) == mma_sp.c_place(lane, i) for lane, i in np.ndindex(32, 4))
    for k, selector in ((32, 0), (32, 1), (16, 0), (16, 1), (16, 2), (16, 3)):
        lanes, bits = mma_sp_metadata(k, selector)
        for row, quad in np.ndindex(16, k // 4):
            assert (lanes[row, quad], bits[row, quad]) == mma_sp.metadata_place(row, quad, k, selector)
        # The packed values of a quad are elements 2 * quad and 2 * quad + 1 of half as many columns.
        rows, packed = mma_a(16, k // 2, 2)
        for lane, i in np.ndindex(32, k // 4):
            assert (rows[lane, i], packed[lane, i] // 2 * 4) == mma_sp.a_place(lane, i)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_is_the_isas(count: int) -> None:
    """Lane 4 * r + c gets columns 2c and 2c + 1 of row r of each matrix, or of its transpose."""
    matrices = np.arange(count * 64).reshape(count, 8, 8)
    addressed = matrices.reshape(count * 8, 8)  # the row that each lane's address points to
    for transposed in (False, True):
        givers, columns = ldmatrix(count, transposed)
        got = addressed[givers, columns]
        for lane, matrix, half in np.ndindex(32, count, 2):
            row, column = lane // 4, 2 * (lane % 4) + half
            meant = matrices[matrix].T if transposed else matrices[matrix]
            assert got[lane, 2 * matrix + half] == meant[row, column]


@pytest.mark.parametrize("n", [8, 16, 64, 256])
def test_wgmma_fragments_are_the_isas(n: int) -> None:
    rows, columns = wgmma_d(n)
    for lane, i in np.ndindex(128, n // 2):
        row = 16 * (lane // 32) + lane % 32 // 4 + (8 if i % 4 >= 2 else 0)
        assert (rows[lane, i], columns[lane, i]) == (row, i // 4 * 8 + lane % 4 * 2 + i % 2)
    for k, itemsize in ((16, 2), (8, 4)):
        rows, columns = wgmma_a(k, itemsize)
        for lane, i in np.ndindex(128, k // 2):
            row, column = a_place(k, itemsize, lane % 32, i)
            assert (rows[lane, i], columns[lane, i]) == (row + lane // 32 * 16, column)


def test_a_fragment_can_be_kept() -> None:
    """They are computed once, so nobody may write to them."""
    with pytest.raises(ValueError, match="read-only"):
        mma_a(16, 16, 2)[0][0, 0] = 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mma_a(8, 16, 2), "mma_a: 16 rows"),
        (lambda: mma_a(16, 8, 1), "mma_a: 16 rows and a multiple of 16 bytes"),
        (lambda: mma_a(16, 16, 8), "elements of 1, 2 or 4 bytes"),
        (lambda: mma_b(16, 16, 2), "mma_b: 8 columns"),
        (lambda: mma_c(16, 16), "mma_c: 16 x 8"),
        (lambda: mma_sp_metadata(32, 2), "selector below 64 / k"),
        (lambda: ldmatrix(3, False), "1, 2 or 4 matrices"),
        (lambda: wgmma_a(16, 4), "32 bytes along k"),
        (lambda: wgmma_d(12), "multiple of 8"),
        (lambda: tmem_lanes(32), "64 or 128 rows"),
        (lambda: tmem_places("16x256b", 4), "not emulated: 16x256b"),
        (lambda: wgmma_matrix(1 << 14), "reserved bits"),
        (lambda: tcgen05_matrix(0x4000_0040_0000_0000), "reserved bits"),
        (lambda: tcgen05_matrix(0x2000_4040_0000_0000), "swizzle 1"),
        (lambda: tcgen05_product(0x0804_0010, "tf32"), "types 1, 0, 0 of kind tf32"),
        (lambda: tcgen05_product(0x0804_0014, "f16"), "not emulated"),
        (lambda: tcgen05_product(0x0302_0010, "f16"), "no shape 48 x 8"),
    ],
)
def test_what_does_not_exist_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Triton's linear layouts.


@pytest.fixture(scope="module")
def builder() -> Any:
    context = ir.context()
    ir.load_dialects(context)
    make_backend(GPUTarget("cuda", 90, 32)).load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    builder.kept = context  # type: ignore[attr-defined]
    return builder


def linear(builder: Any, layout: Any, shape: Iterable[int]) -> Any:
    return builder.to_linear_layout(layout._to_ir(builder), list(shape))


def spread(*bases: list[list[int]]) -> np.ndarray:
    """What a linear layout gives for every index, the first list of bases being the lowest bits: ``[indices, 2]``."""
    joined = np.array([b for part in bases for b in part]).reshape(-1, 2)
    index = np.arange(1 << len(joined))[:, None] >> np.arange(len(joined)) & 1
    return np.bitwise_xor.reduce(np.where(index[:, :, None] != 0, joined, 0), axis=1)


def distributed(layout: Any) -> np.ndarray:
    """Rows and columns of a distributed layout: ``[warps * 32, elements, 2]``."""
    elements = 1 << len(layout.reg_bases)
    return spread(layout.reg_bases, layout.lane_bases, layout.warp_bases).reshape(-1, elements, 2)


@pytest.mark.parametrize(("k", "itemsize"), [(16, 2), (8, 4)])
def test_mma_fragments_are_tritons(builder: Any, k: int, itemsize: int) -> None:
    parent = NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    width = 4 // itemsize
    for layout, shape, ours in (
        (DotOperandLayout(0, parent, width), (16, k), mma_a(16, k, itemsize)),
        (DotOperandLayout(1, parent, width), (k, 8), mma_b(k, 8, itemsize)),
        (parent, (16, 8), mma_c(16, 8)),
    ):
        np.testing.assert_array_equal(np.stack(ours, -1), distributed(linear(builder, layout, shape)))


@pytest.mark.parametrize("n", [8, 32, 64, 128, 256])
def test_wgmma_fragments_are_tritons(builder: Any, n: int) -> None:
    parent = NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])
    np.testing.assert_array_equal(np.stack(wgmma_d(n), -1), distributed(linear(builder, parent, (64, n))))
    for k, itemsize in ((16, 2), (8, 4)):
        layout = linear(builder, DotOperandLayout(0, parent, 4 // itemsize), (64, k))
        np.testing.assert_array_equal(np.stack(wgmma_a(k, itemsize), -1), distributed(layout))


def offsets(builder: Any, swizzle: int, bits: int, shape: tuple[int, int], transposed: bool = False) -> np.ndarray:
    """Byte of every element of a tile in Triton's shared memory: ``[rows, columns]``."""
    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=2, transposed=transposed)
    places = spread(linear(builder, layout, shape).offset_bases)
    found = np.full(shape, -1)
    found[places[:, 0], places[:, 1]] = np.arange(len(places)) * bits // 8
    assert (found >= 0).all()
    return found


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize(("bits", "mn"), [(16, 8), (16, 64), (32, 64)])
def test_k_major_matrices_are_tritons(builder: Any, swizzle: int, bits: int, mn: int) -> None:
    """Every instruction's 32 bytes of a tile as wide as the swizzle; the start moves within the atom."""
    itemsize = bits // 8
    tile = offsets(builder, swizzle, bits, (mn, swizzle // itemsize))
    step = 32 // itemsize
    for first in range(0, swizzle // itemsize, step):
        matrix = Matrix(4096 + first * itemsize, 16, 8 * swizzle, 0, swizzle)
        ours = matrix.addresses(mn, step, itemsize, mn_major=False)
        np.testing.assert_array_equal(ours, 4096 + tile[:, first : first + step])


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("bits", [16, 32])
def test_mn_major_matrices_are_tritons(builder: Any, swizzle: int, bits: int) -> None:
    """A tile of 64 along k and two atoms along mn, stored by rows of k."""
    itemsize, k = bits // 8, 64
    mn = 2 * swizzle // itemsize
    tile = offsets(builder, swizzle, bits, (k, mn))
    np.testing.assert_array_equal(tile.T, offsets(builder, swizzle, bits, (mn, k), transposed=True))
    step = 32 // itemsize
    for first in range(0, k, step):
        matrix = Matrix(8192 + first * swizzle, k * swizzle, 8 * swizzle, 0, swizzle)
        ours = matrix.addresses(mn, step, itemsize, mn_major=True)
        np.testing.assert_array_equal(ours, 8192 + tile[first : first + step].T)


def test_unswizzled_matrices_are_the_isas() -> None:
    """Core matrices of 8 rows of 16 bytes, each contiguous: the leading offset goes along k, the stride along mn."""
    matrix = Matrix(256, 2048, 128, 0, 0)
    k_major, mn_major = matrix.addresses(64, 16, 2, False), matrix.addresses(64, 16, 2, True)
    for i, j in np.ndindex(64, 16):
        assert k_major[i, j] == 256 + i // 8 * 128 + i % 8 * 16 + j // 8 * 2048 + j % 8 * 2
        assert mn_major[i, j] == 256 + i // 8 * 128 + j % 8 * 16 + j // 8 * 2048 + i % 8 * 2


def test_the_base_offset_moves_the_pattern() -> None:
    """A matrix that starts 3 rows of 128 bytes into the pattern reads what a matrix at the pattern's start does."""
    start, moved = Matrix(1024, 16, 1024, 0, 128), Matrix(1024 + 384, 16, 1024, 3, 128)
    np.testing.assert_array_equal(start.addresses(8, 16, 2, False) + 384, moved.addresses(8, 16, 2, False))
    with pytest.raises(ValueError, match="64 bytes along k in a K-major matrix swizzled by 32"):
        Matrix(0, 16, 256, 0, 32).addresses(8, 32, 2, False)


def test_descriptors_are_read_as_triton_writes_them() -> None:
    """Constants out of compiled kernels, with a start of 0x2000 bytes."""
    assert wgmma_matrix(0x4000_0040_0000_0200) == Matrix(0x2000, 0, 1024, 0, 128)
    assert wgmma_matrix(0x4000_0040_0200_0200) == Matrix(0x2000, 8192, 1024, 0, 128)
    assert wgmma_matrix(0xC006_0010_0001_0001) == Matrix(16, 16, 256, 3, 32)
    assert tcgen05_matrix(0x4000_4040_0200_0200) == Matrix(0x2000, 8192, 1024, 0, 128)
    assert tcgen05_matrix(0xC000_4010_0000_0200) == Matrix(0x2000, 0, 256, 0, 32)
    found = tcgen05_product(1 << 4 | 1 << 7 | 1 << 10 | 1 << 16 | (64 // 8) << 17 | (128 // 16) << 24, "f16")
    assert (found.d, found.a, found.b, found.m, found.n) == ("f32", "bf16", "bf16", 128, 64)
    assert (found.a_mn_major, found.b_mn_major) == (False, True)


@pytest.mark.parametrize("m", [64, 128])
def test_tensor_memory_is_tritons(builder: Any, m: int) -> None:
    """The lanes of an accumulator's rows; half of them are unused with 64 rows."""
    layout = linear(builder, TensorMemoryLayout(block=(m, 32), col_stride=1), (m, 32))
    rows = spread(layout.rows)[:, 0]
    assert (rows[tmem_lanes(m)] == np.arange(m)).all()
    assert len(set(tmem_lanes(m))) == m and (m == 128 or (tmem_lanes(m) % 32 < 16).all())


@pytest.mark.parametrize(("m", "shape"), [(128, "32x32b"), (64, "16x32bx2")])
@pytest.mark.parametrize("n", [16, 64])
def test_tensor_memory_accesses_are_tritons(m: int, shape: str, n: int) -> None:
    """The registers of an accumulator; with 64 rows Triton infers ``16x32bx2``, half of the columns for each half."""
    memory = TensorMemoryLayout(block=(m, n), col_stride=1)
    layout = gluon_ir.compute_tmem_reg_layout(float32, [m, n], memory, 4, "32x32b", [])
    theirs = distributed(layout)  # [128, elements, 2]
    lanes, columns = tmem_places(shape, theirs.shape[1], n // 2)
    rows = np.full(128, -1)
    rows[tmem_lanes(m)] = np.arange(m)
    for warp in range(4):
        ours = np.stack([rows[32 * warp + lanes], columns], -1)
        np.testing.assert_array_equal(ours, theirs[32 * warp : 32 * warp + 32])
