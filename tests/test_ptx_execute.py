"""The compiled PTX of the real launches, executed: a few cases in CI, the whole list as committed results."""

import json
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from click.testing import CliRunner
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fpe import kernels
from fpe.bench.lab import cli
from fpe.bench.lab.ptx import execute, mutate
from fpe.bench.lab.ptx.cases import CASES, QUICK, TYPES, Case, _Draw, problem, runs_on
from fpe.bench.results import COMMITTED, Results
from fpe.kernels.cpu import numba_installed
from fpe.kernels.device import KNOWN

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100, 120)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process where Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_quick_set_is_right_on_four_architectures(tmp_path: Path) -> None:
    chosen = [part for arch in ARCHITECTURES for part in ("--arch", str(arch))]
    done = _python(
        "-m", "fpe.bench", "lab", "execute", "--quick", "--json", "--jobs", "1", "--output", str(tmp_path), *chosen
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["case"], row["arch"], row["status"]) for row in rows if not execute.good(row)] == [], done.stderr
    assert sorted((row["case"], row["arch"]) for row in rows) == sorted(
        (case.id, arch) for arch in ARCHITECTURES for case in QUICK if runs_on(case, arch)
    )
    assert {row["case"] for row in rows if row["status"] != "exact"} == {c.id for c in QUICK if c.activation == "gelu"}
    assert done.returncode == 0 and all(row["instructions"] > 500 for row in rows)
    executed = Results.read(tmp_path / "execute.jsonl").settings["opcodes"]
    for arch, name in (
        (80, "mma.sync"),
        (80, "mma.sp::"),
        (90, "wgmma.mma_async"),
        (100, "tcgen05.mma"),
        (120, "mma.sp::"),
    ):
        assert any(opcode.startswith(name) for opcode in executed[str(arch)]), (arch, name)


BROKEN = """
import json
from fpe.bench.lab.ptx import mutate
from fpe.bench.lab.ptx.cases import Case
from fpe.bench.lab.ptx.execute import execute

split = Case("partition", "split", shape=(20, 4400), m=3, bias=True)
tiled = Case("partition", "split", shape=(40, 1100), m=70)
grad = Case("partition", "grad", m=64, shape=(128, 64))

def without(kernel_name, opcode):
    def change(kernel):
        if kernel.name != kernel_name:
            return kernel
        place = next(i for i, x in enumerate(kernel.instructions) if x.opcode.startswith(opcode))
        return mutate.changed(kernel, place, mutate.NOTHING)
    return change

def drawn():
    watch = mutate.Watch(lambda kernel: mutate.changes(kernel, ("constant changed",)))
    whole = execute(grad, 80, watch=watch)
    return whole, mutate.drawn(watch.felt[0], watch.kernels[0], 5)

(whole, first), (_, again) = drawn(), drawn()
print(json.dumps({
    "whole": whole["status"],
    "a part is not written": execute(split, 80, without("multiply_rows", "st.global"))["status"],
    "the result is not written": execute(grad, 80, without("_partition_outer", "st.global"))["status"],
    "no wait": execute(tiled, 80, without("_partition_multiply", "cp.async.wait_group"))["status"],
    "mutants": mutate.run_case(grad, 80, 2, ("matrix transposed", "barrier removed", "registers swapped")),
    "seeded": first == again and len(first) == 5,
}))
"""


def test_broken_kernels_are_seen() -> None:
    done = _python("-c", BROKEN)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"] == "exact" and found["seeded"]
    assert found["a part is not written"].startswith("uninitialised global memory: read of byte")
    assert found["the result is not written"].startswith("wrong: ")
    assert found["no wait"].startswith("asynchronous copy: ")
    counts = Counter(row["class"] for row in found["mutants"])
    assert counts["matrix transposed"] == 2 and counts["registers swapped"] == 2
    killed = Counter(row["class"] for row in found["mutants"] if row["killed"])
    assert killed["matrix transposed"] == 2 and killed["registers swapped"] >= 1  # a bound swapped may change nothing
    assert {row["before"] for row in found["mutants"]}.isdisjoint(row["after"] for row in found["mutants"])


def test_interpreted_kernels_are_not_executed() -> None:
    done = CliRunner().invoke(cli.lab, ["execute", "--quick"])
    assert done.exit_code == 1 and "TRITON_INTERPRET" in done.output


def test_unknown_architectures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = CliRunner().invoke(cli.lab, ["execute", "--arch", "75"])
    assert done.exit_code == 2 and "expected some of 80, 86, 89, 90, 100, 120, got 75" in done.output


# The cases, and the judge of their results.


def test_there_are_enough_cases_with_readable_ids() -> None:
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids) and "partition-split-bf16-19x70x90-alpha2" in ids
    assert {case.family for case in CASES} == {*execute.FAMILIES}
    assert all(sum(runs_on(case, arch) for case in CASES) >= 130 for arch in KNOWN)


@pytest.mark.parametrize(
    "case", (QUICK[0], replace(QUICK[0], activation="gelu"), replace(QUICK[0], integers=False)), ids=lambda c: c.id
)
def test_the_judge_sees_a_unit_in_the_last_place(case: Case) -> None:
    posed = problem(case)
    want = posed.finish(posed.twin(*(operand.double() for operand in posed.operands)))
    right = want.to(torch.bfloat16)
    good = "exact" if case.integers and not case.activation else "within tolerance"
    assert execute.judge(case, posed, right) == good
    place = int(want.abs().argmax())
    for change in (0x0001 if good == "exact" else 0x0002, 0x8000):
        wrong = right.clone()
        wrong.view(torch.int16).view(-1)[place] ^= change - 0x10000 if change == 0x8000 else change
        assert execute.judge(case, posed, wrong).startswith("wrong: 1 of ")
    wrong = right.clone()
    wrong.view(-1)[place] = torch.nan
    assert execute.judge(case, posed, wrong).startswith("wrong: 1 of ")
    assert execute.judge(case, posed, right[1:]).startswith("wrong: torch.bfloat16 [")


ENDS = """
import torch
from fpe.bench.lab.ptx.harness import executing
from fpe.kernels import Bitmap
from fpe.kernels.partition.triton import split_matmul_triton

draw = torch.Generator().manual_seed(0)
for last in ([38], [39], [38, 39], None):
    mask = torch.rand(130, 40, generator=draw) < 0.5
    mask[-1 if last else 20 :] = False
    mask[-1, last or []] = True
    kept = Bitmap.pack(mask)
    values = torch.randint(-3, 4, (kept.nnz,), generator=draw).bfloat16()
    w = kept.to_dense(values).float()
    for there, weight in ((kept, w), (kept.T, w.T)):
        x = torch.randint(-3, 4, (3, weight.shape[1]), generator=draw).bfloat16()
        with executing(80, []):
            y = split_matmul_triton(x, values, None, 1, kept=there)
        assert torch.equal(y[:, 0].float(), x.float() @ weight.T), (last, there.transposed)
"""


def test_kept_values_are_read_up_to_the_last_and_not_beyond() -> None:
    """Tiles are read without guards where enough values follow: an access past the last value is a fault."""
    done = _python("-c", ENDS)
    assert done.returncode == 0, done.stderr


FOLLOWING = """
import torch
from fpe.bench.lab.ptx.harness import executing
from fpe.kernels import Bitmap
from fpe.kernels.partition.config import Config
from fpe.kernels.partition.triton import split_matmul_triton

config = Config(block_m=8, block_n=32, block_k=256, split=1, group=1, num_warps=4, num_stages=1, direct=True)
x = torch.ones(3, 40).bfloat16()
for following in (15, 16):
    mask = torch.zeros(130, 40, dtype=torch.bool)
    mask[:32] = True
    mask[-1, :following] = True
    kept, done = Bitmap.pack(mask), []
    values = torch.arange(kept.nnz).fmod(7).bfloat16()
    with executing(80, done):
        y = split_matmul_triton(x, values, None, 1, config=config, kept=kept)
    assert torch.equal(y[:, 0].float(), x.float() @ kept.to_dense(values).float().T), following
    (launch,) = done
    assert (launch.executed["prmt.b32"] > 0) == (following == 16), (following, launch.executed)
"""


def test_lines_of_kept_values_are_read_where_two_of_them_follow() -> None:
    """The first program's rows are whole: with 15 values behind them the second of two lines would pass the end."""
    done = _python("-c", FOLLOWING)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lying", ("plain", "strided", "padded", "broadcast", "columns", "offset"))
def test_operands_lie_as_they_are_meant_to(lying: str) -> None:
    x, _ = problem(Case("partition", "split", lying=lying)).operands
    plain = {"strided": (96, 1), "padded": (608, 1), "broadcast": (0, 1), "columns": (1, 19), "offset": (97, 1)}
    assert x.stride() == plain.get(lying, (90, 1)) and x.storage_offset() == (lying == "offset")


def test_sums_of_integers_are_exact_in_float32() -> None:
    """Of the absolute values, so of every partial sum in any order; and the last bits of an operand count."""
    for case in (case for case in CASES if case.integers and case.family != "mlp"):
        posed, draw = problem(case), _Draw(case)
        terms = posed.twin(*(operand.double().abs() for operand in posed.operands))
        assert terms.max() < min(2**24 * draw.unit, torch.finfo(TYPES[case.dtype]).max), case.id
        if case.m > 1:
            assert max(float(o.abs().max()) for o in posed.operands) > draw.full * draw.unit / 2, case.id


# What is committed.


def committed() -> Results:
    files = ("execute", *execute.FILES.values())
    return execute.together(*(Results.read(COMMITTED / f"lab/{name}.jsonl") for name in files))


def test_committed_executions_are_all_as_meant() -> None:
    results = committed()
    assert [(row["case"], row["arch"], row["status"]) for row in results.rows if not execute.good(row)] == []
    assert {(row["case"], row["arch"]) for row in results.rows} == {
        (case.id, arch) for case in CASES for arch in KNOWN if runs_on(case, arch)
    }
    approximate = {case.id for case in CASES if not case.integers or case.activation in ("gelu", "silu")}
    assert {row["case"] for row in results.rows if row["status"] != "exact"} <= approximate


def _kernels() -> dict[tuple[str, str], set[tuple[str, str]]]:
    """Every function of the package that Triton compiles, by module and name, with those that it calls."""
    modules = []
    for found in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
        try:
            modules.append(import_module(found.name))
        except ModuleNotFoundError as error:  # the kernels of CPUs, which are not Triton's
            assert error.name in ("numba", "llvmlite") and not numba_installed()
    of = {
        value: (value.fn.__module__, value.fn.__name__)
        for module in modules
        for value in vars(module).values()
        if isinstance(value, (JITFunction, InterpretedFunction)) and value.fn.__module__ == module.__name__
    }

    def called(function: Callable) -> set[tuple[str, str]]:
        known = (function.__globals__.get(name) for name in function.__code__.co_names)
        return {of[value] for value in known if isinstance(value, (JITFunction, InterpretedFunction)) and value in of}

    return {name: called(value.fn) for value, name in of.items()}


def test_every_kernel_is_executed_by_some_case() -> None:
    known = _kernels()
    helpers = {name for called in known.values() for name in called}
    launched = known.keys() - helpers
    executed = {name for row in committed().rows for name in row["kernels"]}
    unexecuted = {"_holes_move"}  # it calculates with places alone
    assert {name for _, name in launched} == executed | unexecuted and not executed & unexecuted
    assert {
        "_pack",
        "_pack_transposed",
        "_reduce",
        "multiply",
        "multiply_columns",
        "_expanded_mlp",
        "multiply_twice",
    } <= executed
    assert ("fpe.kernels.epilogue", "multiply") in helpers and len(launched) >= 14


def test_new_mutants_take_the_place_of_those_of_their_cases(tmp_path: Path) -> None:
    path, (one, other) = tmp_path / "mutation.jsonl", mutate.CASES[:2]

    def results(rows: list[tuple[int, Case, int]], most: int = 6) -> Results:
        settings = {"triton": "3.7.1", "architectures": sorted({arch for arch, *_ in rows}), "most": most}
        return Results("lab-mutation", settings, [{"arch": a, "case": case.id, "at": at} for a, case, at in rows])

    def places(found: Results) -> list[int]:
        return [row["at"] for row in found.rows]

    old, new = results([(80, one, 1), (80, other, 2), (90, one, 3)]), results([(80, one, 4), (80, one, 5)])
    assert mutate.joined(path, new, [one]) is new
    old.write(path)
    assert places(mutate.joined(path, new, [one])) == [4, 5, 2, 3]
    assert places(mutate.joined(path, new, [one, other])) == [4, 5, 3]  # of the other case none was drawn
    assert mutate.joined(path, new, [one]).settings["architectures"] == [80, 90]
    more = results([(80, one, 4)], most=7)
    assert mutate.joined(path, more, [one]) is more


def test_operations_without_mutants_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = CliRunner().invoke(cli.lab, ["mutate", "--op", "unpack"])
    assert done.exit_code == 2 and "fpe lab mutate has no case of unpack" in done.output


def test_committed_mutants_were_killed() -> None:
    """Most of them, and of every class half: what survives and why is in docs/lab.md, class by class."""
    rows = Results.read(COMMITTED / "lab/mutation.jsonl").rows
    assert {row["class"] for row in rows} == {*mutate.CLASSES}
    assert {row["case"] for row in rows} == {case.id for case in mutate.CASES}
    killed = Counter(row["class"] for row in rows if row["killed"])
    tried = Counter(row["class"] for row in rows)
    assert all(killed[name] >= 0.5 * tried[name] for name in tried), (killed, tried)
    assert sum(killed.values()) >= 0.8 * len(rows)
