"""Memory traffic of the block kernels: what they ask for, what they touch, and what reaches DRAM through an L2."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

import fpe
from fpe.kernels.block.config import Config, choose, grad_problem, matmul_problem, shared_bytes
from fpe.kernels.block.layout import BlockLayout, grid
from fpe.kernels.device import KNOWN, Device

from ..results import Results
from ..summary import Table
from .cache import L2, schedule
from .replay import INDEX, launches

OPS = ("forward", "dX", "dW")
SHAPES = ((14336, 4096), (4096, 14336))
"""``(N, K)`` of the parent: the two matrices of Llama-3-8B's MLP."""
ROWS = (1, 16, 64, 1024, 8192)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Case:
    """A layer and a batch.

    Attributes:
        m: Rows of activations.
        n: Output features of the parent.
        k: Input features.
        alpha: Children per parent.
        block: ``(bn, bk)``.
        dropped: Share of the blocks that are dropped.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
    """

    m: int
    n: int
    k: int
    alpha: int = 2
    block: tuple[int, int] = (64, 64)
    dropped: float = 0.0
    dtype: str = "bf16"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]


def layer(case: Case, seed: int = 0) -> BlockLayout:
    """The layout of an expanded layer: a block partition, child by child, without the blocks dropped at random.

    With ``alpha`` of 1 it is the parent: a dense matmul in the same kernels.
    """
    generator = torch.Generator().manual_seed(seed)
    (bn, bk), n, k = case.block, case.n, case.k
    if case.alpha == 1:
        labels = torch.zeros(grid((n, k), case.block))
    else:
        labels = fpe.Partition.block(n, k, case.alpha, block=case.block, generator=generator).labels[::bn, ::bk]
    kept = torch.rand(labels.shape, generator=generator) >= case.dropped
    mask = torch.cat([(labels == child) & kept for child in range(case.alpha)])
    return BlockLayout.from_mask(mask, (case.alpha * labels.shape[0] * bn, k), case.block)


def config_of(op: str, case: Case, layout: BlockLayout, device: Device) -> Config:
    """The configuration that the launcher of an operation takes on a device."""
    if op == "dW":
        return choose(grad_problem(layout, case.m, case.itemsize), device)
    return choose(matmul_problem(layout, op == "dX", case.m, case.itemsize), device)


def occupancy(op: str, config: Config, layout: BlockLayout, itemsize: int, device: Device) -> int:
    """Programs that a multiprocessor holds: by shared memory, by 64 warps, and by 65,536 registers.

    Registers are estimated as the float32 accumulator and 64 more a thread; ``fpe lab compile`` has the true ones.
    """
    block = layout.block[::-1] if op == "dX" else layout.block
    rows = block[1] if op == "dW" else config.block_m
    used = shared_bytes("block_grad" if op == "dW" else "block_matmul", config, block, itemsize)
    registers = rows * block[0] + 64 * 32 * config.num_warps
    return max(min(device.shared // max(used, 1), 64 // config.num_warps, 65_536 // registers), 1)


def compulsory(op: str, case: Case, layout: BlockLayout) -> dict[str, int]:
    """Bytes that any kernel must move: each operand and each result once; of the layer, its parent and its wide twin.

    A layer's weight counts with the blocks kept, as stored, and the index tensors that the kernel reads. Inputs that no
    kept block meets are not counted; results are, all of them.
    """
    size, m, (bn, bk), (n, k) = case.itemsize, case.m, layout.block, layout.shape
    blocks, (segments_n, segments_k) = layout.rows.shape[0], layout.grid
    used_n, used_k = min(len(layout.rows.unique()) * bn, n), min(len(layout.cols.unique()) * bk, k)
    index = {"forward": blocks + 2 * segments_n + 1, "dX": 2 * blocks + 2 * segments_k + 1, "dW": 2 * blocks}[op]
    sides = {"forward": used_k + n, "dX": used_n + k, "dW": used_n + used_k}[op]

    def dense(outputs: int) -> int:
        return size * (outputs * case.k + m * case.k + m * outputs)

    return {
        "compulsory": size * (blocks * bn * bk + m * sides) + INDEX * index,
        "parent": dense(case.n),
        "wide": dense(case.alpha * case.n),
    }


def measure(
    op: str,
    case: Case,
    layout: BlockLayout,
    device: Device = KNOWN[90],
    l2: float = 50e6,
    config: Config | None = None,
    coarse: bool = True,
) -> dict[str, Any]:
    """Runs one operation's accesses through the simulated L2.

    Args:
        op: ``"forward"``, ``"dX"`` or ``"dW"``.
        case: Sizes.
        layout: From :func:`layer`.
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
    config = config or config_of(op, case, layout, device)
    programs = occupancy(op, config, layout, case.itemsize, device)
    memory = L2(l2)
    for launch in launches(op, case.m, layout, config, case.itemsize):
        for access in schedule(launch, programs * device.sms):
            memory.access(access, coarse)
    memory.flush()
    least = compulsory(op, case, layout)
    outputs = {
        "forward": case.m * layout.shape[0],
        "dX": case.m * case.k,
        "dW": layout.rows.shape[0] * prod(case.block),
    }
    dram = memory.read + memory.written
    return {
        "op": op,
        "M": case.m,
        "N": case.n,
        "K": case.k,
        "alpha": case.alpha,
        "block": f"{case.block[0]}x{case.block[1]}",
        "kept": round(1 - case.dropped, 4),
        "dtype": case.dtype,
        "block_m": config.block_m,
        "split": config.split,
        "group_m": config.group_m,
        "programs": programs,
        "requested": memory.requested,
        "unique": memory.unique,
        "read": memory.read,
        "written": memory.written,
        "scratch": 4 * config.split * outputs[op] if config.split > 1 else 0,
        "dram": dram,
        **least,
        "ratio": dram / least["compulsory"],
    }


def run(
    cases: Iterable[Case],
    device: Device = KNOWN[90],
    l2: float = 50e6,
    seed: int = 0,
    group_m: int | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Results:
    """Measures forward, dX and dW of every case.

    Args:
        cases: What to measure.
        device: See :func:`measure`.
        l2: Bytes of L2.
        seed: Of the partitions.
        group_m: Another ``group_m`` than the configurations have, to try.
        report: Called with each row as it is ready.
    """
    rows, cases = [], list(cases)
    for case in cases:
        layout = layer(case, seed)
        for op in OPS:
            config = config_of(op, case, layout, device)
            row = measure(op, case, layout, device, l2, config if group_m is None else replace(config, group_m=group_m))
            rows.append(row)
            report(row)
    settings = {"arch": device.arch, "sms": device.sms, "l2": l2, "seed": seed, "source": "simulated"}
    return Results("traffic", settings, rows)


def cases_of(
    m: tuple[int, ...] = (),
    n: int | None = None,
    k: int | None = None,
    alpha: int = 2,
    block: tuple[int, int] = (64, 64),
    dropped: float = 0.0,
    dtype: str = "bf16",
    quick: bool = False,
) -> list[Case]:
    """The cases that the command line asks for: its own sizes, or those of an LLM's MLP; small ones with ``quick``.

    Where operands outgrow an L2 the parent's dense matmul follows, in tiles of 128 x 128, for comparison.
    """
    shapes: Iterable[tuple[int, int]] = ((512, 256), (256, 512)) if quick else SHAPES
    if n is not None or k is not None:
        shapes = [(n or k or 0, k or n or 0)]
    cases = [
        Case(rows, *shape, alpha, block, dropped, dtype)
        for shape in shapes
        for rows in m or ((1, 64) if quick else ROWS)
    ]
    parents = [Case(c.m, c.n, c.k, 1, (128, 128), dtype=c.dtype) for c in cases if c.m >= 1024 and alpha > 1]
    return cases + parents


def table(results: Results) -> Table:
    """Megabytes by operation and size."""
    columns = ("op", "M", "layer", "N x K", "asked", "unique", "DRAM", "least", "parent", "wide", "ratio")
    rows = [
        (
            row["op"],
            f"{row['M']}",
            "parent" if row["alpha"] == 1 else f"alpha {row['alpha']}",
            f"{row['N']}x{row['K']}",
            *(f"{row[name] / 1e6:.1f}" for name in ("requested", "unique", "dram", "compulsory", "parent", "wide")),
            f"{row['ratio']:.3f}",
        )
        for row in results.rows
    ]
    s = results.settings
    expanded = (row for row in results.rows if row["alpha"] > 1)
    blocks = ", ".join(sorted({f"alpha {row['alpha']}, {row['block']} {row['dtype']}" for row in expanded}))
    title = (
        f"Traffic in MB, simulated: sm_{s['arch']}, {s['sms']} multiprocessors, {s['l2'] / 1e6:.0f} MB of L2; "
        f"{blocks}; least: compulsory; ratio: DRAM / least"
    )
    return Table(title, columns, rows)
