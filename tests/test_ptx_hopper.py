"""What sm_90 adds, on small programs written by hand: each class of mistakes caught, its legal neighbour passed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ptx_text import changed, fault, run

from fpe.bench.lab.ptx.descriptors import Matrix
from fpe.bench.lab.ptx.fragments import wgmma_a, wgmma_d
from fpe.bench.lab.ptx.hopper import MODES
from fpe.bench.lab.ptx.machine import UnknownOpcode

triton = pytest.importorskip("triton")

A, B = Matrix(0, 128, 256, 0, 0), Matrix(2048, 128, 256, 0, 0)  # [64, 16] and [8, 16], not swizzled
A_DESCRIPTOR, B_DESCRIPTOR = 128 // 16 << 16 | 256 // 16 << 32, 2048 // 16 | 128 // 16 << 16 | 256 // 16 << 32
WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
STEPS = {
    # Input: 4096 bytes for shared memory, then 16 bytes a thread: operand A in registers.
    "address": """
	mul.wide.u32 %rd3, %r0, 32;
	add.s64 %rd4, %rd1, %rd3;
	mul.wide.u32 %rd5, %r0, 16;
	add.s64 %rd6, %rd1, %rd5;
	add.s64 %rd7, %rd2, %rd5;
	shl.b32 %r1, %r0, 5;""",
    "registers": "ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%rd6+4096];",
    "load": """
	ld.global.v4.b32 {%r21, %r22, %r23, %r24}, [%rd4];
	ld.global.v4.b32 {%r25, %r26, %r27, %r28}, [%rd4+16];""",
    "fill": """
	st.shared.v4.b32 [%r1], {%r21, %r22, %r23, %r24};
	st.shared.v4.b32 [%r1+16], {%r25, %r26, %r27, %r28};""",
    "proxy": "fence.proxy.async.shared::cta;",
    "barrier": "bar.sync 0;",
    "zero": "mov.b32 %r31, 0; mov.b32 %r32, 0; mov.b32 %r33, 0; mov.b32 %r34, 0;",
    "descriptors": f"mov.b64 %rd8, {A_DESCRIPTOR}; mov.b64 %rd9, {B_DESCRIPTOR}; mov.pred %p1, -1;",
    "fence": "wgmma.fence.sync.aligned;",
    "multiply": WGMMA + " {%r31, %r32, %r33, %r34}, {%r11, %r12, %r13, %r14}, %rd9, %p1, 1, 1, 0;",
    "commit": "wgmma.commit_group.sync.aligned;",
    "wait": "wgmma.wait_group.sync.aligned 0;",
    "store": "st.global.v4.b32 [%rd7], {%r31, %r32, %r33, %r34};",
}
SHARED_A = WGMMA + " {%r31, %r32, %r33, %r34}, %rd8, %rd9, %p1, 1, 1, 0, 0;"


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ``[64, 16]``, B ``[8, 16]`` and the program's input."""
    random = np.random.default_rng(0)
    a, b = random.integers(-3, 4, (64, 16)), random.integers(-3, 4, (8, 16))
    given = np.zeros(4096 + 2048, np.uint8)
    halves = given.view(np.uint16)
    halves[A.addresses(64, 16, 2, False) // 2] = bf16(a)
    halves[B.addresses(8, 16, 2, False) // 2] = bf16(b)
    rows, columns = wgmma_a(16, 2)
    halves[2048:] = bf16(a[rows, columns]).reshape(-1)
    return a, b, given


def result(asynchronous: str = "refuse", **changes: str) -> np.ndarray:
    """D ``[64, 8]`` of a changed program."""
    out = np.zeros((128, 4), np.float32)
    run(changed(STEPS, **changes), operands()[2], out, 90, asynchronous=asynchronous)
    rows, columns = wgmma_d(8)
    d = np.empty((64, 8), np.float32)
    d[rows, columns] = out
    return d


def truth() -> np.ndarray:
    a, b, _ = operands()
    return a @ b.T


def kind(**changes: str) -> str:
    return fault(changed(STEPS, **changes), operands()[2], np.zeros((128, 4), np.float32), 90)


@pytest.mark.parametrize("asynchronous", ["refuse", "keep", "late"])
@pytest.mark.parametrize("multiply", [STEPS["multiply"], SHARED_A], ids=["registers", "shared"])
def test_a_legal_program_is_right_in_every_mode(asynchronous: str, multiply: str) -> None:
    np.testing.assert_array_equal(result(asynchronous, multiply=multiply), truth())


def test_accumulators_are_added_or_not() -> None:
    once, twice = truth(), 2 * truth()
    np.testing.assert_array_equal(result(multiply=STEPS["multiply"] * 2), twice)
    np.testing.assert_array_equal(result(multiply=STEPS["multiply"] * 2, after_descriptors="mov.pred %p1, 0;"), once)
    ones = "mov.b32 %r31, 0f3F800000; mov.b32 %r32, 0f3F800000; mov.b32 %r33, 0f3F800000; mov.b32 %r34, 0f3F800000;"
    np.testing.assert_array_equal(result(zero=ones), once + 1)


def test_an_accumulator_without_a_value_may_not_be_added() -> None:
    np.testing.assert_array_equal(result(zero="", after_descriptors="mov.pred %p1, 0;"), truth())
    assert kind(zero="") == "uninitialised register"


OVERWRITE = "mov.b32 %r11, 0;"


def test_operand_a_in_registers_overwritten_before_the_wait() -> None:
    """The hardware may read it late: the three modes differ, and only there."""
    assert kind(before_wait=OVERWRITE) == "register in use"
    np.testing.assert_array_equal(result("keep", before_wait=OVERWRITE), truth())
    assert (result("late", before_wait=OVERWRITE) != truth()).any()
    for asynchronous in ("refuse", "keep", "late"):
        np.testing.assert_array_equal(result(asynchronous, after_wait=OVERWRITE), truth())


TOUCHES = {
    "reads A": "mov.b32 %r50, %r12;",
    "reads D": "mov.b32 %r50, %r31;",
    "writes D": "mov.b32 %r34, 0;",
    "loads into D": "ld.global.v4.b32 {%r31, %r32, %r33, %r34}, [%rd6];",
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_registers_touched_before_the_wait(touch: str) -> None:
    assert kind(before_wait=touch) == "register in use"
    assert kind(before_commit=touch) == "register in use"
    assert kind(after_store=touch) == "none"


def test_an_accumulator_read_early_has_its_old_value_in_mode_late() -> None:
    early = {"before_wait": STEPS["store"], "store": ""}
    np.testing.assert_array_equal(result("keep", **early), truth())
    np.testing.assert_array_equal(result("late", **early), np.zeros((64, 8)))


def test_a_wait_that_covers_too_little() -> None:
    """``wait_group 1`` leaves the last group under way; without a commit there is no group to wait for."""
    assert kind(wait="wgmma.wait_group.sync.aligned 1;") == "register in use"
    assert kind(commit="") == "register in use"
    second = "\n".join(STEPS[step].replace("%r3", "%r4") for step in ("zero", "fence", "multiply", "commit"))
    both = {"after_commit": second, "wait": "wgmma.wait_group.sync.aligned 1;"}
    np.testing.assert_array_equal(result(**both), truth())
    assert kind(**both, store=STEPS["store"].replace("%r3", "%r4")) == "register in use"
    assert kind(**both, after_wait=OVERWRITE) == "register in use"  # the second one reads it as well


def test_two_shapes_in_one_accumulator() -> None:
    """Equal shapes may follow each other, others have to wait."""
    wide = STEPS["multiply"].replace("n8k16", "n16k16").replace("{%r31", "{%r41, %r42, %r43, %r44, %r31")
    more = "mov.b32 %r41, 0; mov.b32 %r42, 0; mov.b32 %r43, 0; mov.b32 %r44, 0;"
    late_b = {"descriptors": STEPS["descriptors"].replace(str(B_DESCRIPTOR), str(B_DESCRIPTOR & ~0x3FFF))}
    assert kind(after_zero=more, after_multiply=wide, **late_b) == "register in use"
    assert kind(after_zero=more, after_wait="wgmma.fence.sync.aligned;" + wide, store="", **late_b) == "none"


def test_a_missing_wgmma_fence() -> None:
    assert kind(fence="") == "wgmma fence"
    assert kind(after_fence="mov.b32 %r32, 1;") == "wgmma fence"
    assert kind(after_fence="add.s32 %r14, %r13, 1;") == "wgmma fence"
    assert kind(after_fence="add.s32 %r50, %r13, 1;") == "none"
    # A copy of an older value is no new value: the assembler joins the two registers.
    assert kind(zero="mov.b32 %r35, 0;", after_fence=STEPS["zero"].replace(" 0;", " %r35;")) == "none"
    # After a wait the accumulator may be continued as it is, but not written without another fence.
    again = STEPS["multiply"] + STEPS["commit"] + STEPS["wait"]
    np.testing.assert_array_equal(result(after_wait=again), 2 * truth())
    assert kind(after_wait="mov.b32 %r31, 7;" + again) == "wgmma fence"


def test_a_missing_proxy_fence() -> None:
    assert kind(proxy="") == "proxy fence"
    assert kind(proxy="", after_barrier=STEPS["proxy"]) == "none"
    some = "setp.lt.u32 %p2, %r0, 32;\n@%p2 fence.proxy.async.shared::cta;"
    assert kind(proxy=some) == "proxy fence"  # the other warps' writes are not in it
    assert kind(proxy="", after_barrier=some) == "none"  # a barrier has shown them to the first warp
    again = STEPS["wait"] + STEPS["fill"] + STEPS["barrier"] + STEPS["multiply"] + STEPS["commit"]
    assert kind(after_commit=again) == "proxy fence"
    assert kind(after_commit=again.replace("bar.sync 0;", STEPS["barrier"] + STEPS["proxy"])) == "none"


def test_asynchronous_copies_are_ordinary_writes() -> None:
    """``cp.async`` is waited for, shown by a barrier and then fenced; a fence before the wait is none."""
    copy = """
	cp.async.cg.shared.global [%r1], [%rd4], 16;
	cp.async.cg.shared.global [%r1+16], [%rd4+16], 16;
	cp.async.commit_group;"""
    wait = "cp.async.wait_group 0;"
    np.testing.assert_array_equal(result(fill=copy + wait), truth())
    assert kind(fill=copy, after_proxy=wait) == "proxy fence"
    assert kind(fill=copy) == "asynchronous copy"


def test_shared_memory_overwritten_before_the_wait() -> None:
    for changes in ({}, {"multiply": SHARED_A}):
        assert kind(before_wait=STEPS["fill"], **changes) == "asynchronous copy"
        assert kind(after_wait=STEPS["fill"], **changes) == "none"
    spoil = STEPS["fill"].replace("%r21", "%r0")
    np.testing.assert_array_equal(result("keep", before_wait=spoil, multiply=SHARED_A), truth())
    assert (result("late", before_wait=spoil, multiply=SHARED_A) != truth()).any()


def test_a_missing_barrier() -> None:
    assert kind(barrier="") == "race"


def test_a_part_of_a_warpgroup() -> None:
    some = "setp.lt.u32 %p2, %r0, 96;\n@%p2 "
    for step in ("fence", "multiply", "commit", "wait"):
        assert kind(**{step: some + STEPS[step]}) == "divergence"
    other = "setp.eq.b32 %p3, %r0, 5; selp.b64 %rd9, %rd8, %rd9, %p3;"
    assert kind(after_descriptors=other) == "divergence"


@pytest.mark.parametrize(
    ("descriptor", "meant"),
    [
        (B_DESCRIPTOR + 1, "none"),  # 16 bytes on: other rows
        (B_DESCRIPTOR + (1 << 16), "none"),  # a larger leading offset: other columns
        (B_DESCRIPTOR | 1 << 62, "none"),  # another swizzle
        (B_DESCRIPTOR | 0x3FFF, "bounds"),
        (B_DESCRIPTOR | 1 << 14, "descriptor"),
        (B_DESCRIPTOR + 0x80, "uninitialised shared memory"),
    ],
)
def test_a_wrong_descriptor_is_seen(descriptor: int, meant: str) -> None:
    """In the result, or because nobody wrote what it points to."""
    wrong = {"descriptors": STEPS["descriptors"].replace(str(B_DESCRIPTOR), str(descriptor))}
    assert kind(**wrong) == meant
    if meant == "none":
        assert (result(**wrong) != truth()).any()


def test_what_is_not_known_raises_by_its_full_opcode() -> None:
    with pytest.raises(UnknownOpcode, match=r"wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8"):
        result(multiply=STEPS["multiply"].replace("k16.f32.bf16.bf16", "k32.s32.s8.s8"))
    with pytest.raises(UnknownOpcode, match=r"with the constants \[1, -1, 0\]"):
        result(multiply=STEPS["multiply"].replace("1, 1, 0;", "1, -1, 0;"))
    with pytest.raises(ValueError, match="one of refuse, keep, late expected, got 'early'"):
        result("early")


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("mn_major", [False, True])
def test_layouts_reach_the_instruction(swizzle: int, mn_major: bool) -> None:
    """A and B in shared memory: the descriptor's fields and the transpose bits are taken as they are."""
    a, b, _ = operands()
    leading, stride = (16 * swizzle, 8 * swizzle) if swizzle else (1024, 128)
    given = np.zeros(10240, np.uint8)
    for start, values in ((0, a), (8192, b)):
        places = Matrix(start, leading, stride, 0, swizzle).addresses(*values.shape, 2, mn_major)
        given.view(np.uint16)[places // 2] = bf16(values)
    first = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle] << 62 | leading // 16 << 16 | stride // 16 << 32
    fill = """
	ld.global.v4.b32 {%r21, %r22, %r23, %r24}, [%rd6+AT];
	st.shared.v4.b32 [%r1+AT], {%r21, %r22, %r23, %r24};"""
    body = changed(
        STEPS,
        address=STEPS["address"].replace("%r0, 5;", "%r0, 4;"),
        registers="",
        load="",
        fill="".join(fill.replace("AT", str(2048 * i)) for i in range(5)),
        descriptors=f"mov.b64 %rd8, {first}; mov.b64 %rd9, {first | 8192 // 16}; mov.pred %p1, -1;",
        multiply=SHARED_A.replace("0, 0;", "1, 1;") if mn_major else SHARED_A,
    )
    out = np.zeros((128, 4), np.float32)
    run(body, given, out, 90, shared=10240)
    rows, columns = wgmma_d(8)
    np.testing.assert_array_equal(out, truth()[rows, columns])


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, trans: str) -> None:
    """Lane 4 * r + c gives columns 2c and 2c + 1 of row r of each matrix; transposed, of its columns."""
    registers = ", ".join(f"%r{11 + i}" for i in range(count))
    body = f"""
	mul.wide.u32 %rd3, %r0, 16;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
	shl.b32 %r1, %r0, 4;
	ld.global.v4.b32 {{%r11, %r12, %r13, %r14}}, [%rd4];
	stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1], {{{registers}}};
	bar.warp.sync -1;
	setp.lt.u32 %p1, %r0, {8 * count};
	@%p1 ld.shared.v4.b32 {{%r15, %r16, %r17, %r18}}, [%r1];
	@%p1 st.global.v4.b32 [%rd5], {{%r15, %r16, %r17, %r18}};"""
    given = np.arange(32 * 8, dtype=np.uint16).reshape(32, 4, 2)
    out = np.zeros((4, 8, 8), np.uint16)
    run(body, given, out, 90, threads=32)
    for matrix in range(count):
        for lane, half in np.ndindex(32, 2):
            row, column = lane // 4, 2 * (lane % 4) + half
            place = (column, row) if trans else (row, column)
            assert out[(matrix, *place)] == given[lane, matrix, half]
    half_a_warp = body.replace("stmatrix", "setp.lt.u32 %p2, %r0, 16;\n@%p2 stmatrix")
    assert fault(half_a_warp, given, out, 90, threads=32) == "divergence"


def test_programs_are_apart() -> None:
    """Two programs and two warpgroups in each: waits, locks, descriptors and the predicate are each one's own."""
    first_adds = "mov.u32 %r4, %ctaid.x; setp.eq.b32 %p1, %r4, 0;"
    body = changed(STEPS, zero=STEPS["zero"].replace(" 0;", " 0f3F800000;"), after_descriptors=first_adds)
    body = body.replace("mul.wide.u32 %rd3, %r0, 32", "and.b32 %r3, %r0, 127;\n\tmul.wide.u32 %rd3, %r3, 32")
    body = body.replace("mul.wide.u32 %rd5, %r0, 16", "mul.wide.u32 %rd5, %r3, 16")
    body = body.replace("shl.b32 %r1, %r0, 5", "shl.b32 %r1, %r3, 5")
    out_address = """
	mov.u32 %r4, %ctaid.x;
	mad.lo.s32 %r5, %r4, 256, %r0;
	mul.wide.u32 %rd10, %r5, 16;
	add.s64 %rd7, %rd2, %rd10;"""
    body = body.replace("st.global.v4.b32 [%rd7]", out_address + "\n\tst.global.v4.b32 [%rd7]")
    out = np.zeros((2, 2, 128, 4), np.float32)
    run(body, operands()[2], out, 90, threads=256, ctas=2)
    rows, columns = wgmma_d(8)
    for program, parts in enumerate(out):
        for part in parts:
            np.testing.assert_array_equal(part, truth()[rows, columns] + (program == 0))


SMALLEST = {"3.7.1": ("register in use", "right", "wrong"), "3.9.0": ("right", "right", "right")}
"""How the smallest kernel that races ends in each mode, as each Triton compiles it."""


def test_the_smallest_race_of_compiled_code_is_caught() -> None:
    """A loop of ``tl.dot(a & mask, x)``: Triton 3.7 overwrites operand A in registers while ``wgmma`` may read it."""
    if triton.__version__ not in SMALLEST:
        pytest.skip(f"nobody has looked at what Triton {triton.__version__} makes of it")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("smallest_race_executed.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert tuple(found[mode].partition(":")[0] for mode in MODES) == SMALLEST[triton.__version__]
    if triton.__version__ == "3.7.1":
        assert "is written, but wgmma.mma_async" in found["refuse"] and "ldmatrix" in found["refuse"]
