"""Kept values for the direct kernels: a lane takes eight neighbouring positions of a row into its four registers.

The values of eight positions stand together in memory, but begin anywhere. A lane loads the two lines of 16 bytes that
hold them, and shifts them by words and by a half until the values of each four positions begin at a register. Four
positions have sixteen patterns of bits. The selectors of ``prmt`` that put the values of a pattern in their places
stand in a lane of the warp, where a shuffle looks them up.

Tensors have five dimensions, the last two being lanes and registers, as in the direct kernels. What is the same in all
four registers has a last dimension of one. Four neighbouring lanes share a row and a word of its bits, a byte each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .layout import BASE, RUN, WORD

LINE = gl.constexpr(8)
"""Values in a line of 16 bytes, of which a lane reads two."""
_WORDS, _RUNS = gl.constexpr(RUN // WORD), gl.constexpr(BASE // RUN)


@gluon.jit
def _count_ones(words):
    """How many bits of each word are set."""
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], gl.int32, is_pure=True, pack=1)


@gluon.jit
def _look_up(table, lane):
    """What another lane of the warp has; only the lower five bits of ``lane`` count."""
    text: gl.constexpr = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return gl.inline_asm_elementwise(text, "=r,r,r", [table, lane], gl.int32, is_pure=True, pack=1)


@gluon.jit
def _registers_added(x):
    """The sum of a lane's registers."""
    return gl.expand_dims(gl.sum(x, 4), 4)


@gluon.jit
def word_of(words, register, step: gl.constexpr):
    """One of a lane's registers. It costs nothing: the compiler drops the zeros that are added to it."""
    return _registers_added(gl.where(register == step, words, 0))


@gluon.jit
def _known(starts_ptr, bases_ptr, run, inside, RUNS: gl.constexpr = _RUNS):
    """Values before a run of words, as stored."""
    base = gl.load(bases_ptr + run // RUNS, mask=inside, other=0)
    return base + (gl.load(starts_ptr + run, mask=inside, other=0).to(gl.int32) & 0xFFFF)


@gluon.jit
def values_before(
    bits_ptr, starts_ptr, bases_ptr, row, word, WORDS, lane, register, PER_RUN: gl.constexpr = _WORDS
):  # fmt: skip
    """How many values stand before a word of a row: those before its run, and the run's ones, a quarter to a lane."""
    at = row.to(gl.int64) * WORDS + word
    inside = word < WORDS
    run = at // PER_RUN
    ones = lane * 0
    for part in gl.static_range(PER_RUN // 16):
        offs = run * PER_RUN + (lane % 4 * (PER_RUN // 4) + part * 4 + register)
        ones += _registers_added(_count_ones(gl.load(bits_ptr + offs, mask=inside & (offs < at), other=0)))
    ones += _look_up(ones, lane ^ 1)
    ones += _look_up(ones, lane ^ 2)
    return _known(starts_ptr, bases_ptr, run, inside) + ones


@gluon.jit
def lines_follow(
    starts_ptr, bases_ptr, row, N, WORDS, NNZ, LINE: gl.constexpr = LINE, PER_RUN: gl.constexpr = _WORDS
):  # fmt: skip
    """Whether two lines of values can be read from wherever a value of the rows before ``row`` is.

    It is true if two lines of values follow the run of words in which ``row`` begins.
    """
    run = row.to(gl.int64) * WORDS // PER_RUN + 1
    inside = run < (N.to(gl.int64) * WORDS + PER_RUN - 1) // PER_RUN
    return inside & (_known(starts_ptr, bases_ptr, run, inside) + 2 * LINE <= NNZ)


@gluon.jit
def patterns(lane):
    """Selectors of ``prmt`` for the pattern ``lane % 16`` of four positions: those of two words, in 16 bits each.

    They choose from two words that hold four values in order. The last value is zero where not all four positions
    exist.
    """
    selectors = lane * 0
    before = lane * 0
    for position in gl.static_range(4):
        exists = (lane >> position) & 1
        half = gl.where(exists == 1, before, 3)
        selectors |= (half * 0x22 + 0x10) << (8 * position)
        before += exists
    return selectors


@gluon.constexpr_function
def _four(words, at, bits, selector, first):
    """Writes two words of four positions to ``$first`` and the next operand; their values begin ``at`` in ``words``."""
    text = f"and.b32 a, {at}, 2; setp.ne.b32 p, a, 0; "
    for i in range(3):
        text += f"selp.b32 s{i}, {words}{i + 1}, {words}{i}, p; "
    text += f"shl.b32 a, {at}, 4; shf.r.wrap.b32 u, s0, s1, a; shf.r.wrap.b32 v, s1, s2, a; "
    text += f"not.b32 a, $20; and.b32 a, a, {bits}; setp.ne.b32 p, a, 0; @p and.b32 v, v, 0xFFFF; "
    text += f"prmt.b32 ${first}, u, v, {selector}; shr.u32 a, {selector}, 16; "
    return text + f"prmt.b32 ${first + 1}, u, v, a; "


@gluon.constexpr_function
def _eight():
    """Four words of eight positions.

    Out of two lines (4 and 8), the numbers of the first values of both halves (12 and 16), the positions' bits (20) and
    the selectors of both halves (24 and 28).
    """
    text = "{\n.reg .pred p; .reg .b32 a, u, v, t<6>, s<4>; and.b32 a, $12, 4; setp.ne.b32 p, a, 0; "
    for i in range(6):
        text += f"selp.b32 t{i}, ${4 + i + 2}, ${4 + i}, p; "
    text += _four("t", "$12", 15, "$24", 0)
    # The second half begins up to seven values behind t0: four or more where bit 2 of the two numbers differs.
    text += "xor.b32 a, $12, $16; and.b32 a, a, 4; setp.ne.b32 p, a, 0; "
    for i in range(4):
        text += f"selp.b32 s{i}, t{i + 2}, t{i}, p; "
    return text + _four("s", "$16", 240, "$28", 2) + "\n}\n"


@gluon.jit
def kept_words(
    values_ptr, word, first, selectors, turn, register, GUARDED: gl.constexpr, LINE: gl.constexpr = LINE
):  # fmt: skip
    """A lane's eight positions as four words of two, zero where none exists, and the values before the next word.

    Args:
        values_ptr: 16-bit values as integers; without ``GUARDED`` aligned to 16 bytes.
        word: Bits of 32 positions, of which the lane has the eight from ``turn`` on.
        first: How many values come before these 32 positions.
        selectors: Of :func:`patterns`.
        turn: 0, 8, 16 or 24.
        register: 0 to 3, in the last dimension.
        GUARDED: Whether only values that exist are read, one by one: where two lines do not follow.
        LINE: Values of 16 bytes.
    """
    if GUARDED:
        bit = turn + 2 * register
        low = (word >> bit) & 1
        values_at = values_ptr + (first + _count_ones(word & ((1 << bit) - 1)))
        lower = gl.load(values_at, mask=low != 0, other=0).to(gl.int32) & 0xFFFF
        upper = gl.load(values_at + low, mask=((word >> bit) & 2) != 0, other=0).to(gl.int32)
        words = lower | (upper << 16)
    else:
        bits = word >> turn
        low = first + _count_ones(word & ((1 << turn) - 1))
        high = first + _count_ones(word & ((16 << turn) - 1))
        pairs_ptr = values_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
        line_at = pairs_ptr + ((low >> 3) * 4 + register)  # by a shift the compiler knows that it is aligned
        line = gl.load(line_at)
        after = gl.load(line_at + LINE // 2)
        operands = [line, after]
        for each in gl.static_range(5):
            part = (low, high, bits, _look_up(selectors, bits), _look_up(selectors, bits >> 4))[each]
            operands += [gl.broadcast(part, line)[0]]
        text: gl.constexpr = _eight()
        constraints: gl.constexpr = "=&r,=&r,=&r,=&r" + ",r" * 28
        words = gl.inline_asm_elementwise(text, constraints, operands, gl.int32, is_pure=True, pack=4)
    return words, first + _count_ones(word)
