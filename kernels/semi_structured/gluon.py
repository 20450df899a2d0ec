"""The semi-structured forward on sparse tensor cores: a Gluon kernel that issues ``mma.sp``.

A warp owns 32 parents' outputs, two ``m16`` tiles of the weight, of every child. Weights and metadata lie in memory as
the instruction's registers want them (see ``fragments``); they and the activations come through shared memory by
asynchronous copies, in a pipeline of ``STAGES`` stages. The second child's metadata is the complement of the first's.

With ``SEEDED`` the children are two of a seed, and there is no metadata to load. Of two neighbouring inputs each child
has one, so that half a hash of :mod:`fpe.kernels.partition.seeded` has the indices of a register: those of one row in
every other bit, those of the next row in the bits between. Rows and inputs come in the order of these bits (see
``fragments``).

Tensors have the shape ``[WARPS, TILES, 32, 4]``: tiles of 32 outputs, tiles of 8 rows of activations, lanes, registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..hashing import COLUMN, ROW, signed
from ..partition.fragments import hash_of

_ROW, _COLUMN = gl.constexpr(signed(ROW)), gl.constexpr(signed(COLUMN))

# Triton renamed these: the first after 3.8, the second after 3.6.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

WARPS = gl.constexpr(4)
STEP = gl.constexpr(64)  # inputs of a stage: two instructions take them


@gluon.constexpr_function
def _instruction(dtype, selector):
    """One ``m16n8k32``: results in operands 0-3, accumulator 4-7, weights 8-11, activations 12-15, metadata 16."""
    kind = "bf16" if str(dtype) == "bf16" else "f16"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, {$4, $5, $6, $7}, $16, " + f"{selector};"
    )


@gluon.jit
def _mma(acc, weights, rows, metadata, dtype: gl.constexpr, selector: gl.constexpr):
    # Every operand has four registers a lane; the metadata's four are the same one.
    return gl.inline_asm_elementwise(
        _instruction(dtype, selector),
        "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r",
        [acc, weights, rows, metadata],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def _rows_layout(block_m):
    """The layout of activations ``[block_m, 16]``, in pairs, as ``mma.sp`` takes them; every warp holds all."""
    registers = [[0, 4], [0, 8]] + [[8 << i, 0] for i in range(_log2(block_m) - 3)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [block_m, 16])


@gluon.constexpr_function
def _stage_layout(block_m):
    """The same for both instructions of a stage, ``[block_m, 32]``, with a seed: a lane has four neighbouring pairs."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[8 << i, 0] for i in range(_log2(block_m) - 3)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [block_m, 32])


@gluon.constexpr_function
def _only(dim, rank, layout):
    """The layout of one dimension of a layout with ``rank`` dimensions."""
    for other in range(rank - 1, -1, -1):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _complement(metadata):
    apart = ((metadata >> 3) ^ (metadata >> 1)) & 0x11111111
    return metadata ^ -0x55555556 ^ (apart * 15)  # 0xAAAAAAAA, signed


@gluon.jit
def _metadata(half):
    """Metadata from the low half of a word, in which the indices of an even row and of the next row alternate.

    The first value of a quad is its input 0 or 1, the second its input 2 or 3.
    """
    return (half & 0x5555) | ((half << 15) & 0x55550000) | -0x77777778  # 0x88888888, signed


@gluon.jit
def _part(smem, part: gl.constexpr, layout: gl.constexpr, squeezed: gl.constexpr):
    """Loads one of a stage's parts ``[parts, ...]`` to registers."""
    value = smem.slice(part, 1, dim=0).load(layout)
    return gl.convert_layout(value.reshape(value.shape[1:]), squeezed, assert_trivial=True)


@gluon.jit
def _epilogue(acc0, acc1, out_ptrs, mask, TILES: gl.constexpr, OUT: gl.constexpr, SEEDED: gl.constexpr):
    """Stores both halves of each warp's 32 outputs, ``[WARPS, TILES, 32, 4]`` each, as ``[32 * WARPS, 8 * TILES]``."""
    both = gl.join(acc0, acc1).to(out_ptrs.dtype.element_ty)
    both = both.reshape([WARPS, TILES, 8, 4, 2, 2, 2])  # warp, tile, group, thread, row + 8, column, half
    if SEEDED:
        both = both.permute([0, 6, 2, 4, 1, 3, 5])
    else:
        both = both.permute([0, 6, 4, 2, 1, 3, 5])
    tile = both.reshape([WARPS * 32, TILES * 8])
    gl.store(out_ptrs, gl.convert_layout(tile, OUT), mask=mask)


@gluon.jit(do_not_specialize=["M", "KEY"])
def multiply(
    x_ptr,  # pairs, int32
    weights_ptr,  # int32 fragments [children, tiles, steps, 2, 2, 32, 4]
    metadata_ptr,  # int32 [tiles, steps, 2, 32]; none with SEEDED
    out_ptr,
    M,
    N,
    STEPS,
    KEY,
    stride_xm,
    stride_os,
    plane,
    CHILDREN: gl.constexpr,
    BLOCK_M: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    DTYPE: gl.constexpr,
    SEEDED: gl.constexpr,
):
    """``y[M, children, N]`` of one tile of ``32 * WARPS`` outputs of every child and ``BLOCK_M`` rows."""
    TILES: gl.constexpr = BLOCK_M // 8
    PARTS: gl.constexpr = 4 * CHILDREN  # of a stage's weights: child, instruction, half
    FRAGMENT: gl.constexpr = gl.BlockedLayout([1, TILES, 1, 4], [1, 1, 32, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    WEIGHT: gl.constexpr = gl.SliceLayout(1, FRAGMENT)
    META: gl.constexpr = gl.SliceLayout(2, WEIGHT)
    ROW: gl.constexpr = gl.SliceLayout(0, FRAGMENT)
    COPY_WEIGHT: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [1, WARPS, 1, 1], [3, 2, 1, 0])
    COPY_META: gl.constexpr = gl.SliceLayout(3, COPY_WEIGHT)
    COPY_ROW: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    FLAT_META: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])

    # This is in_groups of the Triton kernels, which Gluon cannot call.
    band = GROUP * ((N + WARPS * 32 - 1) // (WARPS * 32))
    start = gl.program_id(0) // band * GROUP
    width = gl.minimum((M + BLOCK_M - 1) // BLOCK_M - start, GROUP)
    pid_m = start + gl.program_id(0) % band % width
    pid_n = gl.program_id(0) % band // width
    pid_split = gl.program_id(1)
    first = STEPS * pid_split // SPLIT
    last = STEPS * (pid_split + 1) // SPLIT

    # Each buffer is filled by one copy: the compiler would set a barrier between two copies into one buffer.
    part = gl.arange(0, PARTS, _only(0, 4, COPY_WEIGHT))[:, None, None, None]
    warp = gl.arange(0, WARPS, _only(1, 4, COPY_WEIGHT))[None, :, None, None]
    lane = gl.arange(0, 32, _only(2, 4, COPY_WEIGHT))[None, None, :, None]
    register = gl.arange(0, 4, _only(3, 4, COPY_WEIGHT))[None, None, None, :]
    tile = (pid_n * WARPS + warp).to(gl.int64) * STEPS
    weights_ptrs = weights_ptr + tile * 512 + part // 4 * plane + (part % 4 * 128 + lane * 4 + register)
    if SEEDED:
        warp_meta = gl.arange(0, WARPS, _only(0, 2, META))[:, None]
        lane_meta = gl.arange(0, 32, _only(1, 2, META))[None, :]
        pair_of_rows = (pid_n * WARPS + warp_meta) * 16 + lane_meta % 4 // 2 * 8 + lane_meta // 4
        hashed = pair_of_rows * _ROW + KEY
        shift = lane_meta % 2 * 16
    else:
        instruction = gl.arange(0, 2, _only(0, 3, COPY_META))[:, None, None]
        warp_meta = gl.arange(0, WARPS, _only(1, 3, COPY_META))[None, :, None]
        lane_meta = gl.arange(0, 32, _only(2, 3, COPY_META))[None, None, :]
        tile_meta = (pid_n * WARPS + warp_meta).to(gl.int64) * STEPS
        metadata_ptrs = metadata_ptr + tile_meta * 64 + (instruction * 32 + lane_meta)
    offs_m = pid_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPY_ROW))
    pair = gl.arange(0, 32, gl.SliceLayout(0, COPY_ROW))
    # With a seed a stage has eight pairs of each 16: those that two hashes serve.
    place = pair % 8 + pair // 8 * 16 if SEEDED else pair
    rows_ptrs = x_ptr + offs_m.to(gl.int64)[:, None] * stride_xm + place[None, :]
    mask_rows = (offs_m < M)[:, None] & (pair >= 0)[None, :]

    weights_smem = gl.allocate_shared_memory(gl.int32, [STAGES, PARTS, WARPS, 32, 4], FLAT)
    if not SEEDED:
        metadata_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 2, WARPS, 32], FLAT_META)
    rows_smem = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M, 32], SWIZZLED)

    for early in gl.static_range(STAGES - 1):
        step = first + early
        if step < last:
            _copy(weights_smem.index(early), weights_ptrs + step * 512)
            if SEEDED:
                _copy(rows_smem.index(early), rows_ptrs + (step // 2 * 64 + step % 2 * 8), mask=mask_rows)
            else:
                _copy(metadata_smem.index(early), metadata_ptrs + step * 64)
                _copy(rows_smem.index(early), rows_ptrs + step * 32, mask=mask_rows)
        async_copy.commit_group()

    zero = gl.full([WARPS, TILES, 32, 4], 0.0, gl.float32, FRAGMENT)
    acc00 = zero  # child, half
    acc01 = zero
    acc10 = zero
    acc11 = zero
    for step in range(first, last):
        async_copy.wait_group(STAGES - 2)
        _barrier()
        stage = (step - first) % STAGES
        ahead = step + STAGES - 1
        if ahead < last:
            free = (ahead - first) % STAGES
            _copy(weights_smem.index(free), weights_ptrs + ahead * 512)
            if SEEDED:
                _copy(rows_smem.index(free), rows_ptrs + (ahead // 2 * 64 + ahead % 2 * 8), mask=mask_rows)
            else:
                _copy(metadata_smem.index(free), metadata_ptrs + ahead * 64)
                _copy(rows_smem.index(free), rows_ptrs + ahead * 32, mask=mask_rows)
        async_copy.commit_group()
        weights = weights_smem.index(stage)
        rows = rows_smem.index(stage)
        if SEEDED:
            bs = gl.split(rows.load(_stage_layout(BLOCK_M)).reshape([TILES, 32, 2, 4]).permute([0, 1, 3, 2]))
        for which in gl.static_range(2):
            if SEEDED:
                b = bs[which]
                e = _metadata(hash_of((hashed + (step * 2 + which) * _COLUMN).to(gl.int32)) >> shift)
            else:
                b = rows.slice(which * 16, 16, dim=1).load(_rows_layout(BLOCK_M))
                b = b.reshape([TILES, 8, 4, 4]).permute([0, 1, 3, 2]).reshape([TILES, 32, 4])
                e = _part(metadata_smem.index(stage), which, COPY_META, META)
            b = gl.convert_layout(b, ROW, assert_trivial=True).expand_dims(0)
            low = e.expand_dims(2).expand_dims(1)
            a0 = _part(weights, which * 2, COPY_WEIGHT, WEIGHT).expand_dims(1)
            a1 = _part(weights, which * 2 + 1, COPY_WEIGHT, WEIGHT).expand_dims(1)
            acc00 = _mma(acc00, a0, b, low, DTYPE, 0)
            acc01 = _mma(acc01, a1, b, low, DTYPE, 1)
            if CHILDREN == 2:
                other = e ^ 0x55555555 if SEEDED else _complement(e)
                high = other.expand_dims(2).expand_dims(1)
                a0 = _part(weights, 4 + which * 2, COPY_WEIGHT, WEIGHT).expand_dims(1)
                a1 = _part(weights, 5 + which * 2, COPY_WEIGHT, WEIGHT).expand_dims(1)
                acc10 = _mma(acc10, a0, b, high, DTYPE, 0)
                acc11 = _mma(acc11, a1, b, high, DTYPE, 1)
    async_copy.wait_group(0)

    offs_n = pid_n * (WARPS * 32) + gl.arange(0, WARPS * 32, gl.SliceLayout(1, OUT))
    offs_m = pid_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    row = offs_m.to(gl.int64) * CHILDREN * N
    out_ptrs = out_ptr + pid_split.to(gl.int64) * stride_os + row[None, :] + offs_n[:, None]
    _epilogue(acc00, acc01, out_ptrs, mask, TILES, OUT, SEEDED)
    if CHILDREN == 2:
        _epilogue(acc10, acc11, out_ptrs + N, mask, TILES, OUT, SEEDED)
