"""Ladders to the partition kernel: plain ways to give each child its weights, and to read kept values.

Each rung is a matmul of two children (alpha = 2, 16 rows) that differs in how the labels' bits meet the weights. The
tiled kernels ship the last rung before ``"no labels"``, which multiplies the whole tile twice: the floor of tiles. Up
to 64 rows ``"direct"`` is shipped (``kernels/partition/gluon.py``).

Each rung of kept values is a matmul of one child that differs in how values find their places. On the transpose the
helpers of ``kernels/bitmap/triton.py`` are shipped, which the rungs call; along rows ``"kept, direct"`` is
(``kernels/partition/gluon_kept.py``).
"""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...kernels.bitmap.layout import WORD
from ...kernels.bitmap.triton import kept_pairs, kept_tile
from ...kernels.device import interpreting
from ..families import bitmap, partition
from ..results import Results
from . import sass
from .compile import compile_launch, disassemble, launches

RUNGS = {
    "select": "`tl.where` on the 16-bit weights",
    "halfword masks": "bits spread over 16-bit integers, `&` with the weights' bits",
    "word masks": "two weights to a 32-bit word, one mask for both (shipped for more rows)",
    "no labels": "both children take the whole tile: what the matmul costs without labels",
}
SHIPPED = {
    "direct": "fragments loaded from memory, masks by sign replication (shipped for up to 64 rows)",
    "direct, of a seed": "the same with labels made in registers, a hash for 64 weights (shipped for up to 64 rows)",
    "kept, direct": "fragments made of two lines of values, by shifts and a `prmt` a word (shipped along rows)",
}
"""The rungs without tiles: the shipped kernels, compiled as they ship."""
_CASES = {
    "direct": partition.Case("split", "bf16", 16, 2),
    "direct, of a seed": partition.Case("split", "bf16", 16, 2, seeded=True),
    "kept, direct": bitmap.Case("kept_split", "bf16", 16, 1),
}
TILE = (64, 128, 16)
"""``BLOCK_N, BLOCK_K, BLOCK_M``."""
KEPT_RUNGS = {
    "scan": "the bits of a row are added up by `tl.cumsum`, and every position is gathered",
    "count": "the ones below each bit are counted (shipped on the transpose, from five children or 33 rows on)",
    "pairs": "one count and one address for two neighbours, placed by one `prmt` (shipped on the transpose)",
    "all exist": "the tile is loaded whole: what the matmul costs without a bitmap",
}
KEPT_TILE = (64, 64, 16)


@triton.jit
def _rung(
    x_ptr,
    w_ptr,
    plane_ptr,
    out_ptr,
    M,
    N,
    K,
    RUNG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    rows = offs_n[:, None].to(tl.int64)
    acc_0 = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_1 = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first_k in range(0, K, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m[None, :] * K + offs_k[:, None], mask=(offs_m < M)[None, :], other=0.0)
        w = tl.load(w_ptr + rows * K + offs_k[None, :])  # [BLOCK_N, BLOCK_K]
        byte = tl.load(plane_ptr + rows * (K // 8) + (first_k // 8 + tl.arange(0, BLOCK_K // 8))[None, :])
        if RUNG == "select":
            bit = ((byte[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1).reshape(BLOCK_N, BLOCK_K)
            w_0 = tl.where(bit == 0, w, 0.0)
            w_1 = tl.where(bit == 1, w, 0.0)
        elif RUNG == "halfword masks":
            shift = (15 - tl.arange(0, 8)).to(tl.int16)
            mask = ((byte.to(tl.int16)[:, :, None] << shift[None, None, :]) >> 15).reshape(BLOCK_N, BLOCK_K)
            bits = w.to(tl.int16, bitcast=True)
            w_0 = (bits & ~mask).to(tl.bfloat16, bitcast=True)
            w_1 = (bits & mask).to(tl.bfloat16, bitcast=True)
        elif RUNG == "word masks":
            at = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + rows * (K // 2)
            words = tl.load(at + (first_k // 2 + tl.arange(0, BLOCK_K // 2))[None, :])
            spread = byte.to(tl.int32) | (byte.to(tl.int32) << 12)
            mask = ((spread[:, :, None] >> tl.arange(0, 4)[None, None, :]) & 0x10001) * 0xFFFF
            mask = mask.reshape(BLOCK_N, BLOCK_K // 2)
            one, zero = words & mask, words & ~mask
            w_0 = tl.join((zero & 0xFFFF).to(tl.int16), (zero >> 16).to(tl.int16)).reshape(BLOCK_N, BLOCK_K)
            w_1 = tl.join((one & 0xFFFF).to(tl.int16), (one >> 16).to(tl.int16)).reshape(BLOCK_N, BLOCK_K)
            w_0, w_1 = w_0.to(tl.bfloat16, bitcast=True), w_1.to(tl.bfloat16, bitcast=True)
        else:
            w_0, w_1 = w, w
        acc_0 = tl.dot(w_0, x, acc_0)
        acc_1 = tl.dot(w_1, x, acc_1)
    out = out_ptr + offs_m[None, :] * (2 * N) + offs_n[:, None]
    tl.store(out, acc_0.to(tl.bfloat16), mask=(offs_m < M)[None, :])
    tl.store(out + N, acc_1.to(tl.bfloat16), mask=(offs_m < M)[None, :])


@triton.jit
def _kept_rung(
    x_ptr,
    values_ptr,  # 16-bit values, as bits
    bits_ptr,
    starts_ptr,  # values before each row
    out_ptr,
    M,
    N,
    K,
    RUNG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WORD: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n, WORDS = offs_n < N, K // WORD
    before = tl.load(starts_ptr + offs_n)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first_k in range(0, K, BLOCK_K):
        offs_k, word = first_k + tl.arange(0, BLOCK_K), first_k // WORD
        if RUNG == "scan":
            words_at = bits_ptr + offs_n[:, None] * WORDS + (word + tl.arange(0, BLOCK_K // WORD))[None, :]
            words = tl.load(words_at, mask=mask_n[:, None], other=0)
            bits = ((words[:, :, None] >> tl.arange(0, WORD)[None, None, :]) & 1).reshape(BLOCK_N, BLOCK_K)
            numbers = before[:, None] + tl.cumsum(bits, 1) - bits
            w = tl.load(values_ptr + numbers, mask=bits != 0, other=0)  # [BLOCK_N, BLOCK_K]
            before += tl.sum(bits, 1)
        elif RUNG == "count":
            exists, numbers, before = kept_tile(bits_ptr, offs_n, mask_n, word, WORDS, before, BLOCK_K, WORD, False)
            w = tl.load(values_ptr + numbers, mask=exists, other=0)  # [BLOCK_N, BLOCK_K]
        elif RUNG == "pairs":
            pairs, before = kept_pairs(
                values_ptr, bits_ptr, offs_n, mask_n, word, WORDS, before, False, BLOCK_K, WORD, False
            )  # fmt: skip
            w = tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)).reshape(BLOCK_N, BLOCK_K)
        else:
            w = tl.load(values_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :])  # [BLOCK_N, BLOCK_K]
        x = tl.load(x_ptr + offs_m[None, :] * K + offs_k[:, None], mask=(offs_m < M)[None, :], other=0.0)
        acc = tl.dot(w.to(tl.bfloat16, bitcast=True), x, acc)
    tl.store(out_ptr + offs_m[None, :] * N + offs_n[:, None], acc.to(tl.bfloat16), mask=(offs_m < M)[None, :])


def climb(rung: str, arch: int) -> dict[str, Any]:
    """Compiles a rung and counts its main loop.

    Args:
        rung: A key of :data:`RUNGS` or :data:`KEPT_RUNGS`.
        arch: Compute capability, as 90.
    """
    if rung in RUNGS:
        kernel, tile, how, children, more = _rung, TILE, RUNGS[rung], 2, {}
        types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "plane_ptr": "*u8", "out_ptr": "*bf16"}
    else:
        kernel, tile, how, children, more = _kept_rung, KEPT_TILE, KEPT_RUNGS[rung], 1, {"WORD": WORD}
        types = {"x_ptr": "*bf16", "values_ptr": "*i16", "bits_ptr": "*i32", "starts_ptr": "*i32", "out_ptr": "*bf16"}
    constants = {"RUNG": rung, **dict(zip(("BLOCK_N", "BLOCK_K", "BLOCK_M"), tile, strict=True)), **more}
    signature = {**types, **dict.fromkeys("MNK", "i32"), **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in types or name in "NK"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    warps = 4
    options = {"num_warps": warps, "num_stages": 4}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    code, resources = disassemble(compiled.asm["cubin"])
    facts = sass.analyse(code, resources, set(), True)
    instructions, labels = sass.read_sass(code)
    loop = [instructions[i] for i in sass.main_loop(instructions, labels)]
    weights = tile[0] * tile[1]
    shared = sum(i.named("LDS", "STS", "LDSM", "STSM") for i in loop)
    counts = [round(count * warps * 32 / weights, 2) for count in (len(loop), shared)]
    return _row(rung, how, arch, facts, counts[0], counts[1], children)


def direct(arch: int, rung: str) -> dict[str, Any]:
    """Counts the main loop of a kernel that is shipped for few rows."""
    (launch,) = launches([_CASES[rung]], [arch])
    row = compile_launch(launch)
    if row["loop_shared"]:
        raise RuntimeError(f"fpe lab ladder: {row['kernel']} has instructions on shared memory in its loop")
    return _row(rung, SHIPPED[rung], arch, row, row["instructions_per_weight"], 0.0, _CASES[rung].alpha or 1)


def _row(
    rung: str, how: str, arch: int, facts: dict[str, Any], instructions: float, shared: float, children: int = 2
) -> dict[str, Any]:
    """A row of the ladder; the counts are of a weight, or of a position of kept values."""
    return {
        "children": children,
        "rung": rung,
        "how": how,
        "arch": arch,
        "registers": facts["registers"],
        "spilled": facts["spill_stores"] + facts["spill_loads"],
        "instructions_per_weight": instructions,
        "shared_per_weight": shared,
    }


def run(architectures: tuple[int, ...] = (80, 90)) -> Results:
    """Climbs every rung on every architecture."""
    if interpreting():
        raise RuntimeError("fpe lab ladder: kernels are interpreted where TRITON_INTERPRET=1; unset it")
    rows = [
        row
        for arch in architectures
        for row in (
            *(climb(rung, arch) for rung in (*RUNGS, *KEPT_RUNGS)),
            *(direct(arch, rung) for rung in SHIPPED),
        )
    ]
    settings = {"triton": triton.__version__, "tile": list(TILE), "kept_tile": list(KEPT_TILE)}
    return Results("lab-ladder", settings, rows)
