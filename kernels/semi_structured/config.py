"""Which tiles the semi-structured kernels run with: data, chosen by pure functions and testable without a GPU."""

from dataclasses import dataclass
from math import ceil

from ..device import Device
from ..rules import power_above, split_reduction
from .fragments import TILE_QUADS, TILE_ROWS

GROUP = 16
"""Tiles of a band. With fewer, weights come from DRAM more often, with more, activations (``fpe lab traffic``)."""
STEP = 4 * TILE_QUADS
"""Inputs that the kernel on sparse tensor cores takes at a time."""


@dataclass(frozen=True)
class Config:
    """Meta-parameters of a launch on dense tensor cores.

    Attributes:
        block_m: Rows of activations to a tile.
        block_n: Parents' outputs to a tile.
        block_k: Inputs to a tile.
        split: Programs that share one output tile; their partial sums are added afterwards.
        group: Tiles of ``M`` (of ``N`` in dW) that run before the next tiles of the other axis.
        num_warps: Warps of a program.
        num_stages: Triton's pipeline depth.
    """

    block_m: int
    block_n: int
    block_k: int
    split: int
    group: int
    num_warps: int
    num_stages: int


def choose(op: str, m: int, n: int, k: int, children: int, itemsize: int, device: Device) -> Config:
    """The configuration of a launch, by rule: nothing has been tuned yet.

    Args:
        op: ``"semi_structured_matmul"``, ``"semi_structured_matmul_t"`` or ``"semi_structured_grad"``.
        m: Rows of activations.
        n: Outputs of the parent.
        k: Inputs.
        children: 1 or 2.
        itemsize: Bytes of an operand's element.
        device: Where it runs.
    """
    block_m = min(max(16, power_above(m)), 64 // (itemsize // 2))
    if op == "semi_structured_grad":
        side = 64 if itemsize == 2 else 32
        tiles = ceil(n / side) * ceil(k / side)
        return Config(min(block_m, 32), side, side, split_reduction(tiles, ceil(m / 32), device), GROUP, 4, 3)
    if op == "semi_structured_matmul_t":
        block_n, block_k = (32, 64) if itemsize == 2 else (16, 64)
        tiles, steps, outputs = ceil(m / block_m) * ceil(k / block_k), ceil(n / block_n), k
    else:
        block_n, block_k = (64, 64) if itemsize == 2 else (32, 32)
        tiles, steps, outputs = ceil(m / block_m) * ceil(n / block_n), ceil(k / block_k), children * n
    split = split_reduction(tiles, steps, device, 4 * m * outputs, children * n * k / 2 * itemsize)
    return Config(block_m, block_n, block_k, split, GROUP, 4, 4)


@dataclass(frozen=True)
class SparseConfig:
    """Meta-parameters of a launch on sparse tensor cores.

    Attributes:
        block_m: Rows of activations to a program, 8 to 128; times children at most 128.
        split: Programs that share one output tile; their partial sums are added afterwards.
        group: Tiles of rows that run before the next tiles of outputs.
        stages: Stages of the pipeline.
    """

    block_m: int
    split: int
    group: int
    stages: int

    @property
    def num_warps(self) -> int:
        """Warps of a program: each has 32 outputs of every child."""
        return TILE_ROWS // 32


def choose_sparse(m: int, n: int, k: int, children: int, device: Device) -> SparseConfig:
    """The configuration of a launch on sparse tensor cores, by rule: nothing has been tuned yet.

    Args:
        m: Rows of activations.
        n: Outputs of the parent.
        k: Inputs.
        children: 1 or 2.
        device: Where it runs.
    """
    block_m = min(max(8, power_above(m)), 128 // children)
    programs, weights = ceil(m / block_m) * ceil(n / TILE_ROWS), children * n * k  # 16-bit values, half of them zero
    split = split_reduction(programs, ceil(k / STEP), device, 4 * m * children * n, weights)
    stages = min(4, device.shared // stage_bytes(block_m, children))
    return SparseConfig(block_m, split, GROUP, stages)


def stage_bytes(block_m: int, children: int) -> int:
    """Shared memory of one stage on sparse tensor cores, in bytes: weights, metadata and activations."""
    return children * TILE_ROWS * STEP + TILE_ROWS * STEP // 8 + block_m * STEP * 2


def shared_bytes(op: str, config: Config, children: int, itemsize: int) -> int:
    """Shared memory of the pipelined tiles of a launch on dense tensor cores, in bytes; an estimate."""
    activations = {
        "semi_structured_matmul": config.block_k,
        "semi_structured_matmul_t": children * config.block_n,
        "semi_structured_grad": config.block_k + children * config.block_n,
    }[op]
    tile = config.block_n * config.block_k
    weights = 0 if op == "semi_structured_grad" else children * tile // 2 * itemsize + tile // 8
    return (config.block_m * activations * itemsize + weights) * max(config.num_stages - 1, 1)
