"""Where the lanes of a direct kernel stand, what they fetch ahead and how they store; see :mod:`.gluon`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def activate(acc, ACTIVATION: gl.constexpr):
    """As ``activate`` of the Triton kernels, which Gluon cannot call."""
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
    """Of a program's tensors: ``outputs`` and ``rows`` are tiles of a warp."""
    return gl.BlockedLayout([1, outputs, rows, 1, 4], [1, 1, 1, 32, 1], [warps_in, warps_out, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def layout_of_lanes(layout):
    """The same lanes with one element for each tile of outputs."""
    tiles = [1, layout.size_per_thread[1], 1, 1, 1]
    return gl.BlockedLayout(tiles, layout.threads_per_warp, layout.warps_per_cta, layout.order)


@gluon.jit
def places(LAYOUT: gl.constexpr, INNER: gl.constexpr, TILES: gl.constexpr, TILES_M: gl.constexpr):
    """Where an element of a tensor stands: indices along its five dimensions."""
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
    """Stores sums with their bias and activation, added up over the parts of the reduction."""
    acc = gl.expand_dims(gl.sum(acc, 0), 0)
    mask = (column < SIZE) & (row < M)
    if HAS_BIAS:
        acc += gl.load(bias_ptr + (first + column), mask=mask, other=0.0).to(gl.float32)
    acc = activate(acc, ACTIVATION)
    gl.store(out_ptr + row.to(gl.int64) * stride_om + column, acc.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def fetch(lines, steps, turns):
    """Asks L2 for lines of 128 bytes, for which nobody waits, if there are turns left. Returns the next lines."""
    text: gl.constexpr = "{\n.reg .pred p; setp.gt.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;\n}\n"
    following = ()
    for i in gl.static_range(len(lines)):
        gl.inline_asm_elementwise(text, "=r,l,r", [lines[i], turns], gl.int32, is_pure=False, pack=1)
        following += (lines[i] + steps[i],)
    return following
