"""Which lines a binary gives for the loads of a source line."""

import pytest

pytest.importorskip("triton")

from fpe.bench.lab.sass import INSTRUCTION, lines_in_binary

PTX = """
	.file	1 "/src/kernels/gluon.py"
	.file	2 "/src" "other.py"
	.loc	1 305 16                        // gluon.py:305:16
	mul.wide.s32 %rd1, %r1, 4;
	// begin inline asm
	.loc	1 307 22, function_name $L__info_string0, inlined_at 1 423 16
	mov.u32 %r87, 0x0;
	.loc	1 308 22, function_name $L__info_string0, inlined_at 1 423 16
	mov.u32 %r88, 0x0;
	.loc	1 309 22, function_name $L__info_string0, inlined_at 1 423 16
	@%p1 ld.global.v2.b32 { %r87, %r88 }, [ %rd49 + 0 ];
	// end inline asm
	// begin inline asm
	.loc	1 313 29
	mov.u32 %r91, 0x0;
	.loc	1 314 29
	ld.global.b32 { %r91 }, [ %rd50 + 0 ];
	// end inline asm
	.loc	2 307 8
	// begin inline asm
	cp.async.cg.shared.global [ %r29 + 0 ], [ %rd18 + 0 ], 0x10, %r30;
	// end inline asm
	cp.async.commit_group;
	.loc	1 320 8
	ld.global.nc.b32 %r95, [%rd51];
"""
"""As Triton 3.8 writes it: a line of the source is counted for each line of the assembly."""


@pytest.mark.parametrize(
    ("source", "binary"),
    [
        ({("gluon.py", 307)}, {("gluon.py", 309)}),
        ({("gluon.py", 313), ("gluon.py", 320)}, {("gluon.py", 314), ("gluon.py", 320)}),
        ({("other.py", 307)}, {("other.py", 307)}),
        ({("gluon.py", 309)}, set()),  # where another line's load seems to stand
        ({("gluon.py", 305)}, set()),
    ],
)
def test_a_load_is_told_from_where_its_assembly_begins(source: set, binary: set) -> None:
    assert lines_in_binary(PTX, source) == binary


def test_one_line_for_all_of_the_assembly_is_that_line() -> None:
    """As before version 3.8."""
    before = PTX
    for shifted, own in ((308, 307), (309, 307), (314, 313)):
        before = before.replace(f".loc	1 {shifted}", f".loc	1 {own}")
    for line in (307, 313, 320):
        assert lines_in_binary(before, {("gluon.py", line)}) == {("gluon.py", line)}


def test_a_line_of_two_loads_is_refused() -> None:
    clash = PTX.replace(".loc	1 313 29", ".loc	1 308 29").replace(".loc	1 314 29", ".loc	1 309 29")
    with pytest.raises(ValueError, match=r"line 309 of gluon\.py for loads of different lines"):
        lines_in_binary(clash, {("gluon.py", 307)})
    assert lines_in_binary(clash, {("gluon.py", 320)}) == {("gluon.py", 320)}


@pytest.mark.parametrize("hint", ["", "                            ?trans5", "   ?WAIT2_END_GROUP"])
def test_a_disassemblers_hint_is_no_operand(hint: str) -> None:
    found = INSTRUCTION.search(f"        /*0a30*/              @!P0 BSYNC.RECONVERGENT B0{hint} ;")
    assert found and [group and group.strip() for group in found.groups()] == ["!P0", "BSYNC.RECONVERGENT", "B0"]
