"""The Triton kernels of the partition operations: tiles of weights through shared memory, for any number of rows.

The parent's weights are read once for all children. A tile of them is loaded as integers, for 16-bit types two
neighbours to a 32-bit word. The label planes become masks of the same words, and each child's share is the words under
its mask. So two neighbours cost as many instructions for masks as one.

:func:`_partition_multiply` is ``split_matmul`` (one tile of x, an accumulator for each child) and ``merge_matmul`` (a
tile of z for each child, one accumulator), on the weight as it is stored or on its transpose. :func:`_partition_outer`
is ``partition_grad``: the product of every child, of which the labels pick one at each edge. With ``KEPT`` the weight
is its kept values alone. A bitmap, or with ``MADE`` holes of a seed, say whether an entry exists and where its value
is.
"""

import triton
import triton.language as tl

from ..bitmap.holes_triton import hole_words
from ..bitmap.triton import count_ones, kept_pairs, kept_tile, two_follow, values_before
from ..epilogue import activate, in_groups, multiply, multiply_loaded
from ..hashing import COLUMN, MIX, ROW, signed

_ROW, _COLUMN = signed(ROW), signed(COLUMN)
_FIRST, _SECOND = (signed(factor) for _, factor in MIX)


@triton.jit
def seeded_words(
    KEY,
    rows,
    words,
    DIGIT: tl.constexpr,
    ALPHA: tl.constexpr,
    ROW: tl.constexpr = _ROW,
    COLUMN: tl.constexpr = _COLUMN,
    FIRST: tl.constexpr = _FIRST,
    SECOND: tl.constexpr = _SECOND,
):
    """Words of a plane of labels as :class:`PackedLabels` has them, computed from :attr:`SeededLabels.key`.

    Its constants are defaults: globals of a helper would enter the key of Triton's cache by the order of compilation.
    """
    x = rows // 2 * ROW + words * COLUMN + KEY
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 13) & 0x7FFFF)) * SECOND
    x = x ^ ((x >> 16) & 0xFFFF)
    bits = (x >> (rows % 2)) & 0x55555555  # of the row: in each byte those of the four steps
    if ALPHA == 2:
        half = (bits | (bits >> 15)) & 0xFFFF
        word = (half | (half << 16)) ^ -0x10000
    else:
        byte = (bits >> (8 * DIGIT)) & 0xFF
        byte = byte | ((bits >> (8 * DIGIT + 15)) & 0xFF if ALPHA == 4 else byte << 1)
        # A label is its column, turned by the hash: bit 0 changes with p, bit 1 with l, bit 2 with h.
        own: tl.constexpr = -0x10000 if DIGIT == 0 else -0xFF0100 if DIGIT == 1 else -0x55555556
        word = byte * 0x01010101 ^ own
    return word


@triton.jit
def bit_masks(
    planes_ptr,
    stride_pp,
    stride_pn,
    rows,
    row_mask,
    first_k,
    SIZE_WORDS,
    KEY,
    DIGIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_WORD: tl.constexpr,
    JOINED: tl.constexpr,
):
    """The bits of a tile of one plane, a word each, as masks: all ones where the bit is set.

    ``planes_ptr`` points to planes of 32-bit words, of which a row has ``SIZE_WORDS``. With ``SEEDED`` there are none:
    the words are computed.

    With ``JOINED`` the masks of eight edges are made one by one and joined. Because of the joins the compiler sees that
    it may make them in the order in which matrix instructions take them: then the weights need not move to other
    threads once more. On the transpose they must, and shifting all of them by a tensor takes fewer instructions.
    """
    WORDS: tl.constexpr = BLOCK_K // 32 if BLOCK_K > 128 else (4 if BLOCK_K >= 32 else BLOCK_K // 8)
    STEPS: tl.constexpr = 4 if BLOCK_K >= 128 else (BLOCK_K // 32 if BLOCK_K >= 32 else 1)
    LANES: tl.constexpr = 4 if BLOCK_K >= 32 else WORDS
    first = first_k // 8  # of the groups of eight edges
    offs = first // 16 * 4 + first % 4 + tl.arange(0, WORDS)
    if SEEDED:
        word = seeded_words(KEY, rows[:, None], offs[None, :], DIGIT, ALPHA)  # [rows, words]
    else:
        mask = row_mask[:, None] & (offs[None, :] < SIZE_WORDS)
        at = DIGIT * stride_pp.to(tl.int64) + rows.to(tl.int64) * stride_pn
        word = tl.load(planes_ptr + at[:, None] + offs[None, :], mask=mask, other=0)
    word = word.reshape(word.shape[0], WORDS // LANES, 1, LANES)
    word = word >> ((first // 4 % 4 + tl.arange(0, STEPS)) * 2)[None, None, :, None]  # [rows, groups, steps, lanes]
    if PER_WORD == 2:
        if JOINED:
            even = tl.join((word & 0x10001) * 0xFFFF, ((word >> 1) & 0x10001) * 0xFFFF)
            odd = tl.join(((word >> 8) & 0x10001) * 0xFFFF, ((word >> 9) & 0x10001) * 0xFFFF)
            masks = tl.join(even, odd)
        else:
            pair = tl.arange(0, 4)
            shift = (pair // 2 + pair % 2 * 8)[None, None, None, None, :]
            masks = ((word[:, :, :, :, None] >> shift) & 0x10001) * 0xFFFF
    else:
        edge = tl.arange(0, 8)
        shift = (edge // 4 + edge // 2 % 2 * 8 + edge % 2 * 16)[None, None, None, None, :]
        masks = -((word[:, :, :, :, None] >> shift) & 1)
    return masks.reshape(masks.shape[0], BLOCK_K // PER_WORD)


@triton.jit
def made_tile(
    KEY,
    PER_ROW,
    N,
    K,
    first_n,
    word,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What :func:`kept_tile` reads of a bitmap, computed from a seed: where a row's values begin needs no counting.

    Each word is computed once, then handed to the lanes that need it. Otherwise the compiler would have every lane
    compute all words that it needs.
    """
    WORDS: tl.constexpr = BLOCK_K // WORD
    each = tl.arange(0, BLOCK_N * WORDS)
    rows = first_n + each // WORDS
    words, before = hole_words(KEY, PER_ROW, K, rows, word + each % WORDS, WORD)
    words = tl.gather(tl.where(rows < N, words, 0), each, 0).reshape(BLOCK_N, WORDS, 1)
    firsts = (rows.to(tl.int64) * PER_ROW + before).reshape(BLOCK_N, WORDS, 1)
    bit = tl.arange(0, WORD)[None, None, :]
    numbers = firsts + count_ones(words & ((1 << bit) - 1), INTERPRETED)
    exists = ((words >> bit) & 1) != 0  # [BLOCK_N, WORDS, WORD]
    return exists.reshape(BLOCK_N, BLOCK_K), numbers.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def child_share(words, masks, CHILD: tl.constexpr, DIGITS: tl.constexpr, PER_WORD: tl.constexpr, DTYPE: tl.constexpr):
    """A child's weights out of a tile of words, zero elsewhere: [rows, columns] of the weight."""
    for digit in tl.static_range(DIGITS):
        words = words & (masks[digit] if (CHILD >> digit) % 2 == 1 else ~masks[digit])
    if PER_WORD == 2:
        # This costs nothing: the compiler sees that the halves are put back where they were.
        halves = tl.join((words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16))
        share = halves.reshape(words.shape[0], words.shape[1] * 2)
    else:
        share = words.to(tl.int32 if DTYPE.primitive_bitwidth == 32 else tl.int16)
    return share.to(DTYPE, bitcast=True)


@triton.jit(do_not_specialize=["M", "KEY", "KEPT_KEY", "NNZ"])
def _partition_multiply(
    x_ptr,
    words_ptr,
    planes_ptr,
    bits_ptr,
    starts_ptr,
    bases_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    SIZE_WORDS,
    KEY,
    KEPT_KEY,
    PER_ROW,
    NNZ,
    stride_xm,
    stride_xa,
    stride_wn,
    stride_pp,
    stride_pn,
    stride_os,
    stride_om,
    stride_oa,
    DTYPE: tl.constexpr,
    PER_WORD: tl.constexpr,
    ALPHA: tl.constexpr,
    DIGITS: tl.constexpr,
    KEPT: tl.constexpr,
    MADE: tl.constexpr,
    RUN: tl.constexpr,
    BASE: tl.constexpr,
    WORD: tl.constexpr,
    SEEDED: tl.constexpr,
    MERGE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # N and K are those of the stored weight; with TRANSPOSED the reduction runs over N.
    OUT: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    IN: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    SIZE_OUT = K if TRANSPOSED else N
    SIZE_IN = N if TRANSPOSED else K
    SUMS: tl.constexpr = 1 if MERGE else ALPHA
    PAIRS: tl.constexpr = KEPT and PER_WORD == 2
    # Offsets along M are expanded along this axis, those along the inputs or outputs along the other one.
    AXIS: tl.constexpr = 1 if TURNED else 0

    pid_split = tl.program_id(1)
    pid_m, pid_out = in_groups(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(SIZE_OUT, OUT), GROUP)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_in = tl.arange(0, IN)
    x_rows = x_ptr + tl.expand_dims(offs_m.to(tl.int64) * stride_xm, AXIS)
    rows = tl.expand_dims(mask_m, AXIS)
    steps = tl.cdiv(SIZE_IN, IN)
    first_step = steps * pid_split // SPLIT
    WORDS = tl.cdiv(K, WORD)
    if KEPT and not MADE and not TRANSPOSED:  # rows stay: from tile to tile their values go on
        offs_n = pid_out * BLOCK_N + tl.arange(0, BLOCK_N)
        before = values_before(
            bits_ptr, starts_ptr, bases_ptr, offs_n, offs_n < N, first_step * (BLOCK_K // WORD), WORDS, RUN, BASE, WORD,
            UPCAST,
        )  # fmt: skip

    accs = ()
    for _ in tl.static_range(SUMS):
        accs += (tl.zeros([BLOCK_M, OUT] if TURNED else [OUT, BLOCK_M], dtype=tl.float32),)
    last_step = steps * (pid_split + 1) // SPLIT
    free_step = last_step
    if PAIRS:  # on the transpose alone; tiles that two more values follow need no guards, those of the last rows do
        free_step = tl.minimum(last_step, steps - 1)
        free = two_follow(starts_ptr, bases_ptr, (steps - 1) * BLOCK_N, N, WORDS, NNZ, RUN, BASE, WORD)
        free_step = tl.where(free, tl.maximum(free_step, first_step), first_step)
    for guarded in tl.static_range(2 if PAIRS else 1):
        begin, end = first_step, free_step
        if guarded == 1:
            begin, end = free_step, last_step
        for step in range(begin, end):
            first_n = step * BLOCK_N if TRANSPOSED else pid_out * BLOCK_N
            first_k = pid_out * BLOCK_K if TRANSPOSED else step * BLOCK_K
            offs_n = first_n + tl.arange(0, BLOCK_N)
            offs_w = first_k // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
            mask_n = offs_n < N
            words_at = words_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_w[None, :]
            if KEPT:
                word = first_k // WORD
                if TRANSPOSED and not MADE:
                    before = values_before(
                        bits_ptr, starts_ptr, bases_ptr, offs_n, mask_n, word, WORDS, RUN, BASE, WORD, UPCAST
                    )  # fmt: skip
                if PAIRS:
                    words, before = kept_pairs(
                        words_ptr, bits_ptr, offs_n, mask_n, word, WORDS, before, guarded == 1, BLOCK_K, WORD, UPCAST
                    )  # fmt: skip
                else:
                    if MADE:
                        exists, numbers = made_tile(
                            KEPT_KEY, PER_ROW, N, K, first_n, word, BLOCK_N, BLOCK_K, WORD, UPCAST
                        )  # fmt: skip
                    else:
                        exists, numbers, before = kept_tile(
                            bits_ptr, offs_n, mask_n, word, WORDS, before, BLOCK_K, WORD, UPCAST
                        )  # fmt: skip
                    values_at = words_ptr + numbers
                    words = tl.load(values_at, mask=exists, other=0)  # [BLOCK_N, BLOCK_K]
            elif EVEN:
                words = tl.load(words_at)  # [BLOCK_N, BLOCK_K / PER_WORD]
            else:
                words = tl.load(words_at, mask=mask_n[:, None] & (offs_w[None, :] < K // PER_WORD), other=0)
            masks = ()
            for digit in tl.static_range(DIGITS):
                masks += (
                    bit_masks(
                        planes_ptr, stride_pp, stride_pn, offs_n, mask_n, first_k, SIZE_WORDS, KEY, digit, ALPHA,
                        SEEDED, BLOCK_K, PER_WORD, not TRANSPOSED,
                    ),
                )  # fmt: skip

            offs_x = tl.expand_dims(step * IN + offs_in, 1 - AXIS)
            mask_x = rows if EVEN else rows & (offs_x < SIZE_IN)
            x = tl.load(x_rows + offs_x, mask=mask_x, other=0.0)  # [BLOCK_M, IN] if TURNED, else [IN, BLOCK_M]
            sums = ()
            for child in tl.static_range(ALPHA):
                w = child_share(words, masks, child, DIGITS, PER_WORD, DTYPE)  # [BLOCK_N, BLOCK_K]
                if TRANSPOSED:
                    w = tl.trans(w)
                if MERGE and child > 0:
                    x = tl.load(x_rows + child * stride_xa + offs_x, mask=mask_x, other=0.0)
                operand = x
                if UPCAST:
                    w, operand = w.to(tl.float32), x.to(tl.float32)
                if MERGE:
                    accs = (multiply(w, operand, accs[0], TURNED, PRECISION),)
                else:
                    sums += (multiply(w, operand, accs[child], TURNED, PRECISION),)
            if not MERGE:
                accs = sums

    offs_out = pid_out * OUT + tl.arange(0, OUT)
    mask_out = offs_out < SIZE_OUT
    out_at = out_ptr + pid_split.to(tl.int64) * stride_os + tl.expand_dims(offs_m.to(tl.int64) * stride_om, AXIS)
    out_at += tl.expand_dims(offs_out, 1 - AXIS)
    for child in tl.static_range(SUMS):
        acc = accs[child]
        if SPLIT == 1:
            if HAS_BIAS:
                bias = tl.load(bias_ptr + child * SIZE_OUT + offs_out, mask=mask_out, other=0.0)
                acc += tl.expand_dims(bias.to(tl.float32), 1 - AXIS)
            acc = activate(acc, ACTIVATION)
        mask = rows & tl.expand_dims(mask_out, 1 - AXIS)
        tl.store(out_at + child * stride_oa, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "KEY", "KEPT_KEY"])
def _partition_outer(
    left_ptr,
    right_ptr,
    planes_ptr,
    bits_ptr,
    starts_ptr,
    bases_ptr,
    out_ptr,
    M,
    N,
    K,
    SIZE_WORDS,
    KEY,
    KEPT_KEY,
    PER_ROW,
    stride_lm,
    stride_la,
    stride_rm,
    stride_ra,
    stride_pp,
    stride_pn,
    stride_os,
    ALPHA: tl.constexpr,
    DIGITS: tl.constexpr,
    KEPT: tl.constexpr,
    MADE: tl.constexpr,
    RUN: tl.constexpr,
    BASE: tl.constexpr,
    WORD: tl.constexpr,
    SEEDED: tl.constexpr,
    HOLES: tl.constexpr,
    CHILDREN_LEFT: tl.constexpr,
    FENCED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # left is [M, (ALPHA,) N], right is [M, (ALPHA,) K]; one of them has children.
    pid_split = tl.program_id(1)
    pid_n, pid_k = in_groups(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = pid_k * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K
    tiles_m = tl.cdiv(M, BLOCK_M)

    accs = ()
    for _ in tl.static_range(ALPHA):
        accs += (tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32),)
    for tile in range(tiles_m * pid_split // SPLIT, tiles_m * (pid_split + 1) // SPLIT):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m.to(tl.int64)
        # Loaded as its transpose: tl.trans of a tile would send it through registers instead of shared memory.
        left_at = left_ptr + rows[None, :] * stride_lm + offs_n[:, None]
        right_at = right_ptr + rows[:, None] * stride_rm + offs_k[None, :]
        mask_left = mask_m[None, :] if EVEN else mask_m[None, :] & mask_n[:, None]
        mask_right = mask_m[:, None] if EVEN else mask_m[:, None] & mask_k[None, :]
        left = tl.load(left_at, mask=mask_left, other=0.0)  # [BLOCK_N, BLOCK_M]
        right = tl.load(right_at, mask=mask_right, other=0.0)  # [BLOCK_M, BLOCK_K]
        sums = ()
        for child in tl.static_range(ALPHA):
            if child > 0:
                if CHILDREN_LEFT:
                    left = tl.load(left_at + child * stride_la, mask=mask_left, other=0.0)
                else:
                    right = tl.load(right_at + child * stride_ra, mask=mask_right, other=0.0)
            a, b = left, right
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            sums += (multiply_loaded(a, b, accs[child], FENCED, PRECISION),)
        accs = sums

    masks = ()
    for digit in tl.static_range(DIGITS):
        masks += (
            bit_masks(
                planes_ptr, stride_pp, stride_pn, offs_n, mask_n, first_k, SIZE_WORDS, KEY, digit, ALPHA, SEEDED,
                BLOCK_K, 1, False,
            ),
        )  # fmt: skip
    label = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.int32)
    for digit in tl.static_range(DIGITS):
        label |= masks[digit] & (1 << digit)
    out = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for child in tl.static_range(ALPHA):
        out = tl.where(label == child, accs[child], out)
    if HOLES:
        owned = bit_masks(
            planes_ptr, stride_pp, stride_pn, offs_n, mask_n, first_k, SIZE_WORDS, KEY, DIGITS, ALPHA, False,
            BLOCK_K, 1, False,
        )  # fmt: skip
        out = tl.where(owned != 0, out, 0.0)
    out_at = out_ptr + pid_split.to(tl.int64) * stride_os
    if KEPT:
        word, WORDS = first_k // WORD, tl.cdiv(K, WORD)
        if MADE:
            first_n = pid_n * BLOCK_N
            exists, numbers = made_tile(KEPT_KEY, PER_ROW, N, K, first_n, word, BLOCK_N, BLOCK_K, WORD, UPCAST)
        else:
            before = values_before(
                bits_ptr, starts_ptr, bases_ptr, offs_n, mask_n, word, WORDS, RUN, BASE, WORD, UPCAST
            )  # fmt: skip
            exists, numbers, _ = kept_tile(bits_ptr, offs_n, mask_n, word, WORDS, before, BLOCK_K, WORD, UPCAST)
        tl.store(out_at + numbers, out.to(out_ptr.dtype.element_ty), mask=exists)
    else:
        out_at += offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])
