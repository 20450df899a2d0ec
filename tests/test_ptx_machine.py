"""The machine that executes PTX: every check catches its mistake and passes the legal variant; divergence; memory."""

import numpy as np
import pytest
from ptx_text import THREADS, run_on_words

from fpe.bench.lab.ptx.machine import UnknownOpcode
from fpe.bench.lab.ptx.memory import Fault

LOAD = "ld.global.b32 %r10, [%rd3];"
STORE = "st.global.b32 [%rd4], %r10;"
PUT = "st.shared.b32 [%r4], %r0;"
COPY = "cp.async.ca.shared.global [%r4], [%rd3], 4, 4;"
GET_OTHER = "ld.shared.b32 %r10, [%r5];"
LOWER_HALF = "setp.lt.u32 %p1, %r0, 32;"
BARRIER = "bar.sync 0;"
OWN_PROGRAM = "mul.wide.u32 %rd5, %r1, 256; add.s64 %rd4, %rd4, %rd5;"

OF_OTHER_IN_OUTPUT = (
    "xor.b32 %r20, %r2, 128; cvt.u64.u32 %rd8, %r20; add.s64 %rd8, %rd2, %rd8; ld.global.b32 %r10, [%rd8];"
)
WAIT = "cp.async.wait_group 0;"
COMMIT = "cp.async.commit_group;"
GET = "ld.shared.b32 %r10, [%r4];"
MATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r3];"
SPARSE = (
    "mov.b32 %r20, 0; mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
    "{%r10, %r11, %r12, %r13}, {%r20, %r20, %r20, %r20}, {%r20, %r20, %r20, %r20}, {%r20, %r20, %r20, %r20}, %r21, 0;"
)

MISTAKES = {
    # What happens: its kind, a body that does it, and a body that does the same lawfully.
    "global bounds": (
        "bounds",
        "ld.global.b32 %r10, [%rd3+4];",
        "setp.lt.u32 %p1, %r0, 63; mov.b32 %r10, 0; @%p1 ld.global.b32 %r10, [%rd3+4];",
    ),
    "before a tensor": ("bounds", "ld.global.b32 %r10, [%rd1+-4];", "ld.global.b32 %r10, [%rd1+0];"),
    "far away": ("bounds", "mov.b64 %rd9, 4096; ld.global.b32 %r10, [%rd9];", LOAD),
    "global bounds of a prefetch": (
        "bounds",
        "prefetch.global.L2 [%rd3+4];",
        "setp.lt.u32 %p1, %r0, 63; @%p1 prefetch.global.L2 [%rd3+4];",
    ),
    "shared bounds": ("bounds", "st.shared.b32 [%r4+1020], %r0;", "st.shared.b32 [%r4+768], %r0;"),
    "global alignment": (
        "alignment",
        "ld.global.v2.b32 {%r10, %r11}, [%rd1+4];",
        "ld.global.v2.b32 {%r10, %r11}, [%rd1+8];",
    ),
    "shared alignment": ("alignment", "st.shared.b32 [%r4+2], %r0;", "st.shared.b16 [%r4+2], %rs1;"),
    "uninitialised shared memory": ("uninitialised shared memory", GET, f"{PUT} {GET}"),
    "half a word of shared memory": (
        "uninitialised shared memory",
        f"st.shared.b16 [%r4], %rs1; {GET}",
        "st.shared.b16 [%r4], %rs1; ld.shared.b16 %rs2, [%r4];",
    ),
    "uninitialised register": (
        "uninitialised register",
        "add.s32 %r10, %r20, 1;",
        "mov.b32 %r20, 1; add.s32 %r10, %r20, 1;",
    ),
    "register of half the threads": (
        "uninitialised register",
        f"{LOWER_HALF} @%p1 mov.b32 %r20, 1; add.s32 %r10, %r20, 1;",
        f"{LOWER_HALF} @%p1 mov.b32 %r20, 1; @!%p1 mov.b32 %r20, 2; add.s32 %r10, %r20, 1;",
    ),
    "uninitialised global memory": (
        "uninitialised global memory",
        "ld.global.b32 %r10, [%rd4];",
        "st.global.b32 [%rd4], %r0; ld.global.b32 %r10, [%rd4];",
    ),
    "read after another warp's write": ("race", f"{PUT} {GET_OTHER}", f"{PUT} {BARRIER} {GET_OTHER}"),
    "write after another warp's read": (
        "race",
        f"{PUT} {BARRIER} {GET_OTHER} {PUT}",
        f"{PUT} {BARRIER} {GET_OTHER} {BARRIER} {PUT}",
    ),
    "write after another warp's write": (
        "race",
        f"{PUT} st.shared.b32 [%r5], %r0;",
        f"{PUT} {BARRIER} st.shared.b32 [%r5], %r0;",
    ),
    "two threads of a store": ("race", "st.shared.b32 [%r3], %r0;", "st.shared.b32 [%r3], %r1;"),
    "global memory between warps": (
        "race",
        f"st.global.b32 [%rd4], %r0; {OF_OTHER_IN_OUTPUT}",
        f"st.global.b32 [%rd4], %r0; {BARRIER} {OF_OTHER_IN_OUTPUT}",
    ),
    "copy read before the wait": (
        "asynchronous copy",
        f"{COPY} {COMMIT} {GET}",
        f"{COPY} {COMMIT} {WAIT} {GET}",
    ),
    "copy of the group that may still fly": (
        "asynchronous copy",
        f"{COPY} {COMMIT} cp.async.wait_group 1; {GET}",
        f"{COPY} {COMMIT} {COMMIT} cp.async.wait_group 1; {GET}",
    ),
    "copy that no group has": ("asynchronous copy", f"{COPY} {WAIT} {GET}", f"{COPY} cp.async.wait_all; {GET}"),
    "copy of another warp without a barrier": (
        "race",
        f"{COPY} {COMMIT} {WAIT} {GET_OTHER}",
        f"{COPY} {COMMIT} {WAIT} {BARRIER} {GET_OTHER}",
    ),
    "barrier before the wait": (
        "race",
        f"{COPY} {COMMIT} {BARRIER} {WAIT} {GET_OTHER}",
        f"{COPY} {COMMIT} {WAIT} {BARRIER} {GET_OTHER}",
    ),
    "store under a copy": ("asynchronous copy", f"{COPY} {PUT}", f"{COPY} cp.async.wait_all; {PUT}"),
    "copy over what another warp reads": (
        "race",
        f"{PUT} {BARRIER} {GET_OTHER} {COPY}",
        f"{PUT} {BARRIER} {GET_OTHER} {BARRIER} {COPY}",
    ),
    "barrier that some miss": (
        "divergence",
        f"{LOWER_HALF} @%p1 {BARRIER}",
        f"{LOWER_HALF} @%p1 mov.b32 %r20, 1; {BARRIER}",
    ),
    "half a warp": (
        "divergence",
        f"setp.lt.u32 %p1, %r0, 16; {PUT} @%p1 {MATRIX}",
        f"{LOWER_HALF} {PUT} {BARRIER} @%p1 {MATRIX}",
    ),
    "metadata out of order": (
        "metadata",
        f"mov.b32 %r21, 0x44444440; {SPARSE}",
        f"mov.b32 %r21, 0x44444444; {SPARSE}",
    ),
    "no end": ("no end", "again: add.s32 %r0, %r0, 0; bra.uni again;", "bra.uni once; once: add.s32 %r0, %r0, 0;"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught_and_its_legal_variant_passes(name: str) -> None:
    kind, wrong, right = MISTAKES[name]
    with pytest.raises(Fault) as caught:
        run_on_words(_lines("mov.b16 %rs1, 7; " + wrong))
    assert caught.value.kind == kind
    run_on_words(_lines("mov.b16 %rs1, 7; " + right))


def _lines(body: str) -> str:
    return body.replace("; ", ";\n").replace(": ", ":\n")


def test_programs_must_not_write_one_place() -> None:
    with pytest.raises(Fault, match=r"race: warp 0 of program 1 writes byte 0 of out.*warp 0 of program 0"):
        run_on_words(f"mov.b32 %r10, 7;\n{STORE}", ctas=2)
    got = run_on_words(_lines(f"mov.b32 %r10, 7; {OWN_PROGRAM} {STORE}"), ctas=2, out=2 * THREADS)
    assert (got == 7).all()


@pytest.mark.parametrize("writer", (0, 1))
def test_a_program_must_not_read_what_another_writes(writer: int) -> None:
    """Whichever is executed first here: the threads that branch come second."""
    body = _lines(
        f"setp.eq.u32 %p1, %r1, {writer}; mov.b32 %r10, 7; @%p1 bra write; ld.global.b32 %r11, [%rd3]; bra.uni done; "
        "write: st.global.b32 [%rd3], %r10; done: add.s32 %r10, %r10, 0;"
    )
    with pytest.raises(Fault, match="race"):
        run_on_words(body, ctas=2)
    run_on_words(body, ctas=1)
    run_on_words(
        body.replace("write: st.global", "write: ld.global").replace("st.global.b32 [%rd3], %r10", LOAD[:-1]), ctas=2
    )


def test_only_elements_of_a_strided_tensor_may_be_touched() -> None:
    words = np.arange(2 * THREADS, dtype=np.uint32)
    body = _lines("mul.wide.u32 %rd5, %r0, 8; add.s64 %rd5, %rd1, %rd5; ld.global.b32 %r10, [%rd5]; " + STORE)
    assert (run_on_words(body, words, every=2) == words[::2]).all()
    with pytest.raises(Fault, match=r"bounds.*byte 4 of in"):
        run_on_words(body.replace("[%rd5]", "[%rd5+4]"), words, every=2)


def test_an_unknown_instruction_is_named_in_full() -> None:
    with pytest.raises(UnknownOpcode, match=r"^add\.rz\.sat\.f32$"):
        run_on_words("add.rz.sat.f32 %r10, %r0, %r0;")


def test_a_fault_says_where() -> None:
    with pytest.raises(Fault, match=r"bounds: access of 4 bytes at byte 256 of in \(256 bytes\); ld.global.b32 of "):
        run_on_words("ld.global.b32 %r10, [%rd3+4];")


def test_divergent_loops_and_branches_meet_again() -> None:
    """Each thread adds 1 .. its number, then takes one of two ways; a barrier behind them is reached by all."""
    body = _lines(
        "mov.b32 %r10, 0; mov.b32 %r11, 0; loop: setp.ge.u32 %p1, %r11, %r0; @%p1 bra out; add.s32 %r11, %r11, 1; "
        "add.s32 %r10, %r10, %r11; bra.uni loop; out: and.b32 %r12, %r0, 1; setp.eq.s32 %p2, %r12, 0; @%p2 bra even; "
        "add.s32 %r10, %r10, 1000; bra.uni met; even: sub.s32 %r10, %r10, 7; met: bar.sync 0; " + STORE
    )
    thread = np.arange(THREADS)
    want = thread * (thread + 1) // 2 + np.where(thread % 2, 1000, -7)
    assert (run_on_words(body).view(np.int32) == want).all()


def test_threads_that_return_early_are_not_waited_for() -> None:
    got = run_on_words(_lines("setp.ge.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0; mov.b32 %r10, 5; " + STORE))
    assert (got[:32] == 5).all() and (got[32:] == 0xDEADBEEF).all()


def test_registers_and_labels_of_a_block_are_its_own() -> None:
    body = (
        _lines("mov.b32 %r10, 0;")
        + 2
        * (
            "\n{\n.reg .pred more;\n.reg .b32 count;\nmov.b32 count, 0;\nagain:\nadd.s32 count, count, 1;\n"
            "add.s32 %r10, %r10, 1;\nsetp.lt.s32 more, count, 3;\n@more bra.uni again;\n}\n"
        )
        + STORE
    )
    assert (run_on_words(body) == 6).all()


def test_what_the_compiler_leaves_undefined_is_poison() -> None:
    """Packed beside a value it may be ignored; looked at, it is NaN."""
    body = "mov.b64 %rd9, {%r0, %r35}; mov.b64 {%r10, %r11}, %rd9; prmt.b32 %r12, %r11, %r35, 0x3210; " + STORE
    assert (run_on_words(_lines(body)) == np.arange(THREADS)).all()
    assert (run_on_words(_lines(body.replace("{%r10, %r11}", "{%r11, %r10}"))) == 0xFFFFFFFF).all()
    with pytest.raises(Fault, match="uninitialised register"):
        run_on_words(_lines(body.replace("0x3210", "0x3214")))


def test_copies_fill_with_zeros_what_they_do_not_take() -> None:
    """With a size of zero the source is not touched, wherever it points."""
    body = _lines(
        "shl.b32 %r20, %r0, 3; add.s32 %r20, %r3, %r20; and.b32 %r21, %r0, 1; shl.b32 %r21, %r21, 3; "
        "and.b32 %r22, %r0, 3; "
        "setp.eq.s32 %p1, %r22, 3; selp.b32 %r21, 4, %r21, %p1; setp.eq.s32 %p2, %r21, 0; mul.wide.u32 %rd6, %r0, 8; "
        "add.s64 %rd6, %rd1, %rd6; selp.b64 %rd6, 64, %rd6, %p2; "
        "cp.async.ca.shared.global [%r20 + 0], [%rd6 + 0], 0x8, %r21; cp.async.wait_all; "
        "ld.shared.v2.b32 {%r10, %r11}, [%r20]; mul.wide.u32 %rd7, %r0, 8; add.s64 %rd7, %rd2, %rd7; "
        "st.global.v2.b32 [%rd7], {%r10, %r11};"
    )
    words = np.arange(1, 2 * THREADS + 1, dtype=np.uint32)
    got = run_on_words(body, words, out=2 * THREADS).reshape(-1, 2)
    taken = np.array([0, 2, 0, 1])[np.arange(THREADS) % 4]
    assert (got == np.where(np.arange(2) < taken[:, None], words.reshape(-1, 2), 0)).all()


def test_bytes_are_extended_and_cut_as_the_type_says() -> None:
    words = np.full(THREADS, 0x8081FF7F, np.uint32)
    loads = "ld.global.b8 %rs1, [%rd3+3]; ld.global.s8 %rs2, [%rd3+2]; mov.b32 %r10, {%rs1, %rs2}; "
    assert (run_on_words(_lines(loads + STORE), words) == 0xFF810080).all()
    stores = (
        "mov.b32 {%rs3, _}, %r10; st.shared.b16 [%r4], %rs3; st.shared.b8 [%r4+1], %rs3; ld.shared.b16 %rs4, [%r4]; "
        "cvt.u32.u16 %r10, %rs4; "
    )
    assert (run_on_words(_lines(f"{LOAD} {stores} {STORE}"), words) == 0x7F7F).all()


@pytest.mark.parametrize(
    ("mode", "amount", "clamp", "source"),
    (
        ("idx", 5, 31, lambda lane: np.full_like(lane, 5)),
        ("bfly", 3, 31, lambda lane: lane ^ 3),
        ("down", 4, 31, lambda lane: np.where(lane + 4 < 32, lane + 4, lane)),
        ("up", 4, 0, lambda lane: np.where(lane >= 4, lane - 4, lane)),
        ("bfly", 3, 0x181F, lambda lane: lane ^ 3),
        ("idx", 2, 0x181F, lambda lane: lane // 8 * 8 + 2),
    ),
)
def test_shuffles(mode: str, amount: int, clamp: int, source: object) -> None:
    got = run_on_words(_lines(f"shfl.sync.{mode}.b32 %r10, %r0, {amount}, {clamp}, -1; " + STORE))
    thread = np.arange(THREADS)
    assert (got == thread // 32 * 32 + source(thread % 32)).all()  # type: ignore[operator]


@pytest.mark.parametrize("transposed", (False, True))
def test_matrices_are_loaded_as_the_isa_says(transposed: bool) -> None:
    """Rows of 16-bit numbers; lane ``l`` gets row ``l / 4``, columns ``2 (l % 4)`` and the next, of each matrix."""
    body = _lines(
        "mul.lo.s32 %r20, %r0, 2; mov.b32 {%rs1, _}, %r20; add.s32 %r21, %r20, 1; mov.b32 {%rs2, _}, %r21; "
        "st.shared.v2.b16 [%r4], {%rs1, %rs2}; bar.sync 0; and.b32 %r22, %r0, 15; shl.b32 %r22, %r22, 4; "
        "add.s32 %r22, %r3, %r22; ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r10, %r11}, [%r22]; "
        "mul.wide.u32 %rd7, %r0, 8; add.s64 %rd7, %rd2, %rd7; st.global.v2.b32 [%rd7], {%r10, %r11};"
    )
    if transposed:
        body = body.replace("x2.shared", "x2.trans.shared")
    got = run_on_words(body, out=2 * THREADS).view(np.uint16).reshape(2, 32, 2, 2)
    matrices = np.arange(128).reshape(2, 8, 8)
    lane = np.arange(32)
    for matrix, part in ((m, p) for m in (0, 1) for p in (0, 1)):
        row, column = lane // 4, 2 * (lane % 4) + part
        want = matrices[matrix][(column, row) if transposed else (row, column)]
        assert (got[:, :, matrix, part] == want).all()
