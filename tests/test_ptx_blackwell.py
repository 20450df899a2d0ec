"""What sm_100 adds, on small programs written by hand: each class of mistakes caught, its legal neighbour passed."""

import numpy as np
import pytest
from ptx_text import changed, fault, run

from fpe.bench.lab.ptx.descriptors import Matrix
from fpe.bench.lab.ptx.machine import UnknownOpcode
from fpe.bench.lab.ptx.memory import Fault

A, B = Matrix(0, 128, 256, 0, 0), Matrix(2048, 128, 256, 0, 0)  # [64, 16] and [16, 16], not swizzled
COMMON = 1 << 46 | 256 // 16 << 32 | 128 // 16 << 16
SHAPE = 1 << 4 | 1 << 7 | 1 << 10 | 16 // 8 << 17 | 64 // 16 << 24
D = "{%r21, %r22, %r23, %r24, %r25, %r26, %r27, %r28}"
MMA = "@%p4 tcgen05.mma.cta_group::1.kind::f16 [%r3], %rd8, %rd9, %r9, %p5;"
COMMIT = "@%p4 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r12];"
STEPS = {
    # Shared memory: the operands, a barrier at 4096, the address of tensor memory at 4112.
    "address": """
	mul.wide.u32 %rd3, %r0, 32;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd7, %rd2, %rd3;
	shl.b32 %r1, %r0, 5;
	mov.b32 %r12, 4096;
	shr.u32 %r4, %r0, 5;
	setp.eq.b32 %p1, %r4, 0;
	setp.eq.b32 %p2, %r0, 0;""",
    "alloc": "mov.b32 %r2, 4112; @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], 32;",
    "found": "bar.sync 0; ld.shared.b32 %r3, [4112]; bar.sync 0;",
    "relinquish": "@%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;",
    "lanes": "shl.b32 %r5, %r4, 21; add.s32 %r6, %r3, %r5;",
    "value": "mov.b32 %r7, 0f40A00000;",
    "st": "tcgen05.st.sync.aligned.16x32bx2.x8.b32 [%r6], 8, {%r7, %r7, %r7, %r7, %r7, %r7, %r7, %r7};",
    "wait_st": "tcgen05.wait::st.sync.aligned;",
    "init": "@%p2 mbarrier.init.shared::cta.b64 [%r12], 1;",
    "fill": """
	ld.global.v4.b32 {%r31, %r32, %r33, %r34}, [%rd4];
	ld.global.v4.b32 {%r35, %r36, %r37, %r38}, [%rd4+16];
	st.shared.v4.b32 [%r1], {%r31, %r32, %r33, %r34};
	st.shared.v4.b32 [%r1+16], {%r35, %r36, %r37, %r38};""",
    "proxy": "fence.proxy.async.shared::cta;",
    "barrier": "bar.sync 0;",
    "descriptors": f"""
	mov.b64 %rd8, {COMMON};
	mov.b64 %rd9, {COMMON | 2048 // 16};
	mov.b32 %r9, {SHAPE};
	mov.pred %p5, -1;""",
    "enter": "@!%p1 bra AFTER;\n\telect.sync %r8|%p4, -1;",
    "mma": MMA,
    "commit": COMMIT,
    "leave": "AFTER:",
    "parity": "mov.b32 %r10, 0;",
    "wait": """{
	.reg .pred complete;
	again:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r12], %r10;
	@!complete bra again;
	}""",
    "ld": f"tcgen05.ld.sync.aligned.16x32bx2.x8.b32 {D}, [%r6], 8;",
    "wait_ld": "tcgen05.wait::ld.sync.aligned;",
    "store": """
	st.global.v4.b32 [%rd7], {%r21, %r22, %r23, %r24};
	st.global.v4.b32 [%rd7+16], {%r25, %r26, %r27, %r28};""",
    "close": "bar.sync 0;",
    "inval": "@%p2 mbarrier.inval.shared::cta.b64 [%r12];",
    "dealloc": "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;",
}


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ``[64, 16]``, B ``[16, 16]`` and the program's input."""
    random = np.random.default_rng(0)
    a, b = random.integers(-3, 4, (64, 16)), random.integers(-3, 4, (16, 16))
    given = np.zeros(4096, np.uint8)
    given.view(np.uint16)[A.addresses(64, 16, 2, False) // 2] = bf16(a)
    given.view(np.uint16)[B.addresses(16, 16, 2, False) // 2] = bf16(b)
    return a, b, given


def truth() -> np.ndarray:
    a, b, _ = operands()
    return a @ b.T + 5


def result(asynchronous: str = "refuse", **changes: str) -> np.ndarray:
    """D ``[64, 16]``: 16 rows a warp, the second half of its lanes having the second half of the columns."""
    out = np.zeros((4, 2, 16, 8), np.float32)
    run(changed(STEPS, **changes), operands()[2], out, 100, asynchronous=asynchronous)
    return out.transpose(0, 2, 1, 3).reshape(64, 16)


def message(**changes: str) -> str:
    """What a changed program ends with, in words."""
    with pytest.raises(Fault) as found:
        result(**changes)
    return str(found.value)


def kind(**changes: str) -> str:
    return fault(changed(STEPS, **changes), operands()[2], np.zeros((128, 8), np.float32), 100)


@pytest.mark.parametrize("asynchronous", ["refuse", "keep", "late"])
def test_a_legal_program_is_right_in_every_mode(asynchronous: str) -> None:
    np.testing.assert_array_equal(result(asynchronous), truth())
    np.testing.assert_array_equal(result(asynchronous, before_enter="mov.pred %p5, 0;"), truth() - 5)
    np.testing.assert_array_equal(result(asynchronous, mma=MMA + MMA), 2 * truth() - 5)


def test_an_accumulator_taken_before_its_barrier() -> None:
    """Read or stored before the wait; or the wait is for another phase, or for what another thread has issued."""
    assert kind(wait="") == "tensor memory"
    assert kind(parity="mov.b32 %r10, 1;") == "tensor memory"
    other = "elect.sync %r8|%p4, -1;\n\tsetp.eq.b32 %p4, %r0, 1;" + COMMIT
    assert kind(commit=other) == "tensor memory"
    assert kind(before_wait=STEPS["st"] + STEPS["wait_st"]) == "tensor memory"
    assert kind(after_wait=STEPS["st"] + STEPS["wait_st"]) == "none"
    np.testing.assert_array_equal(result("keep", wait="", inval=""), truth())
    np.testing.assert_array_equal(result("late", wait="", inval=""), np.full((64, 16), 5))


def test_a_barrier_that_nothing_completes() -> None:
    assert kind(commit="") == "mbarrier"
    assert kind(init="@%p2 mbarrier.init.shared::cta.b64 [%r12], 2;") == "mbarrier"
    assert kind(init="@%p2 mbarrier.init.shared::cta.b64 [%r12], 2;", commit=COMMIT + COMMIT) == "none"


def test_a_barrier_made_or_ended_wrongly() -> None:
    assert kind(init="") == "uninitialised shared memory"
    assert kind(init=STEPS["init"] * 2) == "mbarrier"
    assert kind(init=STEPS["init"] + STEPS["inval"] + STEPS["init"]) == "none"
    assert kind(before_parity="bar.sync 0;" + STEPS["inval"]) == "mbarrier"
    assert kind(after_wait="bar.sync 0;" + STEPS["inval"], inval="") == "none"
    assert kind(close="") == "race"  # ended while others may still look at it


def test_phases_alternate() -> None:
    """A second product on the same barrier is waited for with the other parity."""
    again = "@%p1 elect.sync %r8|%p4, -1;\n\tand.pred %p4, %p4, %p1;\n\tbar.sync 0;" + MMA + COMMIT
    after = {"before_enter": "mov.pred %p4, 0;", "after_wait": again}
    second = STEPS["wait"].replace("%r10", "%r11").replace("again", "more").replace("complete,", "complete,")
    np.testing.assert_array_equal(result(**after, before_ld="mov.b32 %r11, 1;" + second), 2 * truth() - 5)
    assert kind(**after, before_ld="mov.b32 %r11, 0;" + second) == "tensor memory"


def test_a_load_used_before_its_wait() -> None:
    """A copy is no use: the assembler keeps both in one register. What uses the copy is."""
    assert kind(wait_ld="") == "register in use"
    assert kind(before_wait_ld="add.s32 %r50, %r21, 1;") == "register in use"
    assert kind(before_wait_ld="mov.b32 %r21, 0;") == "register in use"
    copy = "mov.b64 %rd20, {%r21, %r22};"
    assert kind(before_wait_ld=copy) == "none"
    assert kind(before_wait_ld=copy + "add.s64 %rd21, %rd20, 1;") == "register in use"
    assert kind(before_wait_ld=copy, after_wait_ld="add.s64 %rd21, %rd20, 1;") == "none"
    early = {"before_wait_ld": STEPS["store"], "store": "", "before_wait": "mov.b32 %r21, 0;"}
    registers = "".join(f"mov.b32 %r{i}, 0;" for i in range(21, 29))
    np.testing.assert_array_equal(result("late", **early | {"before_wait": registers}), np.zeros((64, 16)))
    np.testing.assert_array_equal(result("keep", **early), truth())


def test_cells_loaded_and_stored_without_a_wait() -> None:
    assert "accumulated while a store" in message(wait_st="")
    assert kind(before_wait_ld=STEPS["st"]) == "tensor memory"
    assert kind(after_wait_ld=STEPS["st"] + STEPS["wait_st"]) == "none"
    assert kind(before_wait_st=STEPS["ld"] + STEPS["wait_ld"]) == "tensor memory"
    assert kind(after_wait_st=STEPS["ld"] + STEPS["wait_ld"]) == "none"


def test_a_barrier_missing_between_warps_and_a_product() -> None:
    assert kind(before_descriptors=STEPS["st"] + STEPS["wait_st"]) == "race"
    assert kind(before_descriptors=STEPS["ld"] + STEPS["wait_ld"]) == "race"
    assert kind(before_descriptors=STEPS["ld"] + STEPS["wait_ld"] + "bar.sync 0;") == "none"


def test_shared_memory_of_a_product() -> None:
    """A fence of the proxies before it, nothing written till its barrier."""
    assert kind(proxy="") == "proxy fence"
    assert kind(proxy="", after_barrier=STEPS["proxy"]) == "none"
    assert kind(before_parity=STEPS["fill"]) == "asynchronous copy"
    assert kind(after_wait=STEPS["fill"]) == "none"
    assert kind(before_parity="@%p2 st.shared.b32 [0], %r0;") == "asynchronous copy"  # operand A
    assert kind(before_parity="@%p2 st.shared.b32 [2048], %r0;") == "asynchronous copy"  # operand B
    spoil = STEPS["fill"].replace("st.shared.v4.b32 [%r1], {%r31", "st.shared.v4.b32 [%r1], {%r0")
    np.testing.assert_array_equal(result("keep", before_parity=spoil), truth())
    assert (result("late", before_parity=spoil) != truth()).any()


def test_allocation() -> None:
    assert "has not given back all columns" in message(dealloc="")
    assert "were not allocated so" in message(dealloc=STEPS["dealloc"].replace("32;", "64;"))
    odd = {step: STEPS[step].replace("32;", "48;") for step in ("alloc", "dealloc")}
    assert "no power of 2" in message(**odd)
    assert "can never be had" in message(after_relinquish="bar.sync 0;" + STEPS["alloc"])
    outside = "add.s32 %r51, %r6, 24;" + STEPS["st"].replace("%r6", "%r51") + STEPS["wait_st"]
    assert "columns 24 to 39 are not all allocated" in message(after_wait_ld=outside)


def test_cells_of_others_or_of_nobody() -> None:
    assert "may begin" in message(lanes="mov.b32 %r6, %r3;")  # all warps at the first one's lanes
    assert "nobody has written" in message(st="", wait_st="")  # accumulates onto it
    assert kind(st="", wait_st="", before_enter="mov.pred %p5, 0;") == "none"
    beside = "add.s32 %r51, %r6, 16;" + STEPS["ld"].replace("%r6", "%r51")
    assert "nobody has written" in message(after_wait_ld=beside)
    some = "setp.lt.u32 %p6, %r0, 16;\n@%p6 "
    assert kind(ld=some + STEPS["ld"]) == "divergence"
    assert kind(ld=STEPS["ld"].replace("%r6", "%r0")) == "divergence"
    assert kind(mma=MMA.replace("@%p4 ", "")) == "divergence"


def test_two_warps_at_the_same_lanes() -> None:
    """Warp 4 reaches what warp 0 does: between a store of one and a load of the other stands a barrier."""
    body = f"""
	mov.b32 %r2, 0;
	shr.u32 %r4, %r0, 5;
	setp.eq.b32 %p1, %r4, 0;
	setp.eq.b32 %p2, %r4, 4;
	@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], 32;
	bar.sync 0;
	ld.shared.b32 %r3, [0];
	@%p2 tcgen05.st.sync.aligned.16x32bx2.x8.b32 [%r3], 8, {{%r0, %r0, %r0, %r0, %r0, %r0, %r0, %r0}};
	@%p2 tcgen05.wait::st.sync.aligned;
	BETWEEN
	@%p1 tcgen05.ld.sync.aligned.16x32bx2.x8.b32 {D}, [%r3], 8;
	@%p1 tcgen05.wait::ld.sync.aligned;
	@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;"""
    given, out = np.zeros(4, np.uint8), np.zeros(4, np.uint8)
    assert fault(body.replace("BETWEEN", ""), given, out, 100, threads=256) == "race"
    assert fault(body.replace("BETWEEN", "bar.sync 0;"), given, out, 100, threads=256) == "none"


def test_threads_that_wait_for_each_other() -> None:
    """Those that wait stand aside till the others have come; where nobody can go on, it ends."""
    first = f"""
	@%p1 bra ISSUE;
	WAIT:
	{STEPS["wait"]}
	bra.uni DONE;
	ISSUE:
	elect.sync %r8|%p4, -1;
	{MMA}
	{COMMIT}
	bra.uni WAIT;
	DONE:"""
    moved = dict.fromkeys(("enter", "mma", "commit", "leave", "wait"), "")
    np.testing.assert_array_equal(result(**moved | {"wait": "mov.b32 %r10, 0;" + first}), truth())
    apart = "@%p1 bra OTHERS;\n" + STEPS["wait"] + "\nOTHERS:\nbar.sync 0;"
    assert kind(commit="", wait=apart) in ("mbarrier", "divergence")
    assert kind(wait=apart) == "none"


@pytest.mark.parametrize(
    "change",
    [
        f"mov.b64 %rd9, {COMMON | 2048 // 16 + 1};",
        f"mov.b64 %rd9, {COMMON + (1 << 16) | 2048 // 16};",
        f"mov.b64 %rd9, {COMMON | 2048 // 16 | 2 << 61};",
        f"mov.b32 %r9, {SHAPE | 1 << 16};",
        f"mov.b32 %r9, {SHAPE ^ 1 << 10};",
    ],
    ids=["start", "leading", "swizzle", "transposed", "type"],
)
def test_a_wrong_descriptor_is_seen(change: str) -> None:
    assert (result(before_enter=change) != truth()).any()


def test_operand_a_in_tensor_memory() -> None:
    """64 rows of 16 numbers of 16 bits: 8 columns behind the accumulator's 16, four for each half of a warp's lanes."""
    a, _, given = operands()
    words = bf16(a).view(np.uint32).reshape(4, 16, 2, 4).transpose(0, 2, 1, 3)  # warp, half, lane, register
    load = """
	add.s64 %rd10, %rd1, 4096;
	mul.wide.u32 %rd11, %r0, 16;
	add.s64 %rd12, %rd10, %rd11;
	ld.global.v4.b32 {%r41, %r42, %r43, %r44}, [%rd12];
	add.s32 %r45, %r6, 16;
	tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r45], 4, {%r41, %r42, %r43, %r44};"""
    given = np.concatenate([given, np.ascontiguousarray(words).reshape(-1).view(np.uint8)])
    steps = {"after_st": load, "mma": MMA.replace("%rd8", "[%r46]"), "before_mma": "add.s32 %r46, %r3, 16;"}
    out = np.zeros((4, 2, 16, 8), np.float32)
    body = changed(STEPS, **steps)
    run(body, given, out, 100)
    np.testing.assert_array_equal(out.transpose(0, 2, 1, 3).reshape(64, 16), truth())
    early = changed(STEPS, **steps, before_parity=load[load.index("add.s32") :])
    assert fault(early, given, out, 100) == "tensor memory"  # overwritten while the product reads it
    unordered = changed(STEPS, **steps | {"after_st": "", "before_descriptors": load + STEPS["wait_st"]})
    assert fault(unordered, given, out, 100) == "race"
    running = changed(STEPS, **steps | {"after_st": "", "before_barrier": load})
    assert fault(running, given, out, 100) == "tensor memory"


def test_128_rows_of_tf32() -> None:
    """All lanes, a lane of memory for a lane of a warp, and the low 13 bits of an operand ignored."""
    random = np.random.default_rng(1)
    a, b = random.integers(-3, 4, (128, 8)).astype(np.float32), random.integers(-3, 4, (16, 8)).astype(np.float32)
    given = np.zeros(8192, np.uint8)
    given.view(np.uint32)[A.addresses(128, 8, 4, False) // 4] = a.view(np.uint32) | 0x1FFF
    given.view(np.uint32)[4096 // 4 + A.addresses(16, 8, 4, False) // 4] = b.view(np.uint32) | 0x1FFF
    shape = 1 << 4 | 2 << 7 | 2 << 10 | 16 // 8 << 17 | 128 // 16 << 24
    body = changed(
        STEPS,
        address=STEPS["address"].replace("%r0, 32", "%r0, 64").replace("%r0, 5;", "%r0, 6;", 1).replace("4096", "8192"),
        value="mov.b32 %r7, 0f00000000;",
        st="tcgen05.st.sync.aligned.32x32b.x16.b32 [%r6], {" + ", ".join(["%r7"] * 16) + "};",
        fill=STEPS["fill"]
        + STEPS["fill"]
        .replace("%rd4+16]", "%rd4+48]")
        .replace("%rd4]", "%rd4+32]")
        .replace("%r1+16]", "%r1+48]")
        .replace("%r1]", "%r1+32]"),
        descriptors=STEPS["descriptors"].replace(str(COMMON | 128), str(COMMON | 256)).replace(str(SHAPE), str(shape)),
        mma=MMA.replace("f16", "tf32"),
        ld="tcgen05.ld.sync.aligned.32x32b.x16.b32 {" + ", ".join(f"%r{60 + i}" for i in range(16)) + "}, [%r6];",
        store="".join(
            f"st.global.v4.b32 [%rd7+{16 * i}], {{%r{60 + 4 * i}, %r{61 + 4 * i}, %r{62 + 4 * i}, %r{63 + 4 * i}}};"
            for i in range(4)
        ),
    ).replace("4112", "8208")
    out = np.zeros((128, 16), np.float32)
    run(body, given, out, 100, shared=9000)
    np.testing.assert_array_equal(out, a @ b.T)


def test_what_is_not_known_raises_by_its_full_opcode() -> None:
    with pytest.raises(UnknownOpcode, match=r"tcgen05.mma.cta_group::2.kind::f16"):
        result(mma=MMA.replace("group::1", "group::2"))
    with pytest.raises(UnknownOpcode, match=r"tcgen05.ld.sync.aligned.16x64b.x8.b32"):
        result(ld=STEPS["ld"].replace("16x32bx2", "16x64b"))
    assert "descriptor" in message(before_enter=f"mov.b32 %r9, {SHAPE | 4};")
    assert "descriptor" in message(before_enter=f"mov.b64 %rd9, {COMMON | 1 << 14};")


def test_elect_takes_the_first_of_each_warps_threads() -> None:
    body = """
	mul.wide.u32 %rd3, %r0, 4;
	add.s64 %rd4, %rd2, %rd3;
	mov.b32 %r3, 99;
	mov.pred %p2, 0;
	and.b32 %r1, %r0, 31;
	setp.gt.u32 %p1, %r1, 2;
	@%p1 elect.sync %r3|%p2, -1;
	selp.b32 %r4, 1000, 0, %p2;
	add.s32 %r4, %r4, %r3;
	st.global.b32 [%rd4], %r4;"""
    out = np.zeros((2, 32), np.int32)
    run(body, np.zeros(4, np.uint8), out, 100, threads=64)
    np.testing.assert_array_equal(out, [[99] * 3 + [1003] + [3] * 28] * 2)
