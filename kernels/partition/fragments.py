"""What the direct kernels are made of: masks, a child's share of the weights, and which element a lane holds.

It is written in Gluon for :mod:`fpe.kernels.partition.gluon`, which says what a lane holds. Masks of labels have the
order of a tensor core's registers. The mask of two 16-bit weights is made by one ``prmt``, which replicates the signs
of two bytes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..hashing import MIX, signed

_FIRST, _SECOND = (signed(factor) for _, factor in MIX)


@gluon.constexpr_function
def multiply(kind, pairs, rows):
    """``m16n8k16`` for pairs of registers of A and B.

    Operands 0-3 are the new sums, 4-7 the old ones; those of A begin at 8, those of B at ``rows``.
    """
    text = ""
    sums = "{$4, $5, $6, $7}"
    for pair in pairs:
        a = ", ".join([f"${8 + register}" for register in pair[0]])
        b = ", ".join([f"${rows + register}" for register in pair[1]])
        text += f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        text += f"{{$0, $1, $2, $3}}, {{{a}}}, {{{b}}}, {sums}; "
        sums = "{$0, $1, $2, $3}"
    return text


@gluon.constexpr_function
def constraints(operands):
    """Constraints of :func:`multiply`: four new sums, four old ones and so many operands of four registers each."""
    return "=&f,=&f,=&f,=&f,f,f,f,f" + ",r" * (4 * operands)


@gluon.constexpr_function
def _signs(step):
    """Masks of a lane's four words of one of the four steps, from its label word."""
    text = f"shl.b32 $0, $4, {7 - 2 * step}; shl.b32 $2, $4, {6 - 2 * step}; "
    text += "prmt.b32 $1, $0, $0, 0xBB99; prmt.b32 $0, $0, $0, 0xAA88; "
    return text + "prmt.b32 $3, $2, $2, 0xBB99; prmt.b32 $2, $2, $2, 0xAA88;"


@gluon.constexpr_function
def _signs_of_two(high):
    """Masks of one half of the four words of two rows, from label words whose bytes have these bits as highest."""
    even, odd = ("0xEEAA", "0xFFBB") if high else ("0xCC88", "0xDD99")
    text = f"shl.b32 $2, $4, 1; shl.b32 $3, $8, 1; prmt.b32 $0, $2, $3, {even}; prmt.b32 $1, $2, $3, {odd}; "
    return text + f"prmt.b32 $2, $4, $8, {even}; prmt.b32 $3, $4, $8, {odd};"


@gluon.constexpr_function
def _signs_of_four(high):
    """Masks of two words of two rows and two of two other rows; each label word has a word's bits as the highest."""
    even, odd = ("0xEEAA", "0xFFBB") if high else ("0xCC88", "0xDD99")
    return "".join([f"prmt.b32 ${i}, ${4 + i}, ${8 + i}, {odd if i % 2 else even}; " for i in range(4)])


@gluon.constexpr_function
def _own(digit):
    """Where a digit of the column inverts the label's: whether in one half of each word, and in which of four words."""
    return digit == 0, (False, digit == 1, digit == 2, digit > 0)


@gluon.constexpr_function
def _signs_of_seed(alpha, digit, step, row):
    """Masks of a digit of a lane's four words of one of the four steps, from the hash of two rows.

    Where the two halves of a word differ, the mask has one of them inverted. With two children a mask serves one word
    alone, and it is inverted where it is used (:func:`_half_of`).
    """
    digits, shift = alpha.bit_length() - 1, 7 - 2 * step - row
    halves, words = _own(digit)
    halves = halves and alpha > 2
    text = f"shl.b32 $0, $4, {shift}; " if shift else "mov.b32 $0, $4; "
    for word in (3, 2, 1, 0):
        byte = digits * (2 * word // alpha) + digit
        text += f"prmt.b32 ${word}, $0, $0, {0x8888 + 0x1111 * byte:#x}; "
        flip = 0xFFFF0000 if halves else 0xFFFFFFFF if words[word] else 0
        text += f"xor.b32 ${word}, ${word}, {flip:#x}; " if flip else ""
    return text


@gluon.constexpr_function
def _signs_of_seeds(alpha, digit, high):
    """Masks of a digit of one half of the four words of two rows, from their hash with each row's bits as highest."""
    digits = alpha.bit_length() - 1
    halves, words = _own(digit)
    text = ""
    for word in range(4):
        byte = digits * (2 * word // alpha) + digit
        text += f"prmt.b32 ${word}, $4, $8, {0xCC88 + 0x1111 * byte:#x}; "
        text += f"not.b32 ${word}, ${word}; " if (high if halves else words[word]) else ""
    return text


@gluon.jit
def hash_of(x, FIRST: gl.constexpr = _FIRST, SECOND: gl.constexpr = _SECOND):
    """The hash of :mod:`.seeded`.

    Its constants are defaults: globals of a helper would enter the key of Triton's cache by the order of compilation.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 13) & 0x7FFFF)) * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


@gluon.jit
def masks_of_seed(hashed, ALPHA: gl.constexpr, digit: gl.constexpr, step: gl.constexpr, row: gl.constexpr):
    """As :func:`masks_of_step`, from the hash of a row and its columns."""
    text: gl.constexpr = _signs_of_seed(ALPHA, digit, step, row)
    constraints: gl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r"
    return gl.inline_asm_elementwise(text, constraints, [hashed], gl.int32, is_pure=True, pack=4)


@gluon.jit
def masks_of_seeds(first, second, ALPHA: gl.constexpr, digit: gl.constexpr, high: gl.constexpr):
    """As :func:`masks_of_two`, from the hashes of both rows."""
    text: gl.constexpr = _signs_of_seeds(ALPHA, digit, high)
    constraints: gl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r"
    return gl.inline_asm_elementwise(text, constraints, [first, second], gl.int32, is_pure=True, pack=4)


@gluon.jit
def masks_of_step(label, step: gl.constexpr):
    """Masks of a lane's four words in one of the four steps, from its label word."""
    constraints: gl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r"
    return gl.inline_asm_elementwise(_signs(step), constraints, [label], gl.int32, is_pure=True, pack=4)


@gluon.jit
def masks_of_two(first, second, high: gl.constexpr):
    """Masks of one half of the four words of two rows, from the label words of both."""
    constraints: gl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r"
    return gl.inline_asm_elementwise(_signs_of_two(high), constraints, [first, second], gl.int32, is_pure=True, pack=4)


@gluon.jit
def masks_of_four(first, second, high: gl.constexpr):
    """Masks of one half of two words of two rows, and of two words of two other rows, from a label word for each."""
    constraints: gl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r"
    return gl.inline_asm_elementwise(_signs_of_four(high), constraints, [first, second], gl.int32, is_pure=True, pack=4)


@gluon.jit
def halves_of_two(first, second, high: gl.constexpr):
    """The low or the high halves of two words, the first word's below."""
    selector: gl.constexpr = "0x7632" if high else "0x5410"
    text: gl.constexpr = "prmt.b32 $0, $1, $2, " + selector + ";"
    return gl.inline_asm_elementwise(text, "=r,r,r", [first, second], gl.int32, is_pure=True, pack=1)


@gluon.constexpr_function
def _both(child):
    """``lop3`` that keeps a child's weights of a word, by the masks of the digits 1 and 0."""
    table = 0xF0 & (0xCC if child >> 1 & 1 else 0x33) & (0xAA if child & 1 else 0x55)
    return f"lop3.b32 $0, $1, $2, $3, {table:#x};"


@gluon.constexpr_function
def _half_of(child):
    """``lop3`` that keeps half a word: the lower one if the mask is set and the child is the second, or neither."""
    table = 0xF0 & ((0xCC ^ 0xAA) if child else ~(0xCC ^ 0xAA))
    return f"lop3.b32 $0, $1, $2, 0xFFFF0000, {table:#x};"


@gluon.jit
def half_of(words, masks, CHILD: gl.constexpr):
    """The weights of one of two children out of words, zero elsewhere; see :func:`_half_of`."""
    return gl.inline_asm_elementwise(_half_of(CHILD), "=r,r,r", [words, masks], gl.int32, is_pure=True, pack=1)


@gluon.jit
def share(words, masks, CHILD: gl.constexpr, DIGITS: gl.constexpr):
    """A child's weights out of words, zero elsewhere. The highest digit comes first: children share its result."""
    if DIGITS == 3:
        words = words & (masks[2] if CHILD >> 2 == 1 else ~masks[2])
    if DIGITS == 1:
        words = words & (masks[0] if CHILD == 1 else ~masks[0])
    else:
        operands = [words, masks[1], masks[0]]
        words = gl.inline_asm_elementwise(_both(CHILD), "=r,r,r,r", operands, gl.int32, is_pure=True, pack=1)
    return words


@gluon.jit
def masks_of_rows(
    upper_labels,
    lower_labels,
    like,
    ALPHA: gl.constexpr,
    DIGITS: gl.constexpr,
    SEEDED: gl.constexpr,
    step: gl.constexpr,
):
    """Masks of the words of a lane's two rows, by digit, from their label words or their hash; shaped as ``like``."""
    upper_masks = ()
    lower_masks = ()
    for digit in gl.static_range(DIGITS):
        if SEEDED:
            hashed = gl.broadcast(upper_labels[0], like)[0]
            upper_masks += (masks_of_seed(hashed, ALPHA, digit, step, 0),)
            lower_masks += (masks_of_seed(hashed, ALPHA, digit, step, 1),)
        else:
            upper_masks += (masks_of_step(gl.broadcast(upper_labels[digit], like)[0], step),)
            lower_masks += (masks_of_step(gl.broadcast(lower_labels[digit], like)[0], step),)
    return upper_masks, lower_masks


@gluon.jit
def share_of_row(words, masks, CHILD: gl.constexpr, ALPHA: gl.constexpr, DIGITS: gl.constexpr, SEEDED: gl.constexpr):
    """A child's weights out of a lane's words of one row."""
    if SEEDED and ALPHA == 2:
        words = half_of(words, masks[0], CHILD)
    else:
        words = share(words, masks, CHILD, DIGITS)
    return words


@gluon.jit
def add_rows(acc, upper, lower, x, KIND: gl.constexpr):
    """Adds the products of 32 columns of two rows a lane to the sums: two instructions."""
    text: gl.constexpr = multiply(KIND, (((0, 4, 1, 5), (0, 1)), ((2, 6, 3, 7), (2, 3))), 16)
    operands = [acc, upper, lower, x]
    return gl.inline_asm_elementwise(text, constraints(3), operands, gl.float32, is_pure=True, pack=4)


@gluon.jit
def activate(acc, ACTIVATION: gl.constexpr):
    """Does what ``activate`` of the Triton kernels does, which Gluon cannot call."""
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
def layout_of(warps_in, warps_out, outputs, rows):
    """The layout of a program's tensors: a warp has ``outputs`` tiles of outputs and ``rows`` tiles of rows."""
    return gl.BlockedLayout([1, outputs, rows, 1, 4], [1, 1, 1, 32, 1], [warps_in, warps_out, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def layout_of_lanes(layout):
    """The layout in which each lane has one element for each tile of outputs."""
    tiles = [1, layout.size_per_thread[1], 1, 1, 1]
    return gl.BlockedLayout(tiles, layout.threads_per_warp, layout.warps_per_cta, layout.order)


@gluon.jit
def places(LAYOUT: gl.constexpr, INNER: gl.constexpr, TILES: gl.constexpr, TILES_M: gl.constexpr):
    """Indices of a tensor's elements along its five dimensions."""
    inner = gl.arange(0, INNER, _only(0, LAYOUT))[:, None, None, None, None]
    tile = gl.arange(0, TILES, _only(1, LAYOUT))[None, :, None, None, None]
    tile_m = gl.arange(0, TILES_M, _only(2, LAYOUT))[None, None, :, None, None]
    lane = gl.arange(0, 32, _only(3, LAYOUT))[None, None, None, :, None]
    register = gl.arange(0, 4, _only(4, LAYOUT))[None, None, None, None, :]
    return inner, tile, tile_m, lane, register


@gluon.jit
def store(
    acc, out_ptr, bias_ptr, first, column, row, M, SIZE, stride_om, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr
):
    """Adds up the parts of a reduction, adds the bias, applies the activation and stores the results."""
    acc = gl.expand_dims(gl.sum(acc, 0), 0)
    mask = (column < SIZE) & (row < M)
    if HAS_BIAS:
        acc += gl.load(bias_ptr + (first + column), mask=mask, other=0.0).to(gl.float32)
    acc = activate(acc, ACTIVATION)
    gl.store(out_ptr + row.to(gl.int64) * stride_om + column, acc.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def fetch(lines, steps, turns):
    """Asks L2 for lines of 128 bytes, for which nobody waits, if ``turns`` is positive. Returns the next lines."""
    text: gl.constexpr = "{\n.reg .pred p; setp.gt.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;\n}\n"
    following = ()
    for i in gl.static_range(len(lines)):
        gl.inline_asm_elementwise(text, "=r,l,r", [lines[i], turns], gl.int32, is_pure=False, pack=1)
        following += (lines[i] + steps[i],)
    return following
