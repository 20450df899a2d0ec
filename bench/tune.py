"""Fills the tables of tuned configurations on the GPU at hand.

For each operation, structure and batch size every valid candidate is first compared with the eager twin and then timed
with a cold L2; the fastest goes into ``block_sm<arch>.json`` or ``partition_sm<arch>.json``, best so far written after
each problem, so that a cut run leaves usable tables.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fpe
from fpe.kernels import (
    BlockLayout,
    PackedLabels,
    block_grad_eager,
    block_matmul_eager,
    block_matmul_t_eager,
    merge_matmul_eager,
    partition_grad_eager,
    split_matmul_eager,
)
from fpe.kernels.block import config as block_config
from fpe.kernels.device import Device
from fpe.kernels.partition import config as partition_config

from .results import provenance

OPERATIONS = ("forward", "dX", "dW")
BLOCKS = ((64, 64), (128, 128), (128, 64), (64, 128), (32, 32), (16, 64), (16, 16))
ALPHAS = (2, 4, 8)
ROWS = (16, 64, 256, 1024, 8192)
SHAPE = (4096, 4096)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-2}
"""Relative error in the Frobenius norm at which a candidate is wrong; float32 may run in TF32."""


Config = block_config.Config | partition_config.Config
Setup = tuple[Callable[..., Tensor], Callable[[], Tensor], Any]
"""A launcher and an eager twin on the same random data, and the problem that the chooser sees."""


@dataclass(frozen=True)
class BlockJob:
    """One entry of the block table.

    Attributes:
        op: ``"forward"``, ``"dX"`` or ``"dW"``.
        block: ``(bn, bk)``.
        m: Rows of activations.
        dtype: Of the operands.
        shape: ``(N, K)`` of the parent; alpha is 2.
    """

    op: str
    block: tuple[int, int]
    m: int
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int] = SHAPE
    family = "block"

    @property
    def id(self) -> str:
        """As ``dX (64, 64) m=16 torch.bfloat16``."""
        return f"{self.op} {self.block} m={self.m} {self.dtype}"

    def small(self) -> "BlockJob":
        """The same at a size that the interpreter can walk."""
        return replace(self, m=5, shape=(64, 64), block=(16, 32), dtype=torch.float32)

    def choose(self, problem: block_config.Problem, device: Device) -> Config:
        """What is chosen without tuning."""
        return block_config.choose(problem, device)

    def conditions(self, problem: block_config.Problem) -> dict[str, Any]:
        """Where the entry will hold."""
        return {"op": problem.op, "block": list(problem.block), "itemsize": problem.itemsize}

    def candidates(self, problem: block_config.Problem, device: Device) -> Iterator[Config]:
        """Every valid configuration worth trying for a block as the kernel multiplies it."""
        grad, m = problem.op == "block_grad", problem.m
        rows = (32, 64, 128) if grad else tuple(b for b in (16, 32, 64, 128, 256) if b <= max(16, 2 * m))
        inner = (16,) if grad else tuple(b for b in (16, 32, 64, 128) if b <= problem.block[1])
        splits = (1, 2, 4, 8) if m <= 256 or grad else (1,)
        groups = (1,) if grad or m <= 256 else (8, 16, 32)
        stages = (3, 4, 5) if grad else (5, 7, 9)
        for choice in product(rows, inner, splits, groups, (2, 4, 8), stages):
            config = block_config.Config(*choice)
            if block_config.is_valid(problem.op, config, problem.block, problem.itemsize, device):
                yield config

    def setup(self, target: str) -> Setup:
        """See :data:`Setup`."""
        from fpe.kernels.block import triton as kernels

        generator = torch.Generator().manual_seed(0)
        (n, k), (bn, bk) = self.shape, self.block
        labels = fpe.Partition.block(n, k, 2, block=self.block, generator=generator).labels[::bn, ::bk]
        mask = torch.cat([labels == child for child in range(2)]).to(target)
        layout = BlockLayout.from_mask(mask, (2 * n, k), self.block)
        sizes = (layout.values_shape, (self.m, k), (self.m, 2 * n))
        values, x, dy = (torch.randn(size, generator=generator).to(target, self.dtype) for size in sizes)
        if self.op == "dW":
            arguments: tuple = (dy, x, layout)
            problem = block_config.grad_problem(layout, self.m, values.element_size())
        else:
            arguments = (x if self.op == "forward" else dy, values, layout)
            problem = block_config.matmul_problem(layout, self.op == "dX", self.m, values.element_size())
        runs: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
            "forward": (kernels.block_matmul_triton, block_matmul_eager),
            "dX": (kernels.block_matmul_t_triton, block_matmul_t_eager),
            "dW": (kernels.block_grad_triton, block_grad_eager),
        }
        ours, twin = runs[self.op]
        return partial(ours, *arguments), partial(twin, *arguments), problem


@dataclass(frozen=True)
class PartitionJob:
    """One entry of the partition table: an operation on the stored weight or on its transpose.

    Attributes:
        op: ``"split_matmul"``, ``"merge_matmul"`` or ``"partition_grad"``.
        transposed: Whether on the transpose.
        alpha: Children.
        m: Rows of activations.
        dtype: Of the operands.
        shape: ``(N, K)`` of the stored weight.
    """

    op: str
    transposed: bool
    alpha: int
    m: int
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int] = SHAPE
    family = "partition"

    @property
    def id(self) -> str:
        """As ``split_matmul of the transpose alpha=2 m=16 torch.bfloat16``."""
        return f"{self.op}{' of the transpose' * self.transposed} alpha={self.alpha} m={self.m} {self.dtype}"

    def small(self) -> "PartitionJob":
        """The same at a size that the interpreter can walk."""
        return replace(self, m=5, shape=(64, 64), dtype=torch.float32)

    def choose(self, problem: partition_config.Problem, device: Device) -> Config:
        """What is chosen without tuning."""
        return partition_config.choose(problem, device)

    def conditions(self, problem: partition_config.Problem) -> dict[str, Any]:
        """Where the entry will hold."""
        return {name: getattr(problem, name) for name in ("op", "transposed", "alpha", "itemsize")}

    def candidates(self, problem: partition_config.Problem, device: Device) -> Iterator[Config]:
        """Every valid configuration worth trying."""
        m, grad = problem.m, problem.op == "partition_grad"
        rows = (32, 64) if grad else tuple(b for b in (16, 32, 64, 128) if b <= max(16, 2 * m))
        splits = (1, 2, 4, 8) if m <= 256 or grad else (1,)
        sides = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
        for block_m, (n, k), split, warps, stages in product(rows, sides, splits, (4, 8), (1, 3, 4)):
            config = partition_config.Config(block_m, n, k, split, 8, warps, stages)
            if partition_config.is_valid(problem, config, device):
                yield config

    def setup(self, target: str) -> Setup:
        """See :data:`Setup`."""
        from fpe.kernels.partition import triton as kernels

        generator, (n, k), alpha = torch.Generator().manual_seed(0), self.shape, self.alpha
        drawn = torch.randint(alpha, self.shape, generator=generator).byte().to(target)
        labels, size = PackedLabels.pack(drawn, alpha), self.dtype.itemsize
        problem = partition_config.Problem(self.op, self.m, n, k, self.transposed, alpha, size)
        w = torch.randn(n, k, generator=generator).to(target, self.dtype)
        if self.transposed:
            labels, w, n, k = labels.T, w.T, k, n
        sizes = ((self.m, k), (self.m, alpha, k), (self.m, alpha, n))
        x, z, dy = (torch.randn(shape, generator=generator).to(target, self.dtype) for shape in sizes)
        runs: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple]] = {
            "split_matmul": (kernels.split_matmul_triton, split_matmul_eager, (x, w, labels, alpha)),
            "merge_matmul": (kernels.merge_matmul_triton, merge_matmul_eager, (z, w, labels)),
            "partition_grad": (kernels.partition_grad_triton, partition_grad_eager, (dy, x, labels)),
        }
        ours, twin, arguments = runs[self.op]
        return partial(ours, *arguments), partial(twin, *arguments), problem


Job = BlockJob | PartitionJob


def jobs() -> list[Job]:
    """Everything to tune, what matters first: 16-bit operands, two children, large blocks."""
    expanded = (("split_matmul", False), ("merge_matmul", True), ("partition_grad", False))
    merged = (("merge_matmul", False), ("split_matmul", True), ("partition_grad", True))
    found: list[Job] = []
    for dtype in (torch.bfloat16, torch.float32):
        for alpha, m, (op, transposed) in product(ALPHAS, ROWS, expanded + merged):
            found.append(PartitionJob(op, transposed, alpha, m, dtype))
        for block, m, op in product(BLOCKS, ROWS, OPERATIONS):
            found.append(BlockJob(op, block, m, dtype))
    return sorted(found, key=lambda job: (job.dtype == torch.float32, isinstance(job, PartitionJob) and job.alpha > 2))


def run(
    todo: list[Job],
    device: Device,
    folder: Path,
    measure: Callable[[Callable[[], Tensor]], float],
    budget: float,
    target: str = "cuda",
    limit: int | None = None,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Tunes jobs in order until the time is used up; returns the tables' entries.

    Args:
        todo: What to tune.
        device: Of the GPU at hand.
        folder: Where the tables go, whole after every job.
        measure: Milliseconds of a call.
        budget: Seconds.
        target: Where tensors are made.
        limit: At most so many candidates for each job, the rule's and others drawn at random.
        report: Called with a line for each job.
    """
    end = time.monotonic() + budget
    entries: list[dict[str, Any]] = []
    for job in todo:
        if time.monotonic() > end:
            report(f"time is up: {len(entries)} of {len(todo)} tuned")
            break
        entry, line = tune(job, device, measure, target, limit)
        entries.append(entry)
        report(line)
        write(folder, device.arch, entries)
    return entries


def table_path(folder: Path, family: str, arch: int) -> Path:
    """Where a family's table is written."""
    return folder / f"{family}_sm{arch}.json"


def write(folder: Path, arch: int, entries: list[dict[str, Any]]) -> None:
    """Writes each family's table aside and renames it."""
    for family in dict.fromkeys(entry["family"] for entry in entries):
        table = table_path(folder, family, arch)
        kept = [entry for entry in entries if entry["family"] == family]
        folder.mkdir(parents=True, exist_ok=True)
        part = table.with_suffix(".part")
        part.write_text(json.dumps({"provenance": provenance(), "entries": kept}, indent=1) + "\n")
        part.replace(table)


def tune(
    job: Job, device: Device, measure: Callable[[Callable[[], Tensor]], float], target: str, limit: int | None
) -> tuple[dict[str, Any], str]:
    """The fastest correct configuration of a job, as a table entry, and a line that says so.

    Raises:
        RuntimeError: No candidate is correct.
    """
    launch, eager, problem = job.setup(target)
    truth = eager().float()
    rule = job.choose(problem, device)
    others = list(job.candidates(problem, device))
    if limit is not None and limit <= len(others):
        others = random.Random(0).sample(others, limit - 1)
    tried = [rule, *others]
    best, best_time, rule_time = None, float("inf"), float("inf")
    for config in tried:
        error = (launch(config=config).float() - truth).norm() / truth.norm()
        if not error <= TOLERANCE[job.dtype]:
            continue
        taken = measure(partial(launch, config=config))
        rule_time = taken if config is rule else rule_time
        if taken < best_time:
            best, best_time = config, taken
    if best is None:
        raise RuntimeError(f"no configuration of {job} agrees with the eager twin")
    entry = {
        "family": job.family,
        **job.conditions(problem),
        "max_m": job.m,
        "config": asdict(best),
        "milliseconds": best_time,
        "rule_milliseconds": rule_time,
    }
    line = f"{job.id}: {best_time:.4f} ms (rule {rule_time:.4f}), {len(tried)} tried"
    return entry, line


def small(todo: list[Job]) -> list[Job]:
    """The same plan at sizes that the interpreter can walk: one job of each operation."""
    chosen = {(job.op, getattr(job, "transposed", None)): job for job in reversed(todo)}
    return [job.small() for job in chosen.values()]
