"""The partition products on the transpose for few rows; see :mod:`.gluon`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..hashing import COLUMN, ROW, signed
from .fragments import (
    constraints,
    fetch,
    halves_of_two,
    hash_of,
    layout_of,
    layout_of_lanes,
    masks_of_four,
    masks_of_seeds,
    masks_of_two,
    multiply,
    places,
    share,
    store,
)

_ROW, _COLUMN = gl.constexpr(signed(ROW)), gl.constexpr(signed(COLUMN))


@gluon.jit
def _add(acc, a0, a1, a2, a3, x, word: gl.constexpr, part: gl.constexpr, KIND: gl.constexpr):
    """Adds the products of one of a lane's words, paired over 16 rows, to the sums: one instruction."""
    text: gl.constexpr = multiply(KIND, (((word, 4 + word, 8 + word, 12 + word), (2 * part, 2 * part + 1)),), 24)
    operands = [acc, a0, a1, a2, a3, x]
    return gl.inline_asm_elementwise(text, constraints(5), operands, gl.float32, is_pure=True, pack=4)


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
            if SEEDED and i % 2 == 0:  # a hash of two rows, shifted so that each one's bits are the highest
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
                x = xs[child if MERGE else 0]
                new += (_add(accs[i if MERGE else child * 4 + i], a0, a1, a2, a3, x, i, part, KIND),)
            if MERGE:
                accs = new
            else:
                sums += new
        if not MERGE:
            accs = sums
    return accs


@gluon.jit
def _rows_narrow(
    accs,
    x_ptrs,
    words_ptrs,
    labels_ptrs,
    first,
    turn,
    row,
    register,
    N,
    mask_columns,
    stride_wn,
    stride_pp,
    PITCH: gl.constexpr,
    ALPHA: gl.constexpr,
    DIGITS: gl.constexpr,
    KIND: gl.constexpr,
    UNIT: gl.constexpr,
    WHOLE: gl.constexpr,
    WHOLE_COLUMNS: gl.constexpr,
):
    """32 rows of each part of the reduction, four columns a lane: two words of four rows and two of the next four.

    The rows of a plane of labels are ``PITCH`` words apart. It is a constant, so that it is part of the loads' offsets.
    """
    words = ()
    labels = ()
    for i in gl.static_range(4):
        words_at = words_ptrs[i] + first * (stride_wn * UNIT)
        if WHOLE and WHOLE_COLUMNS:
            words += (gl.load(words_at),)
        else:
            words += (gl.load(words_at, mask=(first + row + register // 2 * 4 + i < N) & mask_columns, other=0),)
        for digit in gl.static_range(DIGITS):
            labels_at = labels_ptrs[0] + (first * PITCH + digit * stride_pp)
            if WHOLE:
                label = gl.load(labels_at + i * PITCH)
                other = gl.load(labels_at + (4 + i) * PITCH)
            else:
                label = gl.load(labels_at + i * PITCH, mask=first + row + i < N, other=0)
                other = gl.load(labels_at + (4 + i) * PITCH, mask=first + row + 4 + i < N, other=0)
            labels += (gl.where(register < 2, label << turn, other << turn),)
    x = gl.load(x_ptrs + first // 2)
    pairs = ()
    masks = ()
    for a in gl.static_range(4):
        pairs += (halves_of_two(words[a // 2 * 2], words[a // 2 * 2 + 1], a % 2),)
        of_pair = ()
        for digit in gl.static_range(DIGITS):
            label = labels[a // 2 * 2 * DIGITS + digit]
            other = labels[(a // 2 * 2 + 1) * DIGITS + digit]
            of_pair += (masks_of_four(label, other, a % 2),)
        masks += (of_pair,)
    for part in gl.static_range(2):
        sums = ()
        for child in gl.static_range(ALPHA):
            a0 = share(pairs[0], masks[0], child, DIGITS)
            a1 = share(pairs[1], masks[1], child, DIGITS)
            a2 = share(pairs[2], masks[2], child, DIGITS)
            a3 = share(pairs[3], masks[3], child, DIGITS)
            for i in gl.static_range(2):
                sums += (_add(accs[child * 2 + i], a0, a1, a2, a3, x, 2 * part + i, part, KIND),)
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
    EACH: gl.constexpr,
    PITCH: gl.constexpr,
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
    """``split_matmul`` and ``merge_matmul`` on the transpose of the stored weight ``[N, K]``, ``EACH`` columns a lane.

    The reduction has ``STEPS_N`` steps, and in each step every part of it takes ``16 * UNROLL`` rows of the weight;
    ``x`` is zero beyond the last row. With ``UNROLL`` of 2 a lane has eight neighbouring rows of 32, to which 16 bytes
    of activations belong. A lane has eight columns, or four where a split's sums of eight do not fit its registers:
    see :func:`_rows_narrow`.
    """
    PAIRS: gl.constexpr = EACH // 2
    LAYOUT: gl.constexpr = layout_of(WARPS_IN, WARPS_OUT, 1, BLOCK_M // 8)
    inner, tile, tile_m, lane, register = places(LAYOUT, WARPS_IN, WARPS_OUT, BLOCK_M // 8)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    pid_m = gl.program_id(0) % tiles_m
    pid_k = gl.program_id(0) // tiles_m
    pid_split = gl.program_id(1)

    chunk = (pid_k * WARPS_OUT + tile) * 8 + lane // 4  # of a lane's columns
    nearest = gl.minimum(chunk, (K - 1) // EACH)
    quad = nearest * (EACH // 4)  # of four columns, whose labels are one bit of a word's bytes
    turn = 6 - quad // 8 % 4 * 2 + (1 - quad % 2 if EACH == 4 else 0)
    mask_columns = nearest * PAIRS + register % PAIRS < K // 2
    label_word = quad // 32 * 4 + quad // 2 % 4
    words_ptrs = ()
    labels_ptrs = ()
    row = (inner * 4 + lane % 4) * (4 * UNROLL)
    for i in gl.static_range(4):
        n = (row + register // PAIRS * 4 + i).to(gl.int64)
        words_ptrs += (words_ptr + n * (stride_wn * UNIT) + (nearest * PAIRS + register % PAIRS),)
        if not SEEDED:
            labels_ptrs += (labels_ptr + (row + i).to(gl.int64) * stride_pn + label_word,)
    hashed = row // 2 * _ROW + label_word * _COLUMN + KEY
    m = gl.minimum(pid_m * BLOCK_M + tile_m * 8 + lane // 4, M - 1).to(gl.int64)
    x_ptrs = x_ptr + m * (stride_xm * 4) + (row // 2 + register % (2 * UNROLL))

    accs = ()
    for _ in gl.static_range(PAIRS if MERGE else PAIRS * ALPHA):
        accs += (gl.full([WARPS_IN, WARPS_OUT, BLOCK_M // 8, 32, 4], 0.0, gl.float32, LAYOUT),)
    BLOCK_N: gl.constexpr = 16 * UNROLL * WARPS_IN
    first = STEPS_N * pid_split // SPLIT
    last = STEPS_N * (pid_split + 1) // SPLIT
    whole = last if WHOLE else gl.minimum(last, N // BLOCK_N)
    if AHEAD > 0:
        # A lane prefetches the line of one row of weights, and those of the row's labels.
        inner_f, tile_f, _, lane_f, _ = places(layout_of_lanes(LAYOUT), WARPS_IN, WARPS_OUT, 1)
        fetched = ((first + AHEAD) * BLOCK_N + inner_f * (16 * UNROLL) + lane_f % (16 * UNROLL)).to(gl.int64)
        first_chunk = gl.minimum((pid_k * WARPS_OUT + tile_f) * 8, (K - 1) // EACH)
        lines = (words_ptr + fetched * (stride_wn * UNIT) + first_chunk * PAIRS,)
        if not SEEDED:
            labels_lines = labels_ptr + fetched * stride_pn + first_chunk * EACH // 128 * 4
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
            lines = fetch(lines, steps, whole - AHEAD - step)
        if EACH == 8:
            accs = _rows(
                accs, x_ptrs, words_ptrs, labels_ptrs, hashed, step * BLOCK_N, turn, row, N, mask_columns, stride_xa,
                stride_wn, stride_pp, stride_pn, ALPHA, DIGITS, SEEDED, MERGE, KIND, UNROLL, UNIT, True, WHOLE_COLUMNS,
            )  # fmt: skip
        else:
            accs = _rows_narrow(
                accs, x_ptrs, words_ptrs, labels_ptrs, step * BLOCK_N, turn, row, register, N, mask_columns, stride_wn,
                stride_pp, PITCH, ALPHA, DIGITS, KIND, UNIT, True, WHOLE_COLUMNS,
            )  # fmt: skip
    if not WHOLE:
        if last == STEPS_N:
            at = (STEPS_N - 1) * BLOCK_N
            if EACH == 8:
                accs = _rows(
                    accs, x_ptrs, words_ptrs, labels_ptrs, hashed, at, turn, row, N, mask_columns, stride_xa, stride_wn,
                    stride_pp, stride_pn, ALPHA, DIGITS, SEEDED, MERGE, KIND, UNROLL, UNIT, False, WHOLE_COLUMNS,
                )  # fmt: skip
            else:
                accs = _rows_narrow(
                    accs, x_ptrs, words_ptrs, labels_ptrs, at, turn, row, register, N, mask_columns, stride_wn,
                    stride_pp, PITCH, ALPHA, DIGITS, KIND, UNIT, False, WHOLE_COLUMNS,
                )  # fmt: skip

    row_m = pid_m * BLOCK_M + tile_m * 8 + lane % 4 * 2 + register % 2
    for child in gl.static_range(1 if MERGE else ALPHA):
        out = out_ptr + pid_split.to(gl.int64) * stride_os + child * stride_oa
        for i in gl.static_range(PAIRS):
            column = chunk * EACH + (2 * i + register // 2)
            acc = accs[child * PAIRS + i]
            store(acc, out, bias_ptr, child * K, column, row_m, M, K, stride_om, HAS_BIAS, ACTIVATION)
