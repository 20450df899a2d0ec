"""The offline compiler: what it reads from machine code, what it counts, and that what ships is as meant."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("triton")

from fpe.bench.families import CASES, FAMILIES, KERNELS, QUICK  # noqa: E402
from fpe.bench.families.contract import expected_matrix  # noqa: E402
from fpe.bench.lab import cli  # noqa: E402
from fpe.bench.lab.compile import check, joined  # noqa: E402
from fpe.bench.lab.sass import Instruction, analyse, main_loop, most_in_flight, programs_per_sm, read_sass  # noqa: E402
from fpe.bench.results import Results  # noqa: E402
from fpe.kernels.gpus import ARCHITECTURES  # noqa: E402

SASS = """
.text._multiply:
	//## File "/somewhere/fpe/kernels/block/triton.py", line 66
        /*0000*/                   LDG.E R6, [R6.64] ;
	//## File "/somewhere/fpe/kernels/block/triton.py", line 97
        /*0010*/                   LDGSTS.E.BYPASS.128 [R35], [R8.64], !P2 ;
        /*0020*/                   STL.64 [R1], R4 ;
.L_x_1:
	//## File "/somewhere/fpe/kernels/block/triton.py", line 100
        /*0030*/                   HMMA.16816.F32.BF16 R12, R20.reuse, R8, R12 ;
        /*0040*/                   LDL R4, [R1+0x8] ;
	//## File "/somewhere/fpe/kernels/block/triton.py", line 97
        /*0050*/              @!P0 LDGSTS.E.BYPASS.128 [R11+0x800], desc[UR4][R4.64], !P2 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   STG.E.128 [R2.64], R12 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""

RESOURCES = " Function _multiply:\n  REG:44 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:448 TEXTURE:0 SURFACE:0 SAMPLER:0\n"

GOOD = {
    "kernel": "_block_multiply",
    "arch": 80,
    "op": "forward",
    "block": [64, 64],
    "dtype": "bf16",
    "rows": 16,
    "num_warps": 4,
    "registers": 44,
    "stack": 0,
    "local": 0,
    "spill_stores": 0,
    "spill_loads": 0,
    "shared": 30732,
    "programs_per_sm": 5,
    "limited_by": "shared",
    "matrix": ["HMMA.16816.F32.BF16"],
    "multiply_adds": 0,
    "load_bits": 128,
    "tile_bytes": 8192,
    "hazards": {},
    "first_hazard": "",
    "loop_shared": 0,
}


def test_facts_of_a_snippet() -> None:
    assert analyse(SASS, RESOURCES, {("triton.py", 97)}, True) == {
        "registers": 44,
        "stack": 8,
        "local": 16,
        "spill_stores": 8,
        "spill_loads": 4,
        "matrix": ["HMMA.16816.F32.BF16"],
        "multiply_adds": 0,
        "loads": {"LDGSTS.E.BYPASS.128": 2},
        "load_bits": 128,
        "synchronous": 0,
        "instructions": 10,
        "loop_instructions": 4,
        "loop_load_bytes": 16,
        "loop_loads": 1,
        "loop_integer": 0,
        "loop_in_flight": 0,
        "loop_prefetches": 0,
        "loop_shared": 0,
    }


def test_instructions_keep_their_lines_and_widths() -> None:
    instructions, labels = read_sass(SASS)
    assert [i.source[1] for i in instructions] == [66, 97, 97, 100, 100, 97, 97, 97, 97, 97]
    assert [i.width for i in instructions[:3]] == [32, 128, 64]
    assert [i.predicated for i in instructions[5:7]] == [True, True]
    assert labels == {".L_x_1": 3, ".L_x_2": 9}


def test_bytes_in_flight_end_where_their_scoreboard_is_waited_for() -> None:
    stream, other, none = ("gluon.py", 7), ("gluon.py", 9), 7 << 5

    def load(board: int, source: tuple[str, int] = stream, opcode: str = "LDG.E.128") -> Instruction:
        return Instruction(opcode, "R4, [R2.64]", "", source, board << 5)

    def use(*boards: int) -> Instruction:
        return Instruction("LOP3.LUT", "R4, R4, R5, RZ", "", other, sum(1 << 11 + board for board in boards) | none)

    streams = {stream}
    assert most_in_flight([load(0), load(0), load(1), use(0), load(2), use(1, 2)], streams) == 48
    assert most_in_flight([load(0), use(0), load(1), use(1)], streams) == 16
    # Used in the next turn; activations and copies do not count.
    turn = [use(0), load(0), load(2, other), use(1, 2), load(1, opcode="LDG.E.64"), load(3, opcode="LDGSTS.E.128")]
    assert most_in_flight(turn, streams) == 24


def test_narrow_and_synchronous_loads_are_seen() -> None:
    narrow = SASS.replace("LDGSTS.E.BYPASS.128 [R11", "LDG.E.U16 [R11")
    facts = analyse(narrow, RESOURCES, {("triton.py", 97)}, True)
    assert (facts["load_bits"], facts["synchronous"]) == (16, 1)


def test_resources_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="REG, STACK"):
        analyse(SASS, "nothing", set(), True)


def test_main_loop_is_the_inner_one_and_ignores_code_moved_out_of_line() -> None:
    text = """
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11] ;
.L_x_2:
        /*0020*/              @!P0 BRA `(.L_x_3) ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/               @P2 BRA `(.L_x_0) ;
        /*0050*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11] ;
        /*0060*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11] ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_2) ;
"""
    assert main_loop(*read_sass(text)) == range(1, 4)


def test_no_loop_without_work() -> None:
    assert len(main_loop(*read_sass(SASS.replace("HMMA.16816.F32.BF16", "MOV")))) == 0


# Occupancy, against NVIDIA's occupancy calculator.


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "held"),
    [
        (80, 4, 32, 0, {"programs": 32, "warps": 16, "registers": 16, "shared": 164}),
        (80, 8, 172, 98_316, {"programs": 32, "warps": 8, "registers": 1, "shared": 1}),
        (86, 4, 40, 30_732, {"programs": 16, "warps": 12, "registers": 12, "shared": 3}),
        (89, 1, 255, 1_000, {"programs": 24, "warps": 48, "registers": 8, "shared": 50}),
        (90, 4, 168, 98_332, {"programs": 32, "warps": 16, "registers": 3, "shared": 2}),
        (120, 4, 33, 101_376, {"programs": 24, "warps": 12, "registers": 12, "shared": 1}),
    ],
)
def test_programs_per_sm(arch: int, warps: int, registers: int, shared: int, held: dict[str, int]) -> None:
    assert programs_per_sm(arch, warps, registers, shared) == held


def test_tensor_memory_limits_programs() -> None:
    assert programs_per_sm(100, 4, 32, 0, tensor=128)["tensor"] == 4
    assert "tensor" not in programs_per_sm(100, 4, 32, 0)


# Complaints.

DECODE = {"kernel": "multiply_rows", "arch": 90, "tile": "16x64", "instructions_per_weight": 3.0}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spill_stores": 8}, "spills"),
        ({"spill_loads": 4}, "spills"),
        ({"stack": 8}, "spills"),
        ({"local": 8}, "spills"),
        ({"shared": 166_913}, "shared memory"),
        ({"programs_per_sm": 0}, "does not fit"),
        ({"load_bits": 64}, "loads of 64 bits"),
        ({"load_bits": 0}, "loads of 0 bits"),
        ({"matrix": []}, "meant HMMA, got none"),
        ({"matrix": [], "multiply_adds": 9}, "meant HMMA, got FFMA"),
        ({"arch": 90, "rows": 64}, "meant HGMMA, got HMMA"),
        ({"arch": 100, "rows": 128}, "meant UTCHMMA, got HMMA"),
        ({"dtype": "fp32"}, "meant FFMA, got HMMA"),
        ({"hazards": {"in flight": 8}, "first_hazard": "LDSM R4, line 3"}, "hazards: 8 x in flight; LDSM R4"),
        ({"kernel": "multiply_rows", "tile": "16x64", "instructions_per_weight": 14.1}, "14.1"),
        ({"kernel": "multiply_columns", "tile": "64", "loop_shared": 3}, "3 instructions on shared"),
        ({**DECODE, "in_flight_l2": 40959}, "40959 bytes in flight"),
    ],
)
def test_check_complains(change: dict, complaint: str) -> None:
    assert check(GOOD) == []
    (said,) = check({**GOOD, **change})
    assert complaint in said


def test_narrow_loads_are_allowed_where_the_reason_is_written_down() -> None:
    row = {**GOOD, "op": "dx", "dtype": "tf32", "load_bits": 32}
    assert check(row) == [] and len(check({**row, "op": "forward"})) == 1 and len(check({**row, "load_bits": 16})) == 1


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ({"arch": 90}, "HMMA"),
        ({"arch": 90, "rows": 64}, "HGMMA"),
        ({"arch": 90, "rows": 64, "num_warps": 2}, "HMMA"),
        ({"arch": 120, "rows": 128}, "HMMA"),
    ],
)
def test_expected_matrix(change: dict, meant: str) -> None:
    assert expected_matrix({**GOOD, **change}) == meant


@pytest.mark.parametrize(
    ("kernel", "given", "bytes_and_rows"),
    [
        ("_block_multiply", {"BLOCK_IN": 32, "BN": 64, "BK": 128, "TRANSPOSED": False, "BLOCK_M": 16}, (4096, 16)),
        ("_block_multiply", {"BLOCK_IN": 32, "BN": 64, "BK": 128, "TRANSPOSED": True, "BLOCK_M": 16}, (8192, 16)),
        ("_block_outer", {"BLOCK_M": 32, "BN": 64, "BK": 128}, (12288, 64)),
        ("_partition_multiply", {"BLOCK_N": 32, "BLOCK_K": 128, "TRANSPOSED": False, "TURNED": False}, (8192, 32)),
        ("_partition_multiply", {"BLOCK_N": 32, "BLOCK_K": 128, "TRANSPOSED": True, "TURNED": False}, (8192, 128)),
        (
            "_partition_multiply",
            {"BLOCK_N": 32, "BLOCK_K": 128, "TRANSPOSED": True, "TURNED": True, "BLOCK_M": 16},
            (8192, 16),
        ),
        ("multiply_rows", {"BLOCK_N": 64, "WARPS_IN": 1}, (16384, 16)),
        ("multiply_rows", {"BLOCK_N": 32, "WARPS_IN": 4}, (32768, 16)),
        ("multiply_columns", {"UNROLL": 2, "num_warps": 4, "EACH": 8}, (16384, 16)),
        ("multiply_columns", {"UNROLL": 2, "num_warps": 4, "EACH": 4}, (8192, 16)),
        ("_expanded_mlp", {"BLOCK_H": 64, "BLOCK_K": 32, "TURNED": False, "BLOCK_M": 16}, (4096, 64)),
        ("_expanded_mlp", {"BLOCK_H": 64, "BLOCK_K": 32, "TURNED": True, "BLOCK_M": 16}, (4096, 16)),
        ("multiply_twice", {"BLOCK_H": 64, "WARPS_IN": 2}, (32768, 16)),
        (
            "_partition_outer",
            {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "ALPHA": 4, "CHILDREN_LEFT": True},
            (6144, 32),
        ),
        (
            "_partition_outer",
            {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "ALPHA": 4, "CHILDREN_LEFT": False},
            (9216, 32),
        ),
        ("_reduce", {"BLOCK": 1024}, (4096, 0)),
    ],
)
def test_what_a_step_streams(kernel: str, given: dict, bytes_and_rows: tuple[int, int]) -> None:
    step = KERNELS[kernel].step
    assert step is not None and step(given, 2) == bytes_and_rows


def test_cases_have_readable_distinct_ids() -> None:
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids) and "forward-64x128-bf16-m16" in ids
    assert "split-alpha2-bf16-m16" in ids and {case.option for case in CASES} == {*cli.OPERATIONS}
    others = {"kept_merge", "kept_split_t", "kept_merge_t", "kept_grad_t"}  # of the same kernels
    assert {case.option for case in QUICK} == {*cli.OPERATIONS} - {"grad_t"} - others


def test_a_run_keeps_a_files_rows_of_other_architectures_and_operations(tmp_path: Path) -> None:
    def row(op: str, arch: int, found: int, kernel: str = "_block_multiply") -> dict:
        return {"op": op, "kernel": kernel, "arch": arch, "found": found}

    def results(*rows: dict, version: str = "3.7.1") -> Results:
        made = {"triton": version, "shape": [1, 2], "architectures": sorted({row["arch"] for row in rows})}
        return Results("lab-compile", made, [*rows])

    path = tmp_path / "compile.jsonl"
    old = (row("forward", 80, 0), row("dx", 80, 0), row("forward", 90, 0))
    new = results(row("dx", 80, 1))
    assert joined(path, new) is new
    results(*old).write(path)
    got = joined(path, new, ["dx"])
    assert got.rows == [old[0], *new.rows, old[2]] and got.settings["architectures"] == [80, 90]
    dated = replace(new, provenance={**new.provenance, "commit": "b"})
    replace(results(*old), provenance={**new.provenance, "commit": "a, b", "date": "then"}).write(path)
    assert dict(joined(path, dated, ["dx"]).provenance) == {**new.provenance, "commit": "a, b"}
    assert joined(path, replace(dated, settings=results(row("dx", 90, 0)).settings)).provenance["commit"] == "a, b"
    assert joined(path, new).rows == [*new.rows, old[2]]
    another = results(row("dx", 80, 1), version="3.8.0")
    assert joined(path, another, ["dx"]) is another
    results(row("forward", 80, 0, "_multiply")).write(path)
    assert joined(path, results(row("dw", 80, 1, "_outer")), ["2:4"]).rows == [row("dw", 80, 1, "_outer")]


# Compiling, in processes where Triton does not interpret.


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_quick_set_is_as_meant_on_every_architecture(tmp_path: Path) -> None:
    done = _python("-m", "fpe.bench", "lab", "compile", "--quick", "--json", "--output", str(tmp_path))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == set(ARCHITECTURES), done.stderr
    walked = {kernel.shown for name in ("bitmap", "block", "partition", "mlp") for kernel in FAMILIES[name].KERNELS}
    assert {row["kernel"] for row in rows} == walked | {"_reduce", "sparse_tensor_core", "_multiply", "_pack"}
    assert [(row["case"], row["arch"], row["complaints"]) for row in rows if row["complaints"]] == []
    assert done.returncode == 0
    assert {file.name for file in tmp_path.iterdir()} == {"bitmap.jsonl", "compile.jsonl", "semi-structured.jsonl"}


PLANT = """
import json
from unittest.mock import patch
from fpe.bench.families.block import Case
from fpe.bench.lab import compile as lab
from fpe.kernels.block import triton as kernels
from fpe.kernels.block.config import Config

planted = Config(block_m=128, block_in=16, split=1, group=8, num_warps=1, num_stages=1)
with patch.object(kernels, "choose", lambda *arguments: planted):
    rows = lab.run([Case("forward", "bf16", 1024, block=(128, 128))], [80], jobs=1).rows
print(json.dumps(rows))
"""


def test_a_planted_spill_is_caught() -> None:
    done = _python("-c", PLANT)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["spill_stores"] > 0 and row["spill_loads"] > 0
    assert any(complaint.startswith("spills") for complaint in row["complaints"])


def test_interpreted_kernels_are_not_compiled() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "fpe.bench", "lab", "compile", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "TRITON_INTERPRET" in done.stderr
