"""Which tiles the semi-structured kernels run with: data, chosen by pure functions and testable without a GPU."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from ..device import Device
from ..rules import Tiles, power_above, split_reduction
from .fragments import TILE_QUADS, TILE_ROWS

GROUP = 16
"""Tiles of a band. With fewer, weights are read from DRAM more often; with more, activations (``fpe lab traffic``)."""
STEP = 4 * TILE_QUADS
"""Inputs that the kernel on sparse tensor cores takes at a time."""


Config = Tiles
"""Meta-parameters of a launch on dense tensor cores; ``block_n`` counts outputs of the parent."""


@dataclass(frozen=True)
class Problem:
    """What a launch on dense tensor cores must do.

    Attributes:
        op: ``"semi_structured_matmul"``, ``"semi_structured_matmul_t"`` or ``"semi_structured_grad"``.
        m: Rows of activations.
        n: Outputs of the parent.
        k: Inputs.
        children: 1 or 2.
        itemsize: Bytes of an operand's element.
    """

    op: str
    m: int
    n: int
    k: int
    children: int
    itemsize: int

    family: ClassVar[str] = "semi_structured"
    config: ClassVar[type] = Config

    def rule(self, device: Device) -> Config:
        """The configuration where nothing was tuned."""
        m, n, k, narrow = self.m, self.n, self.k, self.itemsize == 2
        block_m = min(max(16, power_above(m)), 64 // (self.itemsize // 2))
        if self.op == "semi_structured_grad":
            side = 64 if narrow else 32
            tiles = ceil(n / side) * ceil(k / side)
            return Config(min(block_m, 32), side, side, split_reduction(tiles, ceil(m / 32), device), GROUP, 4, 3)
        if self.op == "semi_structured_matmul_t":
            block_n, block_k = (32, 64) if narrow else (16, 64)
            tiles, steps, outputs = ceil(m / block_m) * ceil(k / block_k), ceil(n / block_n), k
        else:
            block_n, block_k = (64, 64) if narrow else (32, 32)
            tiles, steps, outputs = ceil(m / block_m) * ceil(n / block_n), ceil(k / block_k), self.children * n
        split = split_reduction(tiles, steps, device, 4 * m * outputs, self.children * n * k / 2 * self.itemsize)
        return Config(block_m, block_n, block_k, split, GROUP, 4, 4)

    def fits(self, config: Config, device: Device) -> bool:
        """Whether a configuration can run: what it keeps on chip fits."""
        return shared_bytes(self, config) <= device.shared


@dataclass(frozen=True)
class SparseConfig:
    """Meta-parameters of a launch on sparse tensor cores.

    Attributes:
        block_m: Rows of activations to a program, 8 to 128; times children at most 128.
        split: Programs that share one output tile; their partial sums are added in a second kernel.
        group: Tiles of rows that run together, for reuse in L2.
        num_stages: Stages of the pipeline.
    """

    block_m: int
    split: int
    group: int
    num_stages: int

    @property
    def num_warps(self) -> int:
        """Warps of a program; each has 32 outputs of every child."""
        return TILE_ROWS // 32


@dataclass(frozen=True)
class SparseProblem:
    """What a launch on sparse tensor cores must do.

    Attributes:
        m: Rows of activations.
        n: Outputs of the parent.
        k: Inputs.
        children: 1 or 2.
    """

    m: int
    n: int
    k: int
    children: int

    family: ClassVar[str] = "sparse_tensor_core"
    config: ClassVar[type] = SparseConfig

    def rule(self, device: Device) -> SparseConfig:
        """The configuration where nothing was tuned."""
        m, n, k, children = self.m, self.n, self.k, self.children
        block_m = min(max(8, power_above(m)), 128 // children)
        programs, weights = ceil(m / block_m) * ceil(n / TILE_ROWS), children * n * k  # 16-bit values, half are zero
        split = split_reduction(programs, ceil(k / STEP), device, 4 * m * children * n, weights)
        return SparseConfig(block_m, split, GROUP, 4)

    def fits(self, config: SparseConfig, device: Device) -> bool:
        """Whether a configuration can run: what it keeps on chip fits."""
        return config.num_stages * stage_bytes(config.block_m, self.children) <= device.shared


def stage_bytes(block_m: int, children: int) -> int:
    """Shared memory of one stage on sparse tensor cores, in bytes: weights, metadata and activations."""
    return children * TILE_ROWS * STEP + TILE_ROWS * STEP // 8 + block_m * STEP * 2


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of the pipelined tiles of a launch on dense tensor cores, in bytes; an estimate."""
    activations = {
        "semi_structured_matmul": config.block_k,
        "semi_structured_matmul_t": problem.children * config.block_n,
        "semi_structured_grad": config.block_k + problem.children * config.block_n,
    }[problem.op]
    tile, weights = config.block_n * config.block_k, 0
    if problem.op != "semi_structured_grad":
        weights = problem.children * tile // 2 * problem.itemsize + tile // 8
    return (config.block_m * activations * problem.itemsize + weights) * max(config.num_stages - 1, 1)
