"""The shipped kernels searched for hazards (:mod:`fpe.bench.lab.hazards`), one row to a binary."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import triton

from ...kernels.gpus import ARCHITECTURES as KINDS
from ...kernels.structures import TWO_FOUR
from ..families import CASES, Row
from ..results import Results
from ..table import Table
from . import compile as compiler

ARCHITECTURES = tuple(arch for arch, kind in KINDS.items() if kind.matrix != "mma")
"""Where matrix instructions run beside the program, or leave their sums in tensor memory."""
KEPT = (
    *("kernel", "arch", "case", "op", "alpha", "dtype", "tile", "split", "num_warps", "matrix", "registers", "shared"),
    *("programs_per_sm", "instructions_per_weight", "hazards", "first_hazard"),
)
"""What is kept of a compiler's row."""


def run(
    architectures: Iterable[int] = ARCHITECTURES,
    operations: Iterable[str] = (),
    kernels: str = "shipped",
    jobs: int | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda rows, total: rows,
) -> Results:
    """Compiles every shipped configuration that may use asynchronous matrix instructions, and searches its code.

    Args:
        architectures: Compute capabilities, as 90.
        operations: Names in ``OPERATIONS`` of the compiler, and :data:`TWO_FOUR` for the 2:4 kernels; none: all.
        kernels: A name for what is compiled, written to every row: rows of several trees may be put in one file.
        jobs: Processes; as many as cores when none is given.
        progress: Wraps the rows as they come, for a bar.

    Returns:
        One row for each binary that multiplies.
    """
    architectures, operations = tuple(architectures), tuple(operations)
    cases = [
        case
        for case in CASES
        if case.option in (operations or (case.option,))
        and case.dtype != "fp32"
        and (case.option != TWO_FOUR or case.op in ("forward", "dx", "dw"))
    ]
    files = compiler.by_file(cases).values()
    rows = [row for chosen in files for row in compiler.run(chosen, architectures, jobs, progress).rows]
    kept = [
        {"kernels": kernels, "triton": triton.__version__, **{name: row[name] for name in KEPT if name in row}}
        for row in rows
        if row["matrix"]
    ]
    return Results("lab-hazards", {"architectures": list(architectures)}, kept)


def joined(path: Path, results: Results, operations: Iterable[str] = ()) -> Results:
    """A file's rows with new ones in the place of those they replace.

    A file holds rows of several versions of Triton and of several trees. A new search replaces what the file has of the
    same version, tree (``kernels``), architectures and operations; the rest stays.

    Args:
        path: The file; where there is none the new rows are all.
        results: Of :func:`run`.
        operations: What was searched, as :func:`run` takes it.
    """
    searched, of = set(operations), {(row["kernels"], row["triton"]) for row in results.rows}
    architectures = set(results.settings["architectures"])

    def replaced(row: Row, settings: Mapping[str, Any]) -> bool:
        same = (row["kernels"], row["triton"]) in of and row["arch"] in architectures
        return same and (not searched or compiler.option(row) in searched)

    return compiler.insert(path, results, replaced)


def table(results: Results, by: tuple[str, ...] = ("kernels", "triton", "arch", "operation")) -> Table:
    """Binaries that multiply, those whose matrix instructions run beside the program, and those with hazards."""
    frame = pd.DataFrame({**row, "operation": operation(row), **_flags(row)} for row in results.rows)
    body = [
        (*map(str, key), f"{len(group)}", *(f"{group[name].sum()}" for name in FLAGS))
        for key, group in frame.groupby(list(by), sort=False)
    ]
    return Table("Hazards found in machine code", (*by, "binaries", *FLAGS), body)


def by_version(results: Results) -> Table:
    """Asynchronous binaries with hazards, by operation and version of Triton; nothing where none was searched."""
    frame = pd.DataFrame({**row, "operation": operation(row), **_flags(row)} for row in results.rows)
    versions = sorted(frame["triton"].unique())
    body = []
    trees = list(frame["kernels"].unique())
    # In the order of the last tree, which has every operation; the trees of each in theirs.
    order = list(frame.sort_values("kernels", key=lambda of: -of.map(trees.index), kind="stable")["operation"].unique())
    groups = frame.groupby(["operation", "kernels"], sort=False)
    for (name, kernels), group in sorted(groups, key=lambda g: (order.index(g[0][0]), trees.index(g[0][1]))):
        sums = group.groupby("triton")[list(FLAGS)].sum()
        cells = [
            "{racing} / {unfenced} / {serialised} of {asynchronous}".format(**sums.loc[version])
            if version in sums.index
            else "-"
            for version in versions
        ]
        body.append((str(name), str(kernels), *cells))
    columns = ("operation", "kernels", *(f"Triton {version}" for version in versions))
    return Table("Binaries on sm_90 that race / lack a fence / are serialised, of those with wgmma", columns, body)


SHOWN = (
    "split-alpha2-bf16-m16",
    "split-alpha2-bf16-m32",
    "split-alpha2-bf16-m64-gelu",
    "split-alpha2-bf16-m1024",
    "split-alpha4-bf16-m16",
    "split-alpha8-bf16-m16",
    "merge-alpha2-bf16-m16",
    "merge-alpha2-bf16-m1024",
    "split_t-alpha2-bf16-m16",
    "split_t-alpha2-bf16-m1024",
    "mlp-alpha2-bf16-m1-relu",
    "mlp-alpha2-bf16-m64-relu",
    "forward-bf16-2-m1",
    "forward-bf16-2-m64",
)
"""Cases of which :func:`compared` shows what they cost."""


def compared(results: Results, version: str) -> Table:
    """What the kernels of two trees cost on compute capability 9.0, with one version of Triton."""
    found = {
        (row["kernels"], row["case"]): (
            row["matrix"][0].split(".")[0],
            f"{row['instructions_per_weight']:.1f}" if "instructions_per_weight" in row else "-",
            f"{row['registers']}",
            f"{row['shared']}",
            f"{row['programs_per_sm']}",
            ", ".join("racing" if kind == "in flight" else kind for kind in row["hazards"]) or "-",
        )
        for row in results.rows
        if row["arch"] == 90 and row["triton"] == version
    }
    body = [
        (case if tree == "before" else "", tree, *found[tree, case])
        for case in SHOWN
        for tree in ("before", "after")
        if (tree, case) in found
    ]
    columns = ("case", "kernels", "matrix", "instr./weight", "registers", "shared", "programs/SM", "hazard")
    return Table(f"sm_90, Triton {version}", columns, body)


FLAGS = ("asynchronous", "racing", "unfenced", "serialised")
"""Whether matrix instructions run beside the program; and the hazards: ``"racing"`` is any but the other two."""


def _flags(row: Row) -> dict[str, bool]:
    kinds = set(row["hazards"])
    flies = any(name.startswith(("HGMMA", "UTC")) for name in row["matrix"])
    return dict(
        zip(FLAGS, (flies, bool(kinds - {"fence", "serialised"}), "fence" in kinds, "serialised" in kinds), strict=True)
    )


def operation(row: Row) -> str:
    """A row's operation, told from that of another family with the same name."""
    return f"{TWO_FOUR} {row['op']}" if compiler.option(row) == TWO_FOUR else row["op"]
