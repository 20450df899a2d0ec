"""What the tuner tunes: an operation, a structure, a batch size, and the configurations worth trying there."""

from itertools import product

import torch

from fpe.kernels.block import config as block_config
from fpe.kernels.partition import config as partition_config

from ..families.block import Job as BlockJob
from ..families.partition import Job as PartitionJob
from ..latency.shapes import KEY_ROWS, SETS

OPERATIONS = ("forward", "dX", "dW")
BLOCKS = ((64, 64), (128, 128), (128, 64), (64, 128), (32, 32), (16, 64), (16, 16))
ALPHAS = (2, 4, 8)
ROWS = (16, 64, 256, 1024, 8192)

Config = block_config.Config | partition_config.Config

Job = BlockJob | PartitionJob


def jobs() -> list[Job]:
    """Everything to tune, what matters first: 16-bit operands, two children, large blocks."""
    expanded = (("split_matmul", False), ("merge_matmul", True), ("partition_grad", False))
    merged = (("merge_matmul", False), ("split_matmul", True), ("partition_grad", True))
    found: list[Job] = []
    for dtype in (torch.bfloat16, torch.float32):
        for alpha, m, (op, transposed) in product(ALPHAS, ROWS, expanded + merged):
            found.append(PartitionJob(op=op, transposed=transposed, alpha=alpha, m=m, dtype=dtype))
        for sides, m, op in product(BLOCKS, ROWS, OPERATIONS):
            found.append(BlockJob(op=op, block=sides, m=m, dtype=dtype))
    return sorted(found, key=lambda job: (job.dtype == torch.float32, isinstance(job, PartitionJob) and job.alpha > 2))


def headline_jobs() -> list[Job]:
    """What the headline's layers launch, forward, dX and dW: labels and blocks, two children, 16-bit operands."""
    expanded = (("split_matmul", False), ("merge_matmul", True), ("partition_grad", False))
    found: list[Job] = []
    for shape, m in product(SETS["headline"], KEY_ROWS):
        found += [PartitionJob(op=op, transposed=transposed, m=m, shape=shape) for op, transposed in expanded]
        found += [BlockJob(op=op, block=(64, 64), m=m, shape=shape) for op in OPERATIONS]
    return found


def small(todo: list[Job]) -> list[Job]:
    """The same plan at sizes that the interpreter can walk: one job of each operation."""
    chosen = {(job.op, getattr(job, "transposed", None)): job for job in reversed(todo)}
    return [job.small() for job in chosen.values()]
