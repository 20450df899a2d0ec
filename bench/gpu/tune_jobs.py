"""What the tuner tunes: an operation, a structure, a batch size, and the configurations worth trying there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fpe
from fpe.kernels import BlockLayout, PackedLabels
from fpe.kernels.block import config as block_config
from fpe.kernels.partition import config as partition_config
from fpe.kernels.partition.labels import digits, row_bytes

from ..families import block as block_family
from ..families import partition as partition_family
from ..families.contract import pair
from ..latency.shapes import KEY_ROWS, SETS

OPERATIONS = ("forward", "dX", "dW")
BLOCKS = ((64, 64), (128, 128), (128, 64), (64, 128), (32, 32), (16, 64), (16, 16))
ALPHAS = (2, 4, 8)
ROWS = (16, 64, 256, 1024, 8192)
SHAPE = (4096, 4096)

Config = block_config.Config | partition_config.Config
Setup = tuple[Callable[..., Tensor], partial[Tensor], Any]
"""A launcher and an eager twin on the same random data, and the problem that the chooser sees."""


def draw(shape: tuple[int, ...], target: str, dtype: torch.dtype) -> Tensor:
    """Normal numbers made where they are wanted; on ``"meta"`` none, where launches are only compiled."""
    if target == "meta":
        return torch.empty(shape, dtype=dtype, device=target)
    generator = torch.Generator(target).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=target).to(dtype)


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
    candidates = staticmethod(block_family.candidates)

    @property
    def id(self) -> str:
        """As ``dX (64, 64) m=16 torch.bfloat16``."""
        return f"{self.op} {self.block} m={self.m} {self.dtype}"

    def small(self) -> "BlockJob":
        """The same at a size that the interpreter can walk."""
        return replace(self, m=5, shape=(64, 64), block=(16, 32), dtype=torch.float32)

    def conditions(self, problem: block_config.Problem) -> dict[str, Any]:
        """Where the entry will hold."""
        return {"op": problem.op, "block": list(problem.block), "itemsize": problem.itemsize}

    def setup(self, target: str) -> Setup:
        """See :data:`Setup`."""
        from fpe.kernels.block import eager as twins
        from fpe.kernels.block import triton as kernels

        (n, k), (bn, bk) = self.shape, self.block
        labels = fpe.Partition.block(n, k, 2, block=self.block, generator=torch.Generator().manual_seed(0)).labels
        mask = torch.cat([labels[::bn, ::bk] == child for child in range(2)])
        made = BlockLayout.from_mask(mask, (2 * n, k), self.block)
        layout = BlockLayout((2 * n, k), self.block, *(index.to(target) for index in made.tensors))
        sizes = (layout.values_shape, (self.m, k), (self.m, 2 * n))
        values, x, dy = (draw(size, target, self.dtype) for size in sizes)
        if self.op == "dW":
            arguments: tuple = (dy, x, layout)
            problem = block_config.grad_problem(layout, self.m, values.element_size())
        else:
            arguments = (x if self.op == "forward" else dy, values, layout)
            problem = block_config.matmul_problem(layout, self.op == "dX", self.m, values.element_size())
        name = {"forward": "block_matmul", "dX": "block_matmul_t", "dW": "block_grad"}[self.op]
        ours, twin = pair(name, kernels, twins)
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
    candidates = staticmethod(partition_family.candidates)

    @property
    def id(self) -> str:
        """As ``split_matmul of the transpose alpha=2 m=16 torch.bfloat16``."""
        return f"{self.op}{' of the transpose' * self.transposed} alpha={self.alpha} m={self.m} {self.dtype}"

    def small(self) -> "PartitionJob":
        """The same at a size that the interpreter can walk."""
        return replace(self, m=5, shape=(64, 64), dtype=torch.float32)

    def conditions(self, problem: partition_config.Problem) -> dict[str, Any]:
        """Where the entry will hold."""
        return {name: getattr(problem, name) for name in ("op", "transposed", "alpha", "itemsize")}

    def setup(self, target: str) -> Setup:
        """See :data:`Setup`."""
        from fpe.kernels.partition import eager as twins
        from fpe.kernels.partition import triton as kernels

        (n, k), alpha, size = self.shape, self.alpha, self.dtype.itemsize
        pairs = size == 2 and k % 2 == 0
        problem = partition_config.Problem(self.op, self.m, n, k, self.transposed, alpha, size, pairs)
        labels = PackedLabels(draw((digits(alpha), n, row_bytes(k)), "meta", torch.uint8), self.shape, alpha)
        if target != "meta":
            generator = torch.Generator(target).manual_seed(0)
            drawn = torch.randint(alpha, self.shape, generator=generator, device=target, dtype=torch.uint8)
            labels = PackedLabels.pack(drawn, alpha)
        w = draw((n, k), target, self.dtype)
        if self.transposed:
            labels, w, n, k = labels.T, w.T, k, n
        sizes = ((self.m, k), (self.m, alpha, k), (self.m, alpha, n))
        x, z, dy = (draw(shape, target, self.dtype) for shape in sizes)
        arguments: tuple = {
            "split_matmul": (x, w, labels, alpha),
            "merge_matmul": (z, w, labels),
            "partition_grad": (dy, x, labels),
        }[self.op]
        ours, twin = pair(self.op, kernels, twins)
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
        for sides, m, op in product(BLOCKS, ROWS, OPERATIONS):
            found.append(BlockJob(op, sides, m, dtype))
    return sorted(found, key=lambda job: (job.dtype == torch.float32, isinstance(job, PartitionJob) and job.alpha > 2))


def headline_jobs() -> list[Job]:
    """What the headline's layers launch, forward, dX and dW: labels and blocks, two children, 16-bit operands."""
    expanded = (("split_matmul", False), ("merge_matmul", True), ("partition_grad", False))
    found: list[Job] = []
    for shape, m in product(SETS["headline"], KEY_ROWS):
        found += [PartitionJob(op, transposed, 2, m, shape=shape) for op, transposed in expanded]
        found += [BlockJob(op, (64, 64), m, shape=shape) for op in OPERATIONS]
    return found


def small(todo: list[Job]) -> list[Job]:
    """The same plan at sizes that the interpreter can walk: one job of each operation."""
    chosen = {(job.op, getattr(job, "transposed", None)): job for job in reversed(todo)}
    return [job.small() for job in chosen.values()]
