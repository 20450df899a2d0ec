"""The expanded MLP for few rows: both products on fragments that come from memory directly.

The first product is that of :func:`fpe.kernels.partition.gluon.multiply_rows`, for all parents. A lane has the sums of
pairs of neighbouring parents. After the activation these become words of two 16-bit numbers and move to other threads
once, through shared memory. There a lane reads 16 bytes, which are its B fragments of the second product. The weights
of the second product also come from memory directly.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..hashing import COLUMN, ROW, signed
from ..partition.fragments import (
    activate,
    add_rows,
    fetch,
    hash_of,
    layout_of,
    layout_of_lanes,
    masks_of_rows,
    places,
    share_of_row,
    store,
)
from ..partition.gluon import sums_of_rows

_ROW, _COLUMN = gl.constexpr(signed(ROW)), gl.constexpr(signed(COLUMN))


@gluon.jit
def _words(even, odd, KIND: gl.constexpr):
    """Words of two 16-bit numbers, the even one in the lower half."""
    text: gl.constexpr = "cvt.rn." + KIND + "x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(text, "=r,f,f", [even, odd], gl.int32, is_pure=True, pack=1)


@gluon.jit(do_not_specialize=["M", "KEY1", "KEY2"])
def multiply_twice(
    x_ptr,  # pairs, int32
    words1_ptr,
    labels1_ptr,  # int32
    bias1_ptr,
    words2_ptr,
    labels2_ptr,
    bias2_ptr,
    out_ptr,
    M,
    N,
    SIZE_WORDS,
    STEPS_K,
    KEY1,
    KEY2,
    stride_xm,
    stride_w1,
    stride_p1,
    stride_l1,
    stride_w2,
    stride_p2,
    stride_l2,
    H: gl.constexpr,
    ALPHA: gl.constexpr,
    DIGITS: gl.constexpr,
    SEEDED1: gl.constexpr,
    SEEDED2: gl.constexpr,
    MERGED: gl.constexpr,
    WARPS_IN: gl.constexpr,
    WARPS_OUT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    UNIT1: gl.constexpr,
    UNIT2: gl.constexpr,
    WHOLE: gl.constexpr,
    AHEAD: gl.constexpr,
    KIND: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS1: gl.constexpr,
    HAS_BIAS2: gl.constexpr,
):
    """``BLOCK_N`` outputs of ``y[M, N]``, 16 for each warp, from all ``H`` parents.

    Strides of ``x`` are in units of 16 bytes, those of a weight in units of ``UNIT`` words, so that the compiler knows
    that loads are aligned.
    """
    TILES: gl.constexpr = BLOCK_H // 16
    TILES_M: gl.constexpr = BLOCK_M // 8
    STEPS: gl.constexpr = BLOCK_H // 32
    WARPS: gl.constexpr = BLOCK_N // 16
    HIDDEN: gl.constexpr = layout_of(WARPS_IN, WARPS_OUT, TILES // WARPS_OUT, TILES_M)
    OUT: gl.constexpr = layout_of(1, WARPS, 1, TILES_M)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    PLANE: gl.constexpr = H // 2
    PLANES: gl.constexpr = 1 if MERGED else ALPHA
    first_m, first_n = gl.program_id(0) * BLOCK_M, gl.program_id(1) * BLOCK_N

    # L2 is asked for the second weights before the hidden layer is computed: two lines of a row at a time.
    _, tile, _, lane, _ = places(layout_of_lanes(OUT), 1, WARPS, 1)
    row = gl.minimum(first_n + tile * 16 + lane // 2, N - 1).to(gl.int64)
    for line in gl.static_range((PLANES * PLANE + 63) // 64):
        at = gl.minimum(line * 64 + lane % 2 * 32, PLANES * PLANE - 1)
        fetch((words2_ptr + row * (stride_w2 * UNIT2) + at,), (0,), 1)

    accs = sums_of_rows(
        x_ptr, words1_ptr, labels1_ptr, first_m, 0, 0, STEPS_K, M, H, SIZE_WORDS, STEPS_K, KEY1, stride_xm, 0,
        stride_w1, stride_p1, stride_l1, ALPHA, DIGITS, SEEDED1, False, WARPS_IN, HIDDEN, TILES, TILES_M, UNIT1, WHOLE,
        AHEAD, KIND,
    )  # fmt: skip

    _, tile, _, lane, register = places(HIDDEN, WARPS_IN, TILES, TILES_M)
    parent = tile * 16 + lane // 4 * 2 + register // 2
    shared = gl.allocate_shared_memory(gl.int32, [ALPHA, STEPS, TILES_M, 32, 4], FLAT)
    for child in gl.static_range(ALPHA):
        hidden = gl.expand_dims(gl.sum(accs[child], 0), 0)
        if HAS_BIAS1:
            hidden += gl.load(bias1_ptr + (child * H + parent), mask=parent < H, other=0.0).to(gl.float32)
        hidden = activate(hidden, ACTIVATION)
        if H < BLOCK_H:  # an overflow in the last parent, which padding repeats, would meet the zeros of w2
            hidden = gl.where(parent < H, hidden, 0.0)
        # Registers are two parents by two rows of x; a word is two parents of one row.
        even, odd = gl.split(hidden.reshape([TILES, TILES_M, 32, 2, 2]).permute([0, 1, 2, 4, 3]))
        words = _words(even, odd, KIND).reshape([TILES, TILES_M, 8, 4, 2])  # tile, tile_m, word, two rows, row of two
        words = words.permute([1, 3, 4, 0, 2]).reshape([TILES_M, 8, STEPS, 4, 4])  # tile_m, row, step, lane, register
        shared.index(child).store(words.permute([2, 0, 1, 3, 4]).reshape([STEPS, TILES_M, 32, 4]))

    _, tile, tile_m, lane, register = places(OUT, 1, WARPS, TILES_M)
    row = first_n + tile * 16 + lane // 4 * 2
    upper = gl.minimum(row, N - 1).to(gl.int64)
    lower = gl.minimum(row + 1, N - 1).to(gl.int64)
    word = lane % 4 * 4 + register
    upper_ptrs = words2_ptr + upper * (stride_w2 * UNIT2) + word
    lower_ptrs = words2_ptr + lower * (stride_w2 * UNIT2) + word
    upper_labels = ()
    lower_labels = ()
    if SEEDED2:
        upper_labels = (hash_of(row // 2 * _ROW + lane % 4 * _COLUMN + KEY2),)
    for digit in gl.static_range(DIGITS if MERGED and not SEEDED2 else 0):
        labels_ptrs = labels2_ptr + (lane % 4 + digit * stride_p2)
        upper_labels += (gl.load(labels_ptrs + upper * stride_l2),)
        lower_labels += (gl.load(labels_ptrs + lower * stride_l2),)
    acc = gl.full([1, WARPS, TILES_M, 32, 4], 0.0, gl.float32, OUT)
    for step in gl.static_range(STEPS):
        uppers = ()
        lowers = ()
        for plane in gl.static_range(PLANES):
            at = plane * PLANE + step * 16
            if H % 32 == 0:
                uppers += (gl.load(upper_ptrs + at),)
                lowers += (gl.load(lower_ptrs + at),)
            else:
                mask = step * 16 + word < PLANE
                uppers += (gl.load(upper_ptrs + at, mask=mask, other=0),)
                lowers += (gl.load(lower_ptrs + at, mask=mask, other=0),)
        if MERGED:
            upper_masks, lower_masks = masks_of_rows(
                upper_labels, lower_labels, uppers[0], ALPHA, DIGITS, SEEDED2, step
            )
        for child in gl.static_range(ALPHA):
            upper = uppers[0 if MERGED else child]
            lower = lowers[0 if MERGED else child]
            if MERGED:
                upper = share_of_row(upper, upper_masks, child, ALPHA, DIGITS, SEEDED2)
                lower = share_of_row(lower, lower_masks, child, ALPHA, DIGITS, SEEDED2)
            x = shared.index(child).slice(step, 1, dim=0).load(gl.SliceLayout(1, OUT))
            acc = add_rows(acc, upper, lower, gl.expand_dims(x, 1), KIND)
    column = row + register // 2
    row_m = first_m + tile_m * 8 + lane % 4 * 2 + register % 2
    store(acc, out_ptr, bias2_ptr, 0, column, row_m, M, N, N, HAS_BIAS2, None)
