"""Executes cases and judges their results: ``fpe lab execute``.

On small integers every partial sum is exact, so that the result must be the twin's in float64, rounded once to the
stored type, bit for bit. GELU and SiLU are approximations on the device and of tolerance here; so are the sums of
normally distributed operands. The tolerances are derived, see :func:`tolerance`.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product, starmap
from multiprocessing import get_context
from typing import Any

import torch
import triton
from torch import Tensor

from ....kernels.device import KNOWN
from ...results import Results
from ...table import Table
from .cases import CASES, TYPES, Case, Problem, problem, runs_on
from .harness import Change, Execution, executing
from .machine import MOST_INSTRUCTIONS, Handler, UnknownOpcode
from .memory import Fault

ARCHITECTURES = tuple(KNOWN)
Row = dict[str, Any]


def execute(
    case: Case,
    arch: int,
    change: Change = lambda kernel: kernel,
    watch: Handler | None = None,
    limit: int = MOST_INSTRUCTIONS,
) -> Row:
    """Executes one case.

    Args:
        case: What to run.
        arch: Compute capability, as 80.
        change: Done to every kernel before.
        watch: Looks at every instruction, see :class:`.machine.Machine`.
        limit: Instructions after which a launch counts as endless.

    Returns:
        A row: ``status`` is ``"exact"``, ``"within tolerance"``, or what is wrong, in words.
    """
    posed = problem(case)
    start = time.perf_counter()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    executed: Counter[str] = Counter()
    launched: list[Execution] = []
    try:
        with executing(arch, launched, change, watch=watch, limit=limit):
            got = posed.kernel(*posed.operands)
        status = judge(case, posed, got)
    except Fault as fault:
        status = str(fault)
    except UnknownOpcode as unknown:
        status = f"not executed: no handler for {unknown}"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for launch in launched:
        executed += launch.executed
    return {
        "arch": arch,
        "case": case.id,
        "family": case.family,
        "op": case.op,
        "dtype": case.dtype,
        "kernels": [launch.kernel.name for launch in launched],
        "programs": sum(launch.ctas for launch in launched),
        "instructions": sum(executed.values()),
        "opcodes": sorted(executed),
        "status": status,
        "seconds": round(time.perf_counter() - start, 3),
    }


def judge(case: Case, posed: Problem, got: Tensor) -> str:
    """Compares a result with the twin's: ``"exact"``, ``"within tolerance"`` or what is wrong."""
    sums = posed.twin(*(operand.double() for operand in posed.operands))
    want = posed.finish(sums)
    if tuple(got.shape) != tuple(want.shape) or got.dtype != TYPES[case.dtype]:
        return f"wrong: {got.dtype} {list(got.shape)}, not {TYPES[case.dtype]} {list(want.shape)}"
    approximate = case.activation in ("gelu", "silu")
    if case.integers and not approximate:
        wrong = got != want.to(got.dtype)
        return f"wrong: {int(wrong.sum())} of {wrong.numel()} elements" if wrong.any() else "exact"
    most = tolerance(case, posed, sums, want)
    error = (got.double() - want).abs()
    if not bool((error <= most).all()):
        return f"wrong: {int((~(error <= most)).sum())} of {error.numel()} elements are not within tolerance"
    return "within tolerance"


def tolerance(case: Case, posed: Problem, sums: Tensor, want: Tensor) -> Tensor:
    """How far each element may be from the twin's.

    Half a unit of the stored type; for activations 2**-20 of what goes into them (their instructions are good to 2
    units of float32, erf and exp take a few); for operands that are no integers, a float32 rounding for every term of
    a sum, relative to the sum of absolute values, TF32's cut of both operands to ten bits, and the rounding of the
    MLP's hidden activations to the stored type.
    """
    unit = torch.finfo(TYPES[case.dtype]).eps
    most = unit / 2 * want.abs() * (1 + unit) + torch.finfo(TYPES[case.dtype]).tiny
    if case.activation in ("gelu", "silu"):
        most = most + 2.0**-20 * (1 + sums.abs())
    if not case.integers:
        terms = posed.twin(*(operand.double().abs() for operand in posed.operands))
        most = most + (posed.length + 16) * 2.0**-24 * terms
        if case.dtype == "tf32":
            most = most + 2.0**-9 * terms
        if case.family == "mlp":
            most = most + unit / 2 * terms
    return most


def good(row: Row) -> bool:
    """Whether a row is as it should be."""
    return row["status"] in ("exact", "within tolerance")


def run(
    cases: Iterable[Case] = CASES,
    architectures: Iterable[int] = ARCHITECTURES,
    jobs: int | None = 1,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda rows, total: rows,
) -> Results:
    """Executes cases on architectures, one row for each pair that an architecture runs.

    A row has the number of its opcodes, the settings have every architecture's.

    Args:
        cases: What to run.
        architectures: Compute capabilities, as 80.
        jobs: Processes; as many as cores when none is given.
        progress: Wraps the rows as they come, for a bar.
    """
    cases, architectures = tuple(cases), tuple(architectures)
    pairs = [(case, arch) for arch, case in product(architectures, cases) if runs_on(case, arch)]
    rows = list(progress(in_parallel(execute, pairs, jobs), len(pairs)))
    known: dict[str, set[str]] = {str(arch): set() for arch in architectures}
    for row in rows:
        known[str(row["arch"])].update(row["opcodes"])
        row["opcodes"] = len(row["opcodes"])
    settings = {
        "triton": triton.__version__,
        "architectures": list(architectures),
        "cases": len(cases),
        "opcodes": {arch: sorted(names) for arch, names in known.items()},
    }
    return Results("lab-execute", settings, rows)


FILES = {"bitmap": "execute-bitmap"}
"""Where rows of a family go that are not in the file of most."""


def by_file(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Cases by the file of results that their rows go to."""
    files: dict[str, list[Case]] = {}
    for case in cases:
        files.setdefault(FILES.get(case.family, "execute"), []).append(case)
    return files


def together(first: Results, *others: Results) -> Results:
    """Rows of several files as of one."""
    every = (first, *others)
    opcodes: dict[str, set[str]] = {}
    for results in every:
        for arch, names in results.settings["opcodes"].items():
            opcodes.setdefault(arch, set()).update(names)
    settings = {
        **first.settings,
        "cases": sum(results.settings["cases"] for results in every),
        "opcodes": {arch: sorted(names) for arch, names in opcodes.items()},
    }
    return Results(first.study, settings, [row for results in every for row in results.rows], first.provenance)


def in_parallel(function: Callable[..., Any], arguments: list[tuple[Any, ...]], jobs: int | None) -> Iterator[Any]:
    """The results of a function in the order of its arguments, from so many processes."""
    if jobs == 1:
        yield from starmap(function, arguments)
        return
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, *zip(*arguments, strict=True))


FAMILIES = {
    "partition": "partition",
    "block": "block",
    "mlp": "fused MLP",
    "semi_structured": "2:4, dense mma",
    "sparse": "2:4, mma.sp",
    "pack": "2:4, packed",
    "bitmap": "kept values",
}


def table(results: Results) -> Table:
    """What was executed on each architecture."""
    rows = []
    for arch in results.settings["architectures"]:
        own = [row for row in results.rows if row["arch"] == arch]
        counts = Counter(row["family"] for row in own)
        status = Counter(row["status"] if good(row) else "else" for row in own)
        rows.append(
            (
                f"sm_{arch}",
                *(str(counts[family]) if counts[family] else "-" for family in FAMILIES),
                str(len(own)),
                str(status["exact"]),
                str(status["within tolerance"]),
                str(status["else"]),
                str(len(results.settings["opcodes"][str(arch)])),
                f"{sum(row['instructions'] for row in own):,}",
            )
        )
    columns = (
        "architecture",
        *FAMILIES.values(),
        "cases",
        "bit-exact",
        "within tolerance",
        "not as meant",
        "full opcodes",
        "instructions executed",
    )
    return Table(f"PTX of Triton {results.settings['triton']}, executed", columns, rows)


def complaints(results: Results) -> Table:
    """The cases that are not as they should be."""
    rows = [(f"{row['case']}, sm_{row['arch']}", row["status"]) for row in results.rows if not good(row)]
    return Table(f"{len(rows)} of {len(results.rows)} cases are not as meant", ("case", "what happened"), rows)
