"""The partition products for few rows: weights go from memory to the tensor cores, through nothing in between.

The order of a reduction is free, so a lane multiplies what it has loaded. With ``g = lane // 4`` and ``t = lane % 4``,
the 16 bytes that a lane loads are its registers of two ``mma.sync.m16n8k16``:

- *On the weight as it is stored* it loads eight neighbouring weights of row ``2 g`` and of row ``2 g + 1``, and the
  same columns of activation row ``g``. Words 0 and 1 belong to the first instruction, words 2 and 3 to the second.
- *On its transpose* the reduction runs over the rows, so a pair of weights must come from two of them. A lane loads
  eight columns of four or eight neighbouring rows. One ``prmt`` takes the low or the high halves of two rows; the
  halves of word ``i`` are the outputs ``8 g + 2 i`` and ``8 g + 2 i + 1``.

The labels lie in memory as these registers want them (see :class:`fpe.kernels.PackedLabels`): shifted left, a word has
the labels of two of a lane's words in the signs of its bytes, and one ``prmt`` replicates two signs to a mask. Labels
of a seed are made: one hash serves a lane for 128 columns of two rows, and its bytes become masks by the same ``prmt``.

The loop has no shared memory, no ``ldmatrix`` and no conversion, and is the same on every architecture from 8.0 on.
Of a program's warps ``WARPS_OUT`` take different outputs and ``WARPS_IN`` different parts of the reduction, whose sums
meet in shared memory once, after the loop.

Tensors have the shape ``[parts of the reduction, tiles of outputs, tiles of 8 rows of activations, 32 lanes, 4
registers]``; a tile is 16 outputs, or 64 on the transpose.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fragments import (
    constraints,
    half_of,
    halves_of_two,
    hash_of,
    masks_of_seed,
    masks_of_seeds,
    masks_of_step,
    masks_of_two,
    multiply,
    share,
)
from .seeded import COLUMN, ROW, signed

_ROW, _COLUMN = gl.constexpr(signed(ROW)), gl.constexpr(signed(COLUMN))

STEPS = gl.constexpr(4)  # of 32 columns: what a lane's label word serves


@gluon.jit
def _activate(acc, ACTIVATION: gl.constexpr):
    # As activate of the Triton kernels, which Gluon cannot call.
    if ACTIVATION == "relu":
        acc = gl.maximum(acc, 0.0)
    if ACTIVATION == "gelu":
        acc = 0.5 * acc * (1.0 + gl.erf(acc * 0.7071067811865476))
    if ACTIVATION == "silu":
        acc = acc / (1.0 + gl.exp(-acc))
    return acc


@gluon.constexpr_function
def _only(dim, layout):
    """The layout of one of five dimensions."""
    for other in (4, 3, 2, 1, 0):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.constexpr_function
def _layout(warps_in, warps_out, outputs, rows):
    return gl.BlockedLayout([1, outputs, rows, 1, 4], [1, 1, 1, 32, 1], [warps_in, warps_out, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def _lanes_layout(layout):
    """The same lanes with one element for each tile of outputs."""
    tiles = [1, layout.size_per_thread[1], 1, 1, 1]
    return gl.BlockedLayout(tiles, layout.threads_per_warp, layout.warps_per_cta, layout.order)


@gluon.jit
def _places(LAYOUT: gl.constexpr, INNER: gl.constexpr, TILES: gl.constexpr, TILES_M: gl.constexpr):
    """Where an element of a tensor stands: indices along its five dimensions."""
    inner = gl.arange(0, INNER, _only(0, LAYOUT))[:, None, None, None, None]
    tile = gl.arange(0, TILES, _only(1, LAYOUT))[None, :, None, None, None]
    tile_m = gl.arange(0, TILES_M, _only(2, LAYOUT))[None, None, :, None, None]
    lane = gl.arange(0, 32, _only(3, LAYOUT))[None, None, None, :, None]
    register = gl.arange(0, 4, _only(4, LAYOUT))[None, None, None, None, :]
    return inner, tile, tile_m, lane, register


@gluon.jit
def _store(
    acc, out_ptr, bias_ptr, first, column, row, M, SIZE, stride_om, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr
):
    acc = gl.expand_dims(gl.sum(acc, 0), 0)
    mask = (column < SIZE) & (row < M)
    if HAS_BIAS:
        acc += gl.load(bias_ptr + (first + column), mask=mask, other=0.0).to(gl.float32)
    acc = _activate(acc, ACTIVATION)
    gl.store(out_ptr + row.to(gl.int64) * stride_om + column, acc.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _fetch(lines, steps, turns):
    """Asks L2 for lines of 128 bytes, for which nobody waits, if there are turns left. Returns the next lines."""
    text: gl.constexpr = "{\n.reg .pred p; setp.gt.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;\n}\n"
    following = ()
    for i in gl.static_range(len(lines)):
        gl.inline_asm_elementwise(text, "=r,l,r", [lines[i], turns], gl.int32, is_pure=False, pack=1)
        following += (lines[i] + steps[i],)
    return following


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
    if SEEDED:
        made = hash_of(hashed + group * 4 * _COLUMN)
    for digit in gl.static_range(0 if SEEDED else DIGITS):
        at = group * 4 + digit * stride_pp
        if WHOLE:
            upper_labels += (gl.load(upper_labels_ptrs + at),)
            lower_labels += (gl.load(lower_labels_ptrs + at),)
        else:
            mask = (group + inner) * 64 < SIZE_WORDS
            upper_labels += (gl.load(upper_labels_ptrs + at, mask=mask, other=0),)
            lower_labels += (gl.load(lower_labels_ptrs + at, mask=mask, other=0),)
    uppers = ()
    lowers = ()
    for step in gl.static_range(STEPS):
        if WHOLE:
            uppers += (gl.load(upper_ptrs + group * 64 + step * 16),)
            lowers += (gl.load(lower_ptrs + group * 64 + step * 16),)
        else:
            mask = (group * 64 + step * 16 + word) < SIZE_WORDS
            uppers += (gl.load(upper_ptrs + group * 64 + step * 16, mask=mask, other=0),)
            lowers += (gl.load(lower_ptrs + group * 64 + step * 16, mask=mask, other=0),)
    for step in gl.static_range(STEPS):
        upper_masks = ()
        lower_masks = ()
        for digit in gl.static_range(DIGITS):
            if SEEDED:
                both = gl.broadcast(made, uppers[0])[0]
                upper_masks += (masks_of_seed(both, ALPHA, digit, step, 0),)
                lower_masks += (masks_of_seed(both, ALPHA, digit, step, 1),)
            else:
                upper_masks += (masks_of_step(gl.broadcast(upper_labels[digit], uppers[0])[0], step),)
                lower_masks += (masks_of_step(gl.broadcast(lower_labels[digit], uppers[0])[0], step),)
        x = gl.load(x_ptrs + group * 64 + step * 16)
        sums = ()
        for child in gl.static_range(ALPHA):
            if MERGE and child > 0:
                x = gl.load(x_ptrs + (group * 64 + child * (stride_xa * 4)) + step * 16)
            if SEEDED and ALPHA == 2:
                upper = half_of(uppers[step], upper_masks[0], child)
                lower = half_of(lowers[step], lower_masks[0], child)
            else:
                upper = share(uppers[step], upper_masks, child, DIGITS)
                lower = share(lowers[step], lower_masks, child, DIGITS)
            acc = gl.inline_asm_elementwise(
                multiply(KIND, (((0, 4, 1, 5), (0, 1)), ((2, 6, 3, 7), (2, 3))), 16),
                constraints(3),
                [accs[0 if MERGE else child], upper, lower, x],
                gl.float32,
                is_pure=True,
                pack=4,
            )
            if MERGE:
                accs = (acc,)
            else:
                sums += (acc,)
        if not MERGE:
            accs = sums
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

    Strides of ``x`` are counted in 16 bytes, those of the weight in ``UNIT`` words: so a load is known to be aligned.
    ``x`` has ``STEPS_K`` steps of 128 columns a part, zero beyond those of the weight, whose last step may end early.
    """
    LAYOUT: gl.constexpr = _layout(WARPS_IN, WARPS_OUT, BLOCK_N // 16 // WARPS_OUT, BLOCK_M // 8)
    inner, tile, tile_m, lane, register = _places(LAYOUT, WARPS_IN, BLOCK_N // 16, BLOCK_M // 8)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    pid_m = gl.program_id(0) % tiles_m  # programs that read the same weights run together
    pid_n = gl.program_id(0) // tiles_m
    pid_split = gl.program_id(1)

    # What lies beyond the last row is never stored: any row may be read in its place.
    row = pid_n * BLOCK_N + tile * 16 + lane // 4 * 2
    upper = gl.minimum(row, N - 1).to(gl.int64)
    lower = gl.minimum(row + 1, N - 1).to(gl.int64)
    m = gl.minimum(pid_m * BLOCK_M + tile_m * 8 + lane // 4, M - 1).to(gl.int64)
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
    hashed = row // 2 * _ROW + (inner * 4 + lane % 4) * _COLUMN + KEY

    accs = ()
    for _ in gl.static_range(1 if MERGE else ALPHA):
        accs += (gl.full([WARPS_IN, BLOCK_N // 16, BLOCK_M // 8, 32, 4], 0.0, gl.float32, LAYOUT),)
    first = STEPS_K * pid_split // SPLIT
    last = STEPS_K * (pid_split + 1) // SPLIT
    whole = last if WHOLE else gl.minimum(last, SIZE_WORDS // (64 * WARPS_IN))
    if AHEAD > 0:
        # Two lanes fetch the two lines of a row of weights, and those of two planes of its labels.
        inner_f, tile_f, _, lane_f, _ = _places(_lanes_layout(LAYOUT), WARPS_IN, BLOCK_N // 16, 1)
        fetched = gl.minimum(pid_n * BLOCK_N + tile_f * 16 + lane_f // 2, N - 1).to(gl.int64)
        group = (first + AHEAD) * WARPS_IN + inner_f
        lines = (words_ptr + fetched * (stride_wn * UNIT) + (group * 64 + lane_f % 2 * 32),)
        steps = (64 * WARPS_IN,)
        for digit in gl.static_range(0, 0 if SEEDED else DIGITS, 2):
            plane = gl.minimum(digit + lane_f % 2, DIGITS - 1)
            lines += (labels_ptr + fetched * stride_pn + (group * 4 + plane * stride_pp),)
            steps += (4 * WARPS_IN,)
    for step in range(first, whole):
        if AHEAD > 0:
            lines = _fetch(lines, steps, whole - AHEAD - step)
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

    column = row + register // 2
    row_m = pid_m * BLOCK_M + tile_m * 8 + lane % 4 * 2 + register % 2
    for child in gl.static_range(1 if MERGE else ALPHA):
        out = out_ptr + pid_split.to(gl.int64) * stride_os + child * stride_oa
        _store(accs[child], out, bias_ptr, child * N, column, row_m, M, N, stride_om, HAS_BIAS, ACTIVATION)


@gluon.jit
def _rows(
    accs,
    x_ptrs,
    words_ptrs,
    labels_ptrs,
    hashed,
    first,
    turn,
    row,
    N,
    mask_columns,
    stride_xa,
    stride_wn,
    stride_pp,
    stride_pn,
    ALPHA: gl.constexpr,
    DIGITS: gl.constexpr,
    SEEDED: gl.constexpr,
    MERGE: gl.constexpr,
    KIND: gl.constexpr,
    UNROLL: gl.constexpr,
    UNIT: gl.constexpr,
    WHOLE: gl.constexpr,
    WHOLE_COLUMNS: gl.constexpr,
):
    """``16 * UNROLL`` rows of each part of the reduction: adds the products of this program's columns to the sums."""
    words = ()
    labels = ()
    for part in gl.static_range(UNROLL):
        at = first + part * 4
        for i in gl.static_range(4):
            words_at = words_ptrs[i] + at * (stride_wn * UNIT)
            if WHOLE and WHOLE_COLUMNS:
                words += (gl.load(words_at),)
            else:
                words += (gl.load(words_at, mask=(at + row + i < N) & mask_columns, other=0),)
            if SEEDED and i % 2 == 0:  # of two rows: each one's bits on top
                made = hash_of(hashed + (at + i) // 2 * _ROW)
                labels += (made << turn + 1, made << turn)
            for digit in gl.static_range(0 if SEEDED else DIGITS):
                labels_at = labels_ptrs[i] + (at * stride_pn + digit * stride_pp)
                if WHOLE:
                    label = gl.load(labels_at)
                else:
                    label = gl.load(labels_at, mask=at + row + i < N, other=0)
                labels += (label << turn,)
    xs = ()
    for child in gl.static_range(ALPHA if MERGE else 1):
        xs += (gl.load(x_ptrs + (child * (stride_xa * 4) + first // 2)),)
    for part in gl.static_range(UNROLL):
        # Registers of A: rows 0 and 1 low, rows 0 and 1 high, rows 2 and 3 low, rows 2 and 3 high.
        pairs = ()
        masks = ()
        for a in gl.static_range(4):
            pairs += (halves_of_two(words[part * 4 + a // 2 * 2], words[part * 4 + a // 2 * 2 + 1], a % 2),)
            of_pair = ()
            for digit in gl.static_range(DIGITS):
                if SEEDED:
                    label = gl.broadcast(labels[part * 4 + a // 2 * 2], words[0])[0]
                    other = gl.broadcast(labels[part * 4 + a // 2 * 2 + 1], words[0])[0]
                    of_pair += (masks_of_seeds(label, other, ALPHA, digit, a % 2),)
                else:
                    label = gl.broadcast(labels[(part * 4 + a // 2 * 2) * DIGITS + digit], words[0])[0]
                    other = gl.broadcast(labels[(part * 4 + a // 2 * 2 + 1) * DIGITS + digit], words[0])[0]
                    of_pair += (masks_of_two(label, other, a % 2),)
            masks += (of_pair,)
        sums = ()
        for child in gl.static_range(ALPHA):
            a0 = share(pairs[0], masks[0], child, DIGITS)
            a1 = share(pairs[1], masks[1], child, DIGITS)
            a2 = share(pairs[2], masks[2], child, DIGITS)
            a3 = share(pairs[3], masks[3], child, DIGITS)
            new = ()
            for i in gl.static_range(4):
                acc = gl.inline_asm_elementwise(
                    multiply(KIND, (((i, 4 + i, 8 + i, 12 + i), (2 * part, 2 * part + 1)),), 24),
                    constraints(5),
                    [accs[i if MERGE else child * 4 + i], a0, a1, a2, a3, xs[child if MERGE else 0]],
                    gl.float32,
                    is_pure=True,
                    pack=4,
                )
                new += (acc,)
            if MERGE:
                accs = new
            else:
                sums += new
        if not MERGE:
            accs = sums
    return accs


@gluon.jit(do_not_specialize=["M", "KEY"])
def multiply_columns(
    x_ptr,  # pairs, int32
    words_ptr,
    labels_ptr,  # int32
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    STEPS_N,
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
    UNROLL: gl.constexpr,
    SPLIT: gl.constexpr,
    UNIT: gl.constexpr,
    WHOLE: gl.constexpr,
    WHOLE_COLUMNS: gl.constexpr,
    AHEAD: gl.constexpr,
    KIND: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """``split_matmul`` and ``merge_matmul`` on the transpose of the stored weight ``[N, K]``, 64 columns a warp.

    ``x`` has ``STEPS_N`` steps of ``16 * UNROLL`` rows of the weight a part, zero beyond the last. With ``UNROLL`` of 2
    a lane has eight neighbouring rows of 32, so that 16 bytes of activations belong to them.
    """
    LAYOUT: gl.constexpr = _layout(WARPS_IN, WARPS_OUT, 1, BLOCK_M // 8)
    inner, tile, tile_m, lane, register = _places(LAYOUT, WARPS_IN, WARPS_OUT, BLOCK_M // 8)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    pid_m = gl.program_id(0) % tiles_m
    pid_k = gl.program_id(0) // tiles_m
    pid_split = gl.program_id(1)

    chunk = (pid_k * WARPS_OUT + tile) * 8 + lane // 4  # of eight columns
    nearest = gl.minimum(chunk, (K - 1) // 8)
    turn = 6 - nearest // 4 % 4 * 2
    mask_columns = nearest * 4 + register < K // 2
    words_ptrs = ()
    labels_ptrs = ()
    row = (inner * 4 + lane % 4) * (4 * UNROLL)
    for i in gl.static_range(4):
        n = (row + i).to(gl.int64)
        words_ptrs += (words_ptr + n * (stride_wn * UNIT) + (nearest * 4 + register),)
        if not SEEDED:
            labels_ptrs += (labels_ptr + n * stride_pn + (nearest // 16 * 4 + nearest % 4),)
    hashed = row // 2 * _ROW + (nearest // 16 * 4 + nearest % 4) * _COLUMN + KEY
    m = gl.minimum(pid_m * BLOCK_M + tile_m * 8 + lane // 4, M - 1).to(gl.int64)
    x_ptrs = x_ptr + m * (stride_xm * 4) + (row // 2 + register % (2 * UNROLL))

    accs = ()
    for _ in gl.static_range(4 if MERGE else 4 * ALPHA):
        accs += (gl.full([WARPS_IN, WARPS_OUT, BLOCK_M // 8, 32, 4], 0.0, gl.float32, LAYOUT),)
    BLOCK_N: gl.constexpr = 16 * UNROLL * WARPS_IN
    first = STEPS_N * pid_split // SPLIT
    last = STEPS_N * (pid_split + 1) // SPLIT
    whole = last if WHOLE else gl.minimum(last, N // BLOCK_N)
    if AHEAD > 0:
        # A lane fetches the line of one row of weights, and those of its labels.
        inner_f, tile_f, _, lane_f, _ = _places(_lanes_layout(LAYOUT), WARPS_IN, WARPS_OUT, 1)
        fetched = ((first + AHEAD) * BLOCK_N + inner_f * (16 * UNROLL) + lane_f % (16 * UNROLL)).to(gl.int64)
        first_chunk = gl.minimum((pid_k * WARPS_OUT + tile_f) * 8, (K - 1) // 8)
        lines = (words_ptr + fetched * (stride_wn * UNIT) + first_chunk * 4,)
        if not SEEDED:
            labels_lines = labels_ptr + fetched * stride_pn + first_chunk // 16 * 4
        steps = (BLOCK_N * stride_wn * UNIT,)
        if UNROLL == 1 and not SEEDED:
            lines = (gl.where(lane_f < 16, lines[0], labels_lines),)
            steps = (gl.where(lane_f < 16, steps[0], BLOCK_N * stride_pn),)
        for digit in gl.static_range(0 if SEEDED else DIGITS):
            if UNROLL > 1 or digit > 0:
                lines += (labels_lines + digit * stride_pp,)
                steps += (BLOCK_N * stride_pn,)
    for step in range(first, whole):
        if AHEAD > 0:
            lines = _fetch(lines, steps, whole - AHEAD - step)
        accs = _rows(
            accs, x_ptrs, words_ptrs, labels_ptrs, hashed, step * BLOCK_N, turn, row, N, mask_columns, stride_xa,
            stride_wn, stride_pp, stride_pn, ALPHA, DIGITS, SEEDED, MERGE, KIND, UNROLL, UNIT, True, WHOLE_COLUMNS,
        )  # fmt: skip
    if not WHOLE:
        if last == STEPS_N:
            accs = _rows(
                accs, x_ptrs, words_ptrs, labels_ptrs, hashed, (STEPS_N - 1) * BLOCK_N, turn, row, N, mask_columns,
                stride_xa, stride_wn, stride_pp, stride_pn, ALPHA, DIGITS, SEEDED, MERGE, KIND, UNROLL, UNIT, False,
                WHOLE_COLUMNS,
            )  # fmt: skip

    row_m = pid_m * BLOCK_M + tile_m * 8 + lane % 4 * 2 + register % 2
    for child in gl.static_range(1 if MERGE else ALPHA):
        out = out_ptr + pid_split.to(gl.int64) * stride_os + child * stride_oa
        for i in gl.static_range(4):
            column = chunk * 8 + (2 * i + register // 2)
            acc = accs[child * 4 + i]
            _store(acc, out, bias_ptr, child * K, column, row_m, M, K, stride_om, HAS_BIAS, ACTIVATION)
