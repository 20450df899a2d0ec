"""The partition products for few rows on kept values; see :mod:`.gluon`.

A lane's words are not loaded as they lie: :mod:`fpe.kernels.bitmap.gluon` makes them of values and bits. Labels, masks,
activations and products are as for a whole weight. Each warp that shares a reduction takes one range of columns, so
that at every step the values of its rows go on where those of the step before end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..bitmap.gluon import kept_words, lines_follow, patterns, values_before, word_of
from ..hashing import COLUMN, ROW, signed
from .fragments import add_rows, hash_of, layout_of, masks_of_rows, places, share_of_row, store

_ROW, _COLUMN = gl.constexpr(signed(ROW)), gl.constexpr(signed(COLUMN))

STEPS = gl.constexpr(4)  # of 32 columns: what a lane's label word serves, and four words of bits


@gluon.jit
def _group(
    accs,
    x_ptrs,
    values_ptr,
    upper_bits,
    lower_bits,
    upper_first,
    lower_first,
    upper_labels_ptrs,
    lower_labels_ptrs,
    hashed,
    selectors,
    turn,
    register,
    group,
    K,
    stride_xa,
    stride_pp,
    ALPHA: gl.constexpr,
    DIGITS: gl.constexpr,
    SEEDED: gl.constexpr,
    MERGE: gl.constexpr,
    KIND: gl.constexpr,
    WHOLE: gl.constexpr,
    GUARDED: gl.constexpr,
):
    """128 columns of each part of the reduction: adds their products to the sums."""
    upper_labels = ()
    lower_labels = ()
    if SEEDED:
        upper_labels = (hash_of(hashed + group * 4 * _COLUMN),)
    for digit in gl.static_range(0 if SEEDED else DIGITS):
        at = group * 4 + digit * stride_pp
        upper_labels += (gl.load(upper_labels_ptrs + at, mask=group * 128 < K, other=0),)
        lower_labels += (gl.load(lower_labels_ptrs + at, mask=group * 128 < K, other=0),)
    for step in gl.static_range(STEPS):
        upper_word = word_of(upper_bits, register, step)
        lower_word = word_of(lower_bits, register, step)
        upper, upper_first = kept_words(values_ptr, upper_word, upper_first, selectors, turn, register, GUARDED)
        lower, lower_first = kept_words(values_ptr, lower_word, lower_first, selectors, turn, register, GUARDED)
        upper_masks, lower_masks = masks_of_rows(upper_labels, lower_labels, upper, ALPHA, DIGITS, SEEDED, step)
        sums = ()
        for child in gl.static_range(ALPHA):
            if MERGE or child == 0:
                x_at = x_ptrs + (group * 64 + child * (stride_xa * 4)) + step * 16
                if WHOLE:
                    x = gl.load(x_at)
                else:
                    x = gl.load(x_at, mask=group * 128 + step * 32 + turn < K, other=0)
            if DIGITS == 0:
                acc = add_rows(accs[0], upper, lower, x, KIND)
            else:
                upper_share = share_of_row(upper, upper_masks, child, ALPHA, DIGITS, SEEDED)
                lower_share = share_of_row(lower, lower_masks, child, ALPHA, DIGITS, SEEDED)
                acc = add_rows(accs[0 if MERGE else child], upper_share, lower_share, x, KIND)
            if MERGE:
                accs = (acc,)
            else:
                sums += (acc,)
        if not MERGE:
            accs = sums
    return accs, upper_first, lower_first


@gluon.jit
def _bits(bits_ptrs, group, register, WORDS, WHOLE: gl.constexpr):
    """Four words of bits of a row, those of a group."""
    at = group * 4
    if WHOLE:
        bits = gl.load(bits_ptrs + at)
    else:
        bits = gl.load(bits_ptrs + at, mask=at + register < WORDS, other=0)
    return bits


@gluon.jit(do_not_specialize=["M", "KEY", "NNZ"])
def multiply_kept_rows(
    x_ptr,  # pairs, int32
    values_ptr,  # 16-bit values as bits
    bits_ptr,
    starts_ptr,
    bases_ptr,
    labels_ptr,  # int32
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    WORDS,
    STEPS_K,
    KEY,
    NNZ,
    stride_xm,
    stride_xa,
    stride_bn,
    stride_pp,
    stride_pn,
    stride_os,
    stride_om,
    stride_oa,
    ALPHA: gl.constexpr,
    DIGITS: gl.constexpr,
    SEEDED: gl.constexpr,
    MERGE: gl.constexpr,
    WARPS_IN: gl.constexpr,
    WARPS_OUT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr,
    UNIT: gl.constexpr,
    WHOLE: gl.constexpr,
    KIND: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROW: gl.constexpr = _ROW,
    COLUMN: gl.constexpr = _COLUMN,
):
    """``split_matmul`` and ``merge_matmul`` on kept values as they are stored, of ``BLOCK_N`` outputs.

    Strides of ``x`` are in units of 16 bytes, that of the bits in units of ``UNIT`` words, so that the compiler knows
    that loads are aligned.
    """
    TILES: gl.constexpr = BLOCK_N // 16
    TILES_M: gl.constexpr = BLOCK_M // 8
    LAYOUT: gl.constexpr = layout_of(WARPS_IN, WARPS_OUT, TILES // WARPS_OUT, TILES_M)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    pid_m = gl.program_id(0) % tiles_m  # programs that read the same weights run together
    pid_n = gl.program_id(0) // tiles_m
    pid_split = gl.program_id(1)
    first = STEPS_K * pid_split // SPLIT
    steps = STEPS_K * (pid_split + 1) // SPLIT - first

    inner, tile, tile_m, lane, register = places(LAYOUT, WARPS_IN, TILES, TILES_M)
    # What lies beyond the last row is never stored: any row may be read in its place.
    row = pid_n * BLOCK_N + tile * 16 + lane // 4 * 2
    upper = gl.minimum(row, N - 1).to(gl.int64)
    lower = gl.minimum(row + 1, N - 1).to(gl.int64)
    m = gl.minimum(pid_m * BLOCK_M + tile_m * 8 + lane // 4, M - 1).to(gl.int64)
    group = first * WARPS_IN + inner * steps  # the first of 128 columns
    x_ptrs = x_ptr + m * (stride_xm * 4) + (lane % 4 * 4 + register)
    upper_bits_ptrs = bits_ptr + upper * (stride_bn * UNIT) + register
    lower_bits_ptrs = bits_ptr + lower * (stride_bn * UNIT) + register
    upper_labels_ptrs = upper_bits_ptrs  # nobody reads them
    lower_labels_ptrs = lower_bits_ptrs
    if DIGITS > 0 and not SEEDED:
        upper_labels_ptrs = labels_ptr + upper * stride_pn + lane % 4
        lower_labels_ptrs = labels_ptr + lower * stride_pn + lane % 4
    hashed = row // 2 * ROW + lane % 4 * COLUMN + KEY
    selectors = patterns(lane)
    turn = lane % 4 * 8

    accs = ()
    for _ in gl.static_range(1 if MERGE else ALPHA):
        accs += (gl.full([WARPS_IN, TILES, TILES_M, 32, 4], 0.0, gl.float32, LAYOUT),)
    upper_first = values_before(bits_ptr, starts_ptr, bases_ptr, upper, group * 4, WORDS, lane, register)
    lower_first = values_before(bits_ptr, starts_ptr, bases_ptr, lower, group * 4, WORDS, lane, register)
    upper_bits = _bits(upper_bits_ptrs, group, register, WORDS, WHOLE)
    lower_bits = _bits(lower_bits_ptrs, group, register, WORDS, WHOLE)
    free = lines_follow(starts_ptr, bases_ptr, (pid_n + 1) * BLOCK_N, N, WORDS, NNZ)
    free_steps = gl.where(free, steps, 0)
    for guarded in gl.static_range(2):
        begin = 0
        end = free_steps
        if guarded == 1:
            begin = free_steps
            end = steps
        for step in range(begin, end):
            following = group + gl.minimum(step + 1, steps - 1)
            upper_next = _bits(upper_bits_ptrs, following, register, WORDS, WHOLE)
            lower_next = _bits(lower_bits_ptrs, following, register, WORDS, WHOLE)
            accs, upper_first, lower_first = _group(
                accs, x_ptrs, values_ptr, upper_bits, lower_bits, upper_first, lower_first, upper_labels_ptrs,
                lower_labels_ptrs, hashed, selectors, turn, register, group + step, K, stride_xa, stride_pp, ALPHA,
                DIGITS, SEEDED, MERGE, KIND, WHOLE, guarded == 1,
            )  # fmt: skip
            upper_bits = upper_next
            lower_bits = lower_next
    column = pid_n * BLOCK_N + tile * 16 + lane // 4 * 2 + register // 2
    row_m = pid_m * BLOCK_M + tile_m * 8 + lane % 4 * 2 + register % 2
    for child in gl.static_range(1 if MERGE else ALPHA):
        out = out_ptr + pid_split.to(gl.int64) * stride_os + child * stride_oa
        store(accs[child], out, bias_ptr, child * N, column, row_m, M, N, stride_om, HAS_BIAS, ACTIVATION)
