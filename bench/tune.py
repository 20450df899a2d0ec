"""Fills the tables of tuned configurations on the GPU at hand.

For each operation, block and batch size every valid candidate is first compared with the eager twin and then timed
with a cold L2; the fastest goes into ``block_sm<arch>.json``, best so far written after each problem, so that a cut
run leaves a usable table.
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
from fpe.kernels import BlockLayout, block_grad_eager, block_matmul_eager, block_matmul_t_eager
from fpe.kernels.block.config import Config, choose, grad_problem, is_valid, matmul_problem
from fpe.kernels.device import Device

from .results import provenance

OPERATIONS = ("forward", "dX", "dW")
BLOCKS = ((64, 64), (128, 128), (128, 64), (64, 128), (32, 32), (16, 64), (16, 16))
ROWS = (16, 64, 256, 1024, 8192)
SHAPE = (4096, 4096)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-2}
"""Relative error in the Frobenius norm at which a candidate is wrong; float32 may run in TF32."""


@dataclass(frozen=True)
class Job:
    """One entry to fill.

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


def jobs() -> list[Job]:
    """Everything to tune, what matters first: large blocks, decode and training sizes of 16-bit operands."""
    return [
        Job(op, block, m, dtype)
        for dtype, block, m, op in product((torch.bfloat16, torch.float32), BLOCKS, ROWS, OPERATIONS)
    ]


def candidates(op: str, block: tuple[int, int], itemsize: int, m: int, device: Device) -> Iterator[Config]:
    """Every valid configuration worth trying for a block as the kernel multiplies it."""
    grad = op == "block_grad"
    rows = (32, 64, 128) if grad else tuple(b for b in (16, 32, 64, 128, 256) if b <= max(16, 2 * m))
    inner = (16,) if grad else tuple(b for b in (16, 32, 64, 128) if b <= block[1])
    splits = (1, 2, 4, 8) if m <= 256 or grad else (1,)
    groups = (1,) if grad or m <= 256 else (4, 8, 16, 32)
    stages = (3, 4, 5) if grad else (5, 7, 9)
    for choice in product(rows, inner, splits, groups, (2, 4, 8), stages):
        config = Config(*choice)
        if is_valid(op, config, block, itemsize, device):
            yield config


def run(
    todo: list[Job],
    device: Device,
    table: Path,
    measure: Callable[[Callable[[], Tensor]], float],
    budget: float,
    target: str = "cuda",
    limit: int | None = None,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Tunes jobs in order until the time is used up; returns the table's entries.

    Args:
        todo: What to tune.
        device: Of the GPU at hand.
        table: File to write, whole after every job.
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
        write(table, entries)
    return entries


def write(table: Path, entries: list[dict[str, Any]]) -> None:
    """Writes a table aside and renames it."""
    known = ("op", "max_m", "block", "itemsize", "config", "milliseconds", "rule_milliseconds")
    kept = [{name: entry[name] for name in known} for entry in entries]
    table.parent.mkdir(parents=True, exist_ok=True)
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
    launch, eager, problem = _setup(job, target)
    truth = eager().float()
    rule = choose(problem, device)
    others = list(candidates(problem.op, problem.block, problem.itemsize, problem.m, device))
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
        "op": problem.op,
        "max_m": job.m,
        "block": list(problem.block),
        "itemsize": problem.itemsize,
        "config": asdict(best),
        "milliseconds": best_time,
        "rule_milliseconds": rule_time,
    }
    line = f"{job.op} {job.block} m={job.m} {job.dtype}: {best_time:.4f} ms (rule {rule_time:.4f}), {len(tried)} tried"
    return entry, line


def _setup(job: Job, target: str) -> tuple[Callable[..., Tensor], Callable[[], Tensor], Any]:
    """The launcher and the eager twin of a job on random data, and the problem that the chooser sees."""
    from fpe.kernels.block import triton as kernels

    generator = torch.Generator().manual_seed(0)
    (n, k), (bn, bk) = job.shape, job.block
    labels = fpe.Partition.block(n, k, 2, block=job.block, generator=generator).labels[::bn, ::bk]
    mask = torch.cat([labels == child for child in range(2)]).to(target)
    layout = BlockLayout.from_mask(mask, (2 * n, k), job.block)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(target, job.dtype)

    values, x, dy = random(*layout.values_shape), random(job.m, k), random(job.m, 2 * n)
    size = values.element_size()
    if job.op == "forward":
        arguments: tuple = (x, values, layout)
        ours: Callable[..., Tensor] = kernels.block_matmul_triton
        twin: Callable[..., Tensor] = block_matmul_eager
        problem = matmul_problem(layout, False, job.m, size)
    elif job.op == "dX":
        arguments = (dy, values, layout)
        ours, twin = kernels.block_matmul_t_triton, block_matmul_t_eager
        problem = matmul_problem(layout, True, job.m, size)
    else:
        arguments = (dy, x, layout)
        ours, twin = kernels.block_grad_triton, block_grad_eager
        problem = grad_problem(layout, job.m, size)
    return partial(ours, *arguments), partial(twin, *arguments), problem


def small(todo: list[Job]) -> list[Job]:
    """The same plan at sizes that the interpreter can walk: one job of each operation."""
    chosen = {job.op: job for job in reversed(todo)}
    return [replace(job, m=5, shape=(64, 64), block=(16, 32), dtype=torch.float32) for job in chosen.values()]
