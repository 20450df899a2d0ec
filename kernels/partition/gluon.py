"""The partition products for few rows: weights go from memory to the tensor cores without shared memory.

The order of a reduction is free, so a lane multiplies what it has loaded. With ``g = lane // 4`` and ``t = lane % 4``,
the 16 bytes that a lane loads are its registers of two ``mma.sync.m16n8k16``:

- *On the weight as it is stored* it loads eight neighbouring weights of row ``2 g`` and of row ``2 g + 1``, and the
  same columns of activation row ``g``. Words 0 and 1 belong to the first instruction, words 2 and 3 to the second.
- *On its transpose* (:mod:`.gluon_transposed`) the reduction runs over the rows, so a pair of weights must come from
  two of them. A lane loads eight columns of four or eight neighbouring rows, or four columns of eight. One ``prmt``
  takes the low or the high halves of two rows; the halves of word ``i`` are the outputs ``8 g + 2 i`` and
  ``8 g + 2 i + 1``, or ``4 g + ...``.

The labels lie in memory as these registers want them (see :class:`fpe.kernels.PackedLabels`): shifted left, a label
word has the labels of two of a lane's words in the signs of its bytes, and one ``prmt`` replicates two signs to a mask.
Labels of a seed are computed: one hash serves a lane for 128 columns of two rows, and its bytes become masks by the
same ``prmt``.

The loop uses no shared memory, no ``ldmatrix`` and no conversion, and is the same on every architecture from 8.0 on.
``WARPS_OUT`` groups of warps take different outputs. The ``WARPS_IN`` warps of a group take different parts of the
reduction, whose sums meet in shared memory once, after the loop.

Tensors have the shape ``[parts of the reduction, tiles of outputs, tiles of 8 rows of activations, 32 lanes, 4
registers]``; a tile is 16 outputs, or 64 or 32 on the transpose.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..hashing import COLUMN, ROW, signed
from .fragments import add_rows, fetch, hash_of, layout_of, layout_of_lanes, masks_of_rows, places, share_of_row, store

_ROW, _COLUMN = gl.constexpr(signed(ROW)), gl.constexpr(signed(COLUMN))

STEPS = gl.constexpr(4)  # of 32 columns: what a lane's label word serves


@gluon.jit
def _group(
    accs,
    x_ptrs,
    upper_ptrs,
    lower_ptrs,
    upper_labels_ptrs,
    lower_labels_ptrs,
    hashed,
    group,
    inner,
    word,
    SIZE_WORDS,
    stride_xa,
    stride_pp,
    ALPHA: gl.constexpr,
    DIGITS: gl.constexpr,
    SEEDED: gl.constexpr,
    MERGE: gl.constexpr,
    KIND: gl.constexpr,
    WHOLE: gl.constexpr,
):
    """128 columns of each part of the reduction: adds their products to the sums."""
    upper_labels = ()
    lower_labels = ()
    mask_labels = (group + inner) * 64 < SIZE_WORDS
    if SEEDED:
        upper_labels = (hash_of(hashed + group * 4 * _COLUMN),)
    for digit in gl.static_range(0 if SEEDED else DIGITS):
        at = group * 4 + digit * stride_pp
        if WHOLE:
            upper_labels += (gl.load(upper_labels_ptrs + at),)
            lower_labels += (gl.load(lower_labels_ptrs + at),)
        else:
            upper_labels += (gl.load(upper_labels_ptrs + at, mask=mask_labels, other=0),)
            lower_labels += (gl.load(lower_labels_ptrs + at, mask=mask_labels, other=0),)
    uppers = ()
    lowers = ()
    for step in gl.static_range(STEPS):
        at = group * 64 + step * 16
        if WHOLE:
            uppers += (gl.load(upper_ptrs + at),)
            lowers += (gl.load(lower_ptrs + at),)
        else:
            uppers += (gl.load(upper_ptrs + at, mask=at + word < SIZE_WORDS, other=0),)
            lowers += (gl.load(lower_ptrs + at, mask=at + word < SIZE_WORDS, other=0),)
    for step in gl.static_range(STEPS):
        upper_masks, lower_masks = masks_of_rows(upper_labels, lower_labels, uppers[0], ALPHA, DIGITS, SEEDED, step)
        sums = ()
        for child in gl.static_range(ALPHA):
            if MERGE or child == 0:
                # One address for all steps, whose offsets are immediates of the loads.
                x_at = x_ptrs + (group * 64 + child * (stride_xa * 4)) + step * 16
                if WHOLE:
                    x = gl.load(x_at)
                else:
                    x = gl.load(x_at, mask=group * 64 + step * 16 + word < SIZE_WORDS, other=0)
            upper = share_of_row(uppers[step], upper_masks, child, ALPHA, DIGITS, SEEDED)
            lower = share_of_row(lowers[step], lower_masks, child, ALPHA, DIGITS, SEEDED)
            acc = add_rows(accs[0 if MERGE else child], upper, lower, x, KIND)
            if MERGE:
                accs = (acc,)
            else:
                sums += (acc,)
        if not MERGE:
            accs = sums
    return accs


@gluon.jit
def sums_of_rows(
    x_ptr,  # pairs, int32
    words_ptr,
    labels_ptr,  # int32
    first_m,
    first_n,
    first,
    last,
    M,
    N,
    SIZE_WORDS,
    STEPS_K,
    KEY,
    stride_xm,
    stride_xa,
    stride_wn,
    stride_pp,
    stride_pn,
    ALPHA: gl.constexpr,
    DIGITS: gl.constexpr,
    SEEDED: gl.constexpr,
    MERGE: gl.constexpr,
    WARPS_IN: gl.constexpr,
    LAYOUT: gl.constexpr,
    TILES: gl.constexpr,
    TILES_M: gl.constexpr,
    UNIT: gl.constexpr,
    WHOLE: gl.constexpr,
    AHEAD: gl.constexpr,
    KIND: gl.constexpr,
    ROW: gl.constexpr = _ROW,
    COLUMN: gl.constexpr = _COLUMN,
):
    """Sums of ``TILES`` tiles of weight rows from ``first_n`` on, over the steps ``first .. last - 1``.

    A step is 128 columns a part of the reduction; the last of ``STEPS_K`` may end early. See :func:`multiply_rows`.
    """
    inner, tile, tile_m, lane, register = places(LAYOUT, WARPS_IN, TILES, TILES_M)
    # What lies beyond the last row is never stored: any row may be read in its place.
    row = first_n + tile * 16 + lane // 4 * 2
    upper = gl.minimum(row, N - 1).to(gl.int64)
    lower = gl.minimum(row + 1, N - 1).to(gl.int64)
    m = gl.minimum(first_m + tile_m * 8 + lane // 4, M - 1).to(gl.int64)
    word = inner * 64 + lane % 4 * 4 + register
    x_ptrs = x_ptr + m * (stride_xm * 4) + word
    upper_ptrs = words_ptr + upper * (stride_wn * UNIT) + word
    lower_ptrs = words_ptr + lower * (stride_wn * UNIT) + word
    if SEEDED:
        upper_labels_ptrs = upper_ptrs  # nobody reads them
        lower_labels_ptrs = lower_ptrs
    else:
        upper_labels_ptrs = labels_ptr + upper * stride_pn + (inner * 4 + lane % 4)
        lower_labels_ptrs = labels_ptr + lower * stride_pn + (inner * 4 + lane % 4)
    hashed = row // 2 * ROW + (inner * 4 + lane % 4) * COLUMN + KEY

    accs = ()
    for _ in gl.static_range(1 if MERGE else ALPHA):
        accs += (gl.full([WARPS_IN, TILES, TILES_M, 32, 4], 0.0, gl.float32, LAYOUT),)
    whole = last if WHOLE else gl.minimum(last, SIZE_WORDS // (64 * WARPS_IN))
    if AHEAD > 0:
        # Two lanes fetch the two lines of a row of weights, and those of two planes of its labels.
        inner_f, tile_f, _, lane_f, _ = places(layout_of_lanes(LAYOUT), WARPS_IN, TILES, 1)
        fetched = gl.minimum(first_n + tile_f * 16 + lane_f // 2, N - 1).to(gl.int64)
        group = (first + AHEAD) * WARPS_IN + inner_f
        lines = (words_ptr + fetched * (stride_wn * UNIT) + (group * 64 + lane_f % 2 * 32),)
        steps = (64 * WARPS_IN,)
        for digit in gl.static_range(0, 0 if SEEDED else DIGITS, 2):
            plane = gl.minimum(digit + lane_f % 2, DIGITS - 1)
            lines += (labels_ptr + fetched * stride_pn + (group * 4 + plane * stride_pp),)
            steps += (4 * WARPS_IN,)
    for step in range(first, whole):
        if AHEAD > 0:
            lines = fetch(lines, steps, whole - AHEAD - step)
        accs = _group(
            accs, x_ptrs, upper_ptrs, lower_ptrs, upper_labels_ptrs, lower_labels_ptrs, hashed, step * WARPS_IN, inner,
            word, SIZE_WORDS, stride_xa, stride_pp, ALPHA, DIGITS, SEEDED, MERGE, KIND, True,
        )  # fmt: skip
    if not WHOLE:
        if last == STEPS_K:
            accs = _group(
                accs, x_ptrs, upper_ptrs, lower_ptrs, upper_labels_ptrs, lower_labels_ptrs, hashed,
                (STEPS_K - 1) * WARPS_IN, inner, word, SIZE_WORDS, stride_xa, stride_pp, ALPHA, DIGITS, SEEDED, MERGE,
                KIND, False,
            )  # fmt: skip
    return accs


@gluon.jit(do_not_specialize=["M", "KEY"])
def multiply_rows(
    x_ptr,  # pairs, int32
    words_ptr,
    labels_ptr,  # int32
    bias_ptr,
    out_ptr,
    M,
    N,
    SIZE_WORDS,
    STEPS_K,
    KEY,
    stride_xm,
    stride_xa,
    stride_wn,
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
    AHEAD: gl.constexpr,
    KIND: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """``split_matmul`` and ``merge_matmul`` on the weight as it is stored, of ``BLOCK_N`` outputs.

    Strides of ``x`` are in units of 16 bytes, those of the weight in units of ``UNIT`` words, so that the compiler
    knows that loads are aligned.
    """
    TILES: gl.constexpr = BLOCK_N // 16
    TILES_M: gl.constexpr = BLOCK_M // 8
    LAYOUT: gl.constexpr = layout_of(WARPS_IN, WARPS_OUT, TILES // WARPS_OUT, TILES_M)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    pid_m = gl.program_id(0) % tiles_m  # programs that read the same weights run together
    pid_n = gl.program_id(0) // tiles_m
    pid_split = gl.program_id(1)
    accs = sums_of_rows(
        x_ptr, words_ptr, labels_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, STEPS_K * pid_split // SPLIT,
        STEPS_K * (pid_split + 1) // SPLIT, M, N, SIZE_WORDS, STEPS_K, KEY, stride_xm, stride_xa, stride_wn, stride_pp,
        stride_pn, ALPHA, DIGITS, SEEDED, MERGE, WARPS_IN, LAYOUT, TILES, TILES_M, UNIT, WHOLE, AHEAD, KIND,
    )  # fmt: skip
    _, tile, tile_m, lane, register = places(LAYOUT, WARPS_IN, TILES, TILES_M)
    column = pid_n * BLOCK_N + tile * 16 + lane // 4 * 2 + register // 2
    row_m = pid_m * BLOCK_M + tile_m * 8 + lane % 4 * 2 + register % 2
    for child in gl.static_range(1 if MERGE else ALPHA):
        out = out_ptr + pid_split.to(gl.int64) * stride_os + child * stride_oa
        store(accs[child], out, bias_ptr, child * N, column, row_m, M, N, stride_om, HAS_BIAS, ACTIVATION)
