"""Memory traffic of the kernels: what they ask for, what they touch, and what reaches DRAM through an L2."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

import fpe
from fpe.kernels.block import config as block
from fpe.kernels.block.layout import BlockLayout, grid
from fpe.kernels.device import KNOWN, Device
from fpe.kernels.partition import config as partition
from fpe.kernels.partition.labels import digits, row_bytes
from fpe.kernels.semi_structured import config as semi_structured
from fpe.kernels.semi_structured.fragments import TILE_ROWS
from fpe.kernels.tables import Problem, choose

from ..results import Results
from ..table import Table
from .cache import L2, schedule
from .replay import (
    INDEX,
    Launch,
    block_launches,
    partition_launches,
    semi_structured_launches,
    sparse_tensor_core_launches,
)

Config = block.Config | partition.Config | semi_structured.Config | semi_structured.SparseConfig

OPS = ("forward", "dX", "dW")
"""Of an expanded layer."""
MERGED_OPS = ("merged forward", "merged dX", "merged dW")
"""Of the layer that reads one child an edge; ``"random"`` labels only."""
SPARSE = "forward, mma.sp"
"""The forward on sparse tensor cores, of ``"2:4"`` layers only; the other operations are those on dense ones."""
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
        block: ``(bn, bk)``; none for labels that follow no blocks.
        quads: Whether the labels are 2:4 and the layer runs on the semi-structured kernels.
        dropped: Share of the blocks that are dropped.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
    """

    m: int
    n: int
    k: int
    alpha: int = 2
    block: tuple[int, int] | None = (64, 64)
    dropped: float = 0.0
    dtype: str = "bf16"
    quads: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations that its kernels have."""
        if self.quads:
            return OPS if self.dtype == "fp32" else (*OPS, SPARSE)
        return OPS if self.block else OPS + MERGED_OPS

    @property
    def kind(self) -> str:
        """``"2:4"``, a block's sides, or ``"none"``."""
        return "2:4" if self.quads else f"{self.block[0]}x{self.block[1]}" if self.block else "none"


class Layer(Protocol):
    """A layer as its kernels see it: what :func:`measure` asks of a family."""

    def problem(self, op: str) -> Problem[Any]:
        """What the launcher chooses a configuration for."""

    def launches(self, op: str, config: Any) -> list[Launch]:
        """What the launcher launches."""

    def on_chip(self, op: str, config: Any, device: Device) -> tuple[int, int]:
        """Of a program: bytes of shared memory, and float32 accumulators."""

    def compulsory(self, op: str) -> int:
        """Bytes that any kernel must move: each operand and each result once."""

    def results(self, op: str) -> int:
        """Numbers that the operation returns."""


@dataclass(frozen=True)
class BlockLayer:
    """A layer of blocks: a block partition, child by child, without the blocks dropped at random."""

    case: Case
    layout: BlockLayout

    def problem(self, op: str) -> block.Problem:
        """See :class:`Layer`."""
        if op == "dW":
            return block.grad_problem(self.layout, self.case.m, self.case.itemsize)
        return block.matmul_problem(self.layout, op == "dX", self.case.m, self.case.itemsize)

    def launches(self, op: str, config: block.Config) -> list[Launch]:
        """See :class:`Layer`."""
        return block_launches(op, self.case.m, self.layout, config, self.case.itemsize)

    def on_chip(self, op: str, config: block.Config, device: Device) -> tuple[int, int]:
        """See :class:`Layer`."""
        problem = self.problem(op)
        columns = problem.block[1] if op == "dW" else config.block_m
        return block.shared_bytes(problem, config), columns * problem.block[0]

    def compulsory(self, op: str) -> int:
        """The blocks as stored, the index tensors that the kernel reads, inputs that some block meets, all results."""
        size, m, (bn, bk), (n, k) = self.case.itemsize, self.case.m, self.layout.block, self.layout.shape
        blocks, (segments_n, segments_k) = self.layout.rows.shape[0], self.layout.grid
        used_n = min(len(self.layout.rows.unique()) * bn, n)
        used_k = min(len(self.layout.cols.unique()) * bk, k)
        index = {"forward": blocks + 2 * segments_n + 1, "dX": 2 * blocks + 2 * segments_k + 1, "dW": 2 * blocks}[op]
        sides = {"forward": used_k + n, "dX": used_n + k, "dW": used_n + used_k}[op]
        return size * (blocks * bn * bk + m * sides) + INDEX * index

    def results(self, op: str) -> int:
        """See :class:`Layer`."""
        return {
            "forward": self.case.m * self.layout.shape[0],
            "dX": self.case.m * self.case.k,
            "dW": self.layout.rows.shape[0] * prod(self.layout.block),
        }[op]


@dataclass(frozen=True)
class PartitionLayer:
    """A layer of labels that follow no blocks: expanded ``[n, k]``, or (``"merged ..."``) its successor ``[n, k]``."""

    case: Case

    def problem(self, op: str) -> partition.Problem:
        """See :class:`Layer`."""
        merged, what = op.startswith("merged"), op.split()[-1]
        split = merged == (what == "dX")
        name = "partition_grad" if what == "dW" else "split_matmul" if split else "merge_matmul"
        transposed = merged if what == "dW" else what == "dX"
        c = self.case
        pairs = c.itemsize == 2 and c.k % 2 == 0
        return partition.Problem(name, c.m, c.n, c.k, transposed, c.alpha, c.itemsize, pairs)

    def launches(self, op: str, config: partition.Config) -> list[Launch]:
        """See :class:`Layer`."""
        return partition_launches(self.problem(op), config)

    def on_chip(self, op: str, config: partition.Config, device: Device) -> tuple[int, int]:
        """See :class:`Layer`."""
        problem = self.problem(op)
        sums = 1 if problem.op == "merge_matmul" else problem.alpha
        columns = config.block_n if problem.transposed else config.block_k
        tile = config.block_n * config.block_k
        area = tile if problem.op == "partition_grad" else config.block_m * tile // columns
        shares = partition.warps_of(config, problem.transposed)[0] if config.direct else 1
        return partition.shared_bytes(problem, config, device), shares * sums * area

    def compulsory(self, op: str) -> int:
        """The parent's weights or their gradient, the labels' bits, activations and results, each once."""
        c = self.case
        narrow, wide = (c.n, c.k) if op.startswith("merged") else (c.k, c.n)
        weights = c.itemsize * c.n * c.k + digits(c.alpha) * c.n * row_bytes(c.k)
        return weights + c.itemsize * c.m * (narrow + c.alpha * wide)

    def results(self, op: str) -> int:
        """See :class:`Layer`."""
        c, problem = self.case, self.problem(op)
        if problem.op == "partition_grad":
            return c.n * c.k
        outputs = c.k if problem.transposed else c.n
        return c.m * outputs * (1 if problem.op == "merge_matmul" else c.alpha)


@dataclass(frozen=True)
class SemiStructuredLayer:
    """An expanded layer of two 2:4 children."""

    case: Case

    def problem(self, op: str) -> semi_structured.Problem | semi_structured.SparseProblem:
        """See :class:`Layer`."""
        c = self.case
        return semi_structured.SparseProblem(c.m, c.n, c.k, 2) if op == SPARSE else self._on_dense(op)

    def _on_dense(self, op: str) -> semi_structured.Problem:
        c = self.case
        return semi_structured.Problem(_SEMI_STRUCTURED[op], c.m, c.n, c.k, 2, c.itemsize)

    def launches(self, op: str, config: Any) -> list[Launch]:
        """See :class:`Layer`."""
        c = self.case
        if op == SPARSE:
            return sparse_tensor_core_launches(c.m, (c.n, c.k), 2, config)
        return semi_structured_launches(op, c.m, (c.n, c.k), 2, config, c.itemsize)

    def on_chip(self, op: str, config: Any, device: Device) -> tuple[int, int]:
        """See :class:`Layer`."""
        if op == SPARSE:
            return config.num_stages * semi_structured.stage_bytes(config.block_m, 2), 2 * TILE_ROWS * config.block_m
        used = semi_structured.shared_bytes(self._on_dense(op), config)
        m, n, k = config.block_m, config.block_n, config.block_k
        return used, {"forward": 2 * n * m, "dX": m * k, "dW": 2 * n * k}[op]

    def compulsory(self, op: str) -> int:
        """The parent's weights or their gradient, half a byte a quad, activations and results, each once."""
        c = self.case
        quads = -(-c.k // 4)
        return c.n * (4 * quads * c.itemsize + -(-quads // 2)) + c.itemsize * c.m * (c.k + 2 * c.n)

    def results(self, op: str) -> int:
        """See :class:`Layer`."""
        c = self.case
        return {"dX": c.m * c.k, "dW": 4 * c.n * -(-c.k // 4)}.get(op, 2 * c.m * c.n)


_SEMI_STRUCTURED = {
    "forward": "semi_structured_matmul",
    "dX": "semi_structured_matmul_t",
    "dW": "semi_structured_grad",
}


def layer(case: Case, seed: int = 0) -> BlockLayer | PartitionLayer | SemiStructuredLayer:
    """The layer of a case. With ``alpha`` of 1 it is the parent: a dense matmul in the block kernels."""
    if case.quads:
        return SemiStructuredLayer(case)
    if case.block is None:
        return PartitionLayer(case)
    generator = torch.Generator().manual_seed(seed)
    (bn, bk), n, k = case.block, case.n, case.k
    if case.alpha == 1:
        labels = torch.zeros(grid((n, k), case.block))
    else:
        labels = fpe.Partition.block(n, k, case.alpha, block=case.block, generator=generator).labels[::bn, ::bk]
    kept = torch.rand(labels.shape, generator=generator) >= case.dropped
    mask = torch.cat([(labels == child) & kept for child in range(case.alpha)])
    return BlockLayer(case, BlockLayout.from_mask(mask, (case.alpha * labels.shape[0] * bn, k), case.block))


def occupancy(op: str, config: Config, of: Layer, device: Device) -> int:
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
    config: Config | None = None,
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
        "kept": round(1 - case.dropped, 4),
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
    n: int | None = None,
    k: int | None = None,
    alpha: int = 2,
    block: tuple[int, int] | None = None,
    structure: str | None = None,
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
    structures = [structure] if structure else ["block"] if block else ["block", "random", "2:4"]
    structures = [name for name in structures if name != "2:4" or alpha == 2]
    tiles = {"block": block or (64, 64)}
    cases = [
        Case(rows, *shape, alpha, tiles.get(name), dropped if name == "block" else 0.0, dtype, name == "2:4")
        for name in structures
        for shape in shapes
        for rows in m or ((1, 64) if quick else ROWS)
    ]
    parents = [
        Case(c.m, c.n, c.k, 1, (128, 128), dtype=c.dtype) for c in cases if c.m >= 1024 and c.block and alpha > 1
    ]
    return cases + parents


def table(results: Results) -> Table:
    """Megabytes by operation and size."""
    columns = ("op", "M", "layer", "N x K", "asked", "unique", "DRAM", "least", "parent", "wide", "ratio")
    rows = [
        (
            row["op"],
            f"{row['M']}",
            "parent"
            if row["alpha"] == 1
            else {"none": "labels", "2:4": "2:4"}.get(row["block"], f"blocks {row['block']}"),
            f"{row['N']}x{row['K']}",
            *(f"{row[name] / 1e6:.1f}" for name in ("requested", "unique", "dram", "compulsory", "parent", "wide")),
            f"{row['ratio']:.3f}",
        )
        for row in results.rows
    ]
    s = results.settings
    expanded = (row for row in results.rows if row["alpha"] > 1)
    kinds = ", ".join(sorted({f"alpha {row['alpha']}, {row['dtype']}" for row in expanded}))
    title = (
        f"Traffic in MB, simulated: sm_{s['arch']}, {s['sms']} multiprocessors, {s['l2'] / 1e6:.0f} MB of L2; "
        f"{kinds}; least: compulsory; ratio: DRAM / least"
    )
    return Table(title, columns, rows)
