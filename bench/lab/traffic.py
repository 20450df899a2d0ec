"""Memory traffic of the kernels: what they ask for, what they touch, and what reaches DRAM through an L2."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

import fpe
from fpe.kernels.block.layout import BlockLayout, grid
from fpe.kernels.device import KNOWN, Device
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED, TWO_FOUR, admitted
from fpe.kernels.tables import choose

from ..families import bitmap, block, partition, semi_structured
from ..families.accesses import Case, Layer
from ..results import Results
from ..table import Table
from .cache import L2, schedule

SHAPES = ((14336, 4096), (4096, 14336))
"""``(N, K)`` of the parent: the two matrices of Llama-3-8B's MLP."""
ROWS = (1, 16, 64, 1024, 8192)


def layer(case: Case, seed: int = 0) -> Layer:
    """The layer of a case. With ``alpha`` of 1 it is the parent: a dense matmul in the block kernels."""
    if case.kept is not None:
        return bitmap.Layer(case)
    if case.structure == TWO_FOUR:
        return semi_structured.Layer(case)
    if case.structure in (RANDOM, SEEDED):
        return partition.Layer(case)
    generator = torch.Generator().manual_seed(seed)
    (bn, bk), n, k = case.block, case.n, case.k
    if case.alpha == 1:
        labels = torch.zeros(grid((n, k), case.block))
    else:
        labels = fpe.Partition.block(n, k, case.alpha, block=case.block, generator=generator).labels[::bn, ::bk]
    kept = torch.rand(labels.shape, generator=generator) >= case.dropped
    mask = torch.cat([(labels == child) & kept for child in range(case.alpha)])
    return block.Layer(case, BlockLayout.from_mask(mask, (case.alpha * labels.shape[0] * bn, k), case.block))


def occupancy(op: str, config: Any, of: Layer, device: Device) -> int:
    """Programs that a multiprocessor holds: by shared memory, by 64 warps, and by 65,536 registers.

    Registers are estimated as the float32 accumulators and 64 more a thread; ``fpe lab compile`` has the true ones.
    """
    used, accumulators = of.on_chip(op, config, device)
    registers = accumulators + 64 * 32 * config.num_warps
    return max(min(device.shared // max(used, 1), 64 // config.num_warps, 65_536 // registers), 1)


def measure(
    op: str,
    case: Case,
    of: Layer,
    device: Device = KNOWN[90],
    l2: float = 50e6,
    config: Any = None,
    coarse: bool = True,
) -> dict[str, Any]:
    """Runs one operation's accesses through the simulated L2.

    Args:
        op: A name in ``case.ops``.
        case: Sizes.
        of: From :func:`layer`.
        device: Chooses the configuration and says how many programs run at a time.
        l2: Bytes of L2.
        config: A configuration instead of the chosen one.
        coarse: Whether lines that are touched together are simulated together; much faster.

    Returns:
        A row: the case, the configuration, and bytes ``requested``, ``unique``, ``dram`` (``read`` + ``written``,
        what is dirty at the end included), ``compulsory``, ``parent``, ``wide``; ``ratio`` is ``dram / compulsory``.
        ``scratch`` is what a split kernel hands to its reduction. It is in ``written``, though nobody reads it again:
        on a device the next operation may overwrite it while it is still in L2.
    """
    config = config or choose(of.problem(op), device)
    programs = occupancy(op, config, of, device)
    memory = L2(l2)
    for launch in of.launches(op, config):
        for access in schedule(launch, programs * device.sms):
            memory.access(access, coarse)
    memory.flush()
    least, dram, size = of.compulsory(op), memory.read + memory.written, case.itemsize
    sides = (case.n, case.k) if op.startswith("merged") else (case.k, case.n)
    return {
        "op": op,
        "M": case.m,
        "N": case.n,
        "K": case.k,
        "alpha": case.alpha,
        "block": case.kind,
        "kept": round(1 - case.dropped, 4) if case.kept is None else case.kept,
        "dtype": case.dtype,
        "config": dataclasses.asdict(config),
        "programs": programs,
        "requested": memory.requested,
        "unique": memory.unique,
        "read": memory.read,
        "written": memory.written,
        "scratch": 4 * config.split * of.results(op) if config.split > 1 else 0,
        "dram": dram,
        "compulsory": least,
        "parent": size * (case.n * case.k + case.m * sum(sides)),
        "wide": size * (case.alpha * case.n * case.k + case.m * (sides[0] + case.alpha * sides[1])),
        "ratio": dram / least,
    }


def run(
    cases: Iterable[Case],
    device: Device = KNOWN[90],
    l2: float = 50e6,
    seed: int = 0,
    group: int | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Results:
    """Measures all operations of every case.

    Args:
        cases: What to measure.
        device: See :func:`measure`.
        l2: Bytes of L2.
        seed: Of the partitions.
        group: Another grouping of the programs than the configurations have, to try.
        report: Called with each row as it is ready.
    """
    rows, cases = [], list(cases)
    for case in cases:
        of = layer(case, seed)
        for op in case.ops:
            problem: Any = of.problem(op)
            config = choose(problem, device)
            if group is not None:
                config = dataclasses.replace(config, group=group)
            row = measure(op, case, of, device, l2, config)
            rows.append(row)
            report(row)
    settings = {"arch": device.arch, "sms": device.sms, "l2": l2, "seed": seed, "source": "simulated"}
    return Results("traffic", settings, rows)


def cases_of(
    m: tuple[int, ...] = (),
    shape: tuple[int, int] | None = None,
    alpha: int = 2,
    block: tuple[int, int] | None = None,
    structure: str | None = None,
    dropped: float = 0.0,
    kept: tuple[float, ...] = (),
    dtype: str = "bf16",
    quick: bool = False,
) -> list[Case]:
    """The cases that the command line asks for: its own sizes, or those of an LLM's MLP; small ones with ``quick``.

    Where operands outgrow an L2 the parent's dense matmul follows, in tiles of 128 x 128, for comparison.
    """
    shapes: Iterable[tuple[int, int]] = [shape] if shape else ((512, 256), (256, 512)) if quick else SHAPES
    if kept:
        few = m or ROWS[:3]
        return [
            Case(rows, *size, alpha, RANDOM, dtype, kept=share) for share in kept for size in shapes for rows in few
        ]
    structures = [structure] if structure else [BLOCK] if block else [BLOCK, RANDOM, TWO_FOUR, SEEDED]
    cases = [
        Case(rows, *size, alpha, name, dtype, block or (64, 64), dropped=dropped if name == BLOCK else 0.0)
        for name in structures
        if name in admitted(alpha)
        for size in shapes
        for rows in m or ((1, 64) if quick else ROWS)
    ]
    large = [c for c in cases if c.m >= 1024 and c.structure == BLOCK and alpha > 1]
    parents = [dataclasses.replace(c, alpha=1, block=(128, 128), dropped=0.0) for c in large]
    return cases + parents


def table(results: Results) -> Table:
    """Megabytes by operation and size."""
    columns = ("op", "M", "layer", "N x K", "asked", "unique", "DRAM", "least", "parent", "wide", "ratio")
    rows = [
        (
            row["op"],
            f"{row['M']}",
            "parent"
            if row["alpha"] == 1 and row["block"] != "kept"
            else {"none": "labels", TWO_FOUR: TWO_FOUR, SEEDED: "seed", "kept": f"kept {row['kept']:g}"}.get(
                row["block"], f"blocks {row['block']}"
            ),
            f"{row['N']}x{row['K']}",
            *(f"{row[name] / 1e6:.1f}" for name in ("requested", "unique", "dram", "compulsory", "parent", "wide")),
            f"{row['ratio']:.3f}",
        )
        for row in results.rows
    ]
    s = results.settings
    expanded = (row for row in results.rows if row["alpha"] > 1 or row["block"] == "kept")
    kinds = ", ".join(sorted({f"alpha {row['alpha']}, {row['dtype']}" for row in expanded}))
    title = (
        f"Traffic in MB, simulated: sm_{s['arch']}, {s['sms']} multiprocessors, {s['l2'] / 1e6:.0f} MB of L2; "
        f"{kinds}; least: compulsory; ratio: DRAM / least"
    )
    return Table(title, columns, rows)
