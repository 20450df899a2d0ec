"""The search for hazards: each kind found in a few lines of machine code, each legal neighbour of it passed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

triton = pytest.importorskip("triton")

from fpe.bench.lab import hazards, survey  # noqa: E402
from fpe.bench.lab.sass import read_sass  # noqa: E402
from fpe.bench.results import Results  # noqa: E402


def found(text: str, ptx: str = "") -> list[tuple[str, int]]:
    """Kinds and lines of a snippet's hazards: an instruction a line, ``label:`` before it where a branch leads to it.

    A scoreboard that is set or waited for stands behind a bar: ``LDTM.x4 R4, tmem[UR4] | sets 1``.
    """
    lines, position = [], 0
    for line in text.strip().splitlines():
        if line.strip().endswith(":"):
            lines.append(f".L_{line.strip()}")
            continue
        code, _, control = line.strip().partition(" | ")
        sets, waits = (re.search(rf"{word} (\d)", control) for word in ("sets", "waits"))
        word = (int(sets[1]) if sets else 7) << 5 | (1 << int(waits[1]) if waits else 0) << 11 | 7 << 8
        lines.append(f"        /*{position:04x}*/                   {code} ;   /* 0x{0:016x} */")
        lines.append(f"                                            /* 0x{word << 41:016x} */")
        position += 16
    instructions, labels = read_sass("\n".join(lines))
    assert len(instructions) == position // 16
    return [(hazard.kind, hazard.position) for hazard in hazards.search(instructions, labels, ptx)]


ISSUED = """
HGMMA.64x16x16.F32.BF16 R32, R88, gdesc[UR12], R32
HGMMA.64x16x16.F32.BF16 R32, R92, gdesc[UR16], R32, gsb0
{}
WARPGROUP.DEPBAR.LE gsb0, 0x0
LDSM.16.M88.4 R88, [R21+UR6]
STG.E.128 desc[UR4][R2.64], R32
EXIT
"""
"""A group in flight, something beside it, the wait, and then everything is allowed."""


@pytest.mark.parametrize(
    "code",
    [
        "LDSM.16.M88.4 R88, [R21+UR6]",
        "LDSM.16.M88.4 R85, [R21+UR6]",  # the last of four registers
        "LDS.U8 R95, [R8+UR4]",
        "LOP3.LUT R89, R116, R189, RZ, 0x30, !PT",
        "MOV R1, R90",
        "IMAD.WIDE R87, R1, R2, R4",
        "IMAD.WIDE R4, R1, R2, R87",
        "IMAD.HI.U32 R4, R1, R2, R87",  # it adds a pair
        "IMAD.HI.U32 R88, R1, R2, RZ",
        "STS.128 [R0], R29",
        "LDG.E.128 R4, desc[UR4][R38.64]",
        "LDG.E.64 R87, desc[UR4][R2.64]",
        "LDG.E R4, desc[UR4][R31.64]",
        "CS2R R31, SRZ",
        "FADD R3, R39.reuse, R4",
        "@P0 MOV R32, RZ",
        "HGMMA.64x16x16.F32.BF16 R48, R32, gdesc[UR12], R48, gsb0",  # sums as a left operand
        "HGMMA.64x16x16.F32.BF16 R84, gdesc[UR4], gdesc[UR12], R84, gsb0",  # sums where a left operand is
        "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], gdesc[UR12], R24, gsb0",  # other sums that overlap
    ],
)
def test_registers_in_flight(code: str) -> None:
    assert found(ISSUED.format(code)) == [("in flight", 2)]


@pytest.mark.parametrize(
    "code",
    [
        "LDSM.16.M88.4 R84, [R21+UR6]",
        "LDSM.16.M88.4 R96, [R21+UR6]",
        "LDS.U8 R87, [R8+UR4]",
        "MOV R31, R40",
        "IMAD.WIDE R86, R1, R2, R30",
        "IMAD.HI R31, R31, 0x8000, RZ",  # and keeps its upper half, one register
        "STS.128 [R0], R28",
        "STG.E.128 desc[UR4][R30.64], RZ",
        "UMOV UR32, UR88",
        "@!PT LDS R88, [RZ]",  # never executed
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "HGMMA.64x16x16.F32.BF16 R32, R88, gdesc[UR12], R32, gsb0",  # the same sums follow each other
        "HGMMA.64x16x16.F32.BF16 R40, R88, gdesc[UR12], R40, gsb0",  # a left operand read twice
    ],
)
def test_what_may_stand_beside_a_group_in_flight(code: str) -> None:
    assert found(ISSUED.format(code)) == []


def test_what_is_not_known_beside_a_group_in_flight_is_said() -> None:
    assert found(ISSUED.format("NEW.THING R200, R201")) == [("unknown", 2)]
    assert found("NEW.THING R200, R201\nEXIT") == []


LOOP = """
loop:
LDSM.16.M88.4 R88, [R21+UR6]
HGMMA.64x16x16.F32.BF16 R32, R88, gdesc[UR12], R32, gsb0
WARPGROUP.DEPBAR.LE gsb0, {first}
LDSM.16.M88.4 R92, [R21+UR6]
HGMMA.64x16x16.F32.BF16 R40, R92, gdesc[UR12], R40, gsb0
WARPGROUP.DEPBAR.LE gsb0, {second}
@P0 BRA `(.L_loop)
WARPGROUP.DEPBAR.LE gsb0, 0x0
EXIT
"""


@pytest.mark.parametrize(
    ("first", "second", "overwritten"),
    [
        ("0x0", "0x0", []),
        ("0x1", "0x1", []),  # a group's registers are written again after the next group was waited past
        ("0x1", "0x2", [0]),  # the turn after, its first group may still run
        ("0x2", "0x2", [0, 3]),
        ("0x2", "0x1", [3]),
    ],
)
def test_groups_are_counted_over_the_turns_of_a_loop(first: str, second: str, overwritten: list[int]) -> None:
    assert found(LOOP.format(first=first, second=second)) == [("in flight", position) for position in overwritten]


def test_a_group_that_was_not_ended_is_not_covered_by_a_wait() -> None:
    text = ISSUED.format("MOV R1, R2").replace("R32, gsb0", "R32")
    assert found(text) == [("in flight", 4), ("in flight", 5)]


GUARDED = """
@P0 BRA `(.L_skip)
HGMMA.64x16x16.F32.BF16 R32, R88, gdesc[UR12], R32, gsb0
skip:
{}
{} WARPGROUP.DEPBAR.LE gsb0, 0x0
LDSM.16.M88.4 R88, [R21+UR6]
EXIT
"""


def test_predicates_are_remembered_until_they_are_written() -> None:
    assert found(GUARDED.format("MOV R1, R2", "@!P0")) == []
    assert found(GUARDED.format("MOV R1, R2", "@P0")) == [("in flight", 4)]
    assert found(GUARDED.format("ISETP.NE.AND P0, PT, R1, RZ, PT", "@!P0")) == [("in flight", 4)]


def test_a_group_that_is_never_waited_for() -> None:
    text = """
loop:
HGMMA.64x16x16.F32.BF16 R32, gdesc[UR4], gdesc[UR12], R32, gsb0
@P0 BRA `(.L_loop)
EXIT
"""
    assert found(text) == [("endless", 0)]


def test_a_loop_entered_in_the_middle_and_code_moved_out_of_line() -> None:
    text = """
HGMMA.64x16x16.F32.BF16 R32, R88, gdesc[UR12], R32, gsb0
BRA `(.L_aside)
back:
WARPGROUP.DEPBAR.LE gsb0, 0x0
EXIT
aside:
LDS R88, [R1]
BRA `(.L_back)
"""
    assert found(text) == [("in flight", 4)]


COPIED = """
LDGSTS.E.BYPASS.128 [R10], desc[UR16][R12.64]
LDGDEPBAR
DEPBAR.LE SB0, 0x0
{}
EXIT
"""


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        ("LDS R1, [R2]\nBAR.SYNC.DEFER_BLOCKING 0x0", [("barrier", 3)]),
        ("LDSM.16.M88.4 R4, [R2]", [("barrier", 3)]),
        ("BAR.SYNC.DEFER_BLOCKING 0x0\nLDSM.16.M88.4 R4, [R2]", []),
        ("STS [R1], R2\nBAR.SYNC.DEFER_BLOCKING 0x0\nLDS R1, [R2]", []),
    ],
)
def test_a_barrier_stands_between_the_wait_for_copies_and_reads(code: str, kinds: list) -> None:
    assert found(COPIED.format(code)) == kinds


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        ("STS.128 [R1], R4\nBAR.SYNC.DEFER_BLOCKING 0x0\n", [("fence", 5)]),
        ("STSM.16.M88.4 [R1], R4\nFENCE.VIEW.ASYNC.S\nBAR.SYNC.DEFER_BLOCKING 0x0\n", []),
        ("FENCE.VIEW.ASYNC.S\nSTS.128 [R1], R4\nBAR.SYNC.DEFER_BLOCKING 0x0\n", [("fence", 6)]),
        ("BAR.SYNC.DEFER_BLOCKING 0x0\n", [("fence", 4)]),  # the copies themselves
        ("BAR.SYNC.DEFER_BLOCKING 0x0\nFENCE.VIEW.ASYNC.S\n", []),
        ("BAR.SYNC.DEFER_BLOCKING 0x0\nFENCE.VIEW.ASYNC.T\n", [("fence", 5)]),  # of tensor memory
    ],
)
def test_a_fence_stands_between_stores_and_matrix_instructions(code: str, kinds: list) -> None:
    matrix = "HGMMA.64x16x16.F32.BF16 R32, gdesc[UR4], gdesc[UR12], R32, gsb0\nWARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert found(COPIED.format(code + matrix)) == kinds


def test_tensor_memory_is_waited_for_by_scoreboard() -> None:
    text = """
LDTM.16dp32bit_t0_t15.x4 R4, tmem[UR4]
LDTM.16dp32bit_t16_t31.x4 R4, tmem[UR4+0x4] | sets 2
{}
FADD R8, R7, R6 | {}
FADD R4, R5, R6
EXIT
"""
    assert found(text.format("MOV R1, R2", "waits 2")) == []
    assert found(text.format("MOV R1, R2", "waits 1")) == [("tensor memory", 3), ("tensor memory", 4)]
    assert found(text.format("MOV R1, R7", "waits 2")) == [("tensor memory", 2)]
    assert found(text.format("MOV R1, R8", "waits 2")) == []


PTX = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {};\n" * 2 + "wgmma.commit_group.sync.aligned;\n"


def test_matrix_instructions_that_the_assembler_serialised() -> None:
    one = "HGMMA.64x16x16.F32.BF16 R32, R88, gdesc[UR12], R32, gsb0\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n"
    two = one.replace(", gsb0\nWARPGROUP.DEPBAR.LE gsb0, 0x0", "", 1) + one
    meant = PTX + "wgmma.wait_group.sync.aligned 0;"
    assert found(one + one, meant) == [("serialised", 0), ("serialised", 2)]
    assert found(two, meant) == []
    alone = "wgmma.mma_async.sync.aligned.m64n16k16 {};\nwgmma.commit_group.sync.aligned;\n"
    alone += "wgmma.wait_group.sync.aligned 0;\n"
    assert found(one + one, alone + alone) == []  # as the program says
    assert found(one + one, (alone + alone).replace(" 0;", " 1;")) == [("serialised", 0), ("serialised", 2)]


def test_a_binary_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot follow BRX"):
        found("BRX R2\nHGMMA.64x16x16.F32.BF16 R32, R88, gdesc[UR12], R32, gsb0")
    with pytest.raises(ValueError, match="cannot read"):
        found("HGMMA.64x16x16.F32.BF16 UR4, R88, gdesc[UR12], R32, gsb0")


def test_complaints_of_a_row() -> None:
    assert hazards.complaints({"hazards": {}, "first_hazard": ""}) == []
    (said,) = hazards.complaints({"hazards": {"in flight": 8, "fence": 1}, "first_hazard": "LDSM R4, line 3: touches"})
    assert "8 x in flight" in said and "1 x fence" in said and "LDSM R4, line 3" in said


def test_a_search_replaces_its_own_rows_in_a_file(tmp_path: Path) -> None:
    def rows(kernels: str, version: str, arch: int, found: int) -> list[dict]:
        names = (("split", "_partition_multiply"), ("forward", "_block_multiply"), ("forward", "sparse_tensor_core"))
        named = ({"op": op, "kernel": kernel} for op, kernel in names)
        return [{"kernels": kernels, "triton": version, "arch": arch, "found": found, **row} for row in named]

    def results(*rows: dict, **settings: object) -> Results:
        return Results("lab-hazards", {"architectures": sorted({row["arch"] for row in rows}), **settings}, [*rows])

    path = tmp_path / "hazards.jsonl"
    old = (*rows("before", "3.6.0", 90, 0), *rows("after", "3.6.0", 90, 0), *rows("after", "3.7.1", 90, 0))
    new = results(*rows("after", "3.6.0", 90, 1))
    assert survey.joined(path, new) is new
    results(*old, before="abc").write(path)
    got = survey.joined(path, new)
    assert got.rows == [*old[:3], *new.rows, *old[6:]] and got.settings["before"] == "abc"
    for row in (new.rows[0], new.rows[2]):
        of_one = survey.joined(path, results(row), [{"split": "split", "forward": "2:4"}[row["op"]]])
        assert of_one.rows == [row if {**r, "found": 1} == row else r for r in old]
    other = results(*rows("after", "3.6.0", 100, 1))
    got = survey.joined(path, other)
    assert got.rows == [*old, *other.rows] and got.settings["architectures"] == [90, 100]


# The compiler itself, in processes where Triton does not interpret.


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


SMALLEST = {
    "3.6.0": {"64x16": {"serialised"}, "128x128": {"serialised"}},
    "3.7.1": {"64x16": {"in flight"}, "128x128": {"serialised"}},
    "3.8.0": {"64x16": {"in flight"}, "128x128": {"serialised"}},
    "3.9.0": {"64x16": set(), "128x128": {"serialised"}},
}
"""What each Triton makes of ``smallest_race.py``."""


@pytest.mark.skipif(triton.__version__ not in SMALLEST, reason=f"nobody looked at Triton {triton.__version__}")
def test_the_smallest_race_is_found() -> None:
    done = _python(str(ROOT / "tests/smallest_race.py"))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {tile: set(said[tile]) for tile in ("64x16", "128x128")} == SMALLEST[said["triton"]]


def test_kernels_set_the_fence_that_an_older_triton_leaves_out() -> None:
    done = _python(str(ROOT / "tests/own_fence.py"))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    few, *every = reversed(said["before"].values())
    for kernel in every:
        assert kernel["own"] == kernel["products"] > 0
        assert set(kernel["none"]) == {"fence"} and not kernel["own alone"]
    assert len(every) == 5 and few["own"] == few["products"] == 0
    assert said["since"]["own"] == 0 < said["since"]["products"]


def test_shipped_kernels_have_none(tmp_path: Path) -> None:
    done = _python("-c", SHIPPED, str(tmp_path / "hazards.jsonl"))
    assert done.returncode == 0, done.stderr
    rows = Results.read(tmp_path / "hazards.jsonl").rows
    assert [(row["case"], row["first_hazard"]) for row in rows if row["hazards"]] == []
    instruction = {row["case"]: row["matrix"][0].split(".")[0] for row in rows}
    assert instruction["split-alpha2-bf16-m16"] == "HMMA" and instruction["split-alpha2-bf16-m8192-gelu"] == "HGMMA"
    assert len(rows) == 4 and {survey.operation(row) for row in rows} == {"split", "mlp", "2:4 forward"}


SHIPPED = """
import sys
from pathlib import Path
from unittest.mock import patch
from fpe.bench.families import CASES
from fpe.bench.lab import survey

ids = ("split-alpha2-bf16-m16", "split-alpha2-bf16-m8192-gelu", "mlp-alpha2-bf16-m64-relu", "forward-bf16-2-m64")
with patch.object(survey, "CASES", [case for case in CASES if case.id in ids]):
    survey.run([90], jobs=1).write(Path(sys.argv[1]))
"""
