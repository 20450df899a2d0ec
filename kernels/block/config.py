"""Which tiles a block kernel runs with: data, chosen by a pure function and testable without a GPU."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from ..device import Device
from ..gpus import architecture
from ..rules import power_above, split_reduction
from .layout import BlockLayout

SUPPORTED_BLOCKS = (16, 32, 64, 128)
"""Sizes of a block's sides that the kernels take."""


def limit(block: tuple[int, int]) -> str | None:
    """Returns why the kernels reject this block size, or ``None``."""
    if any(side not in SUPPORTED_BLOCKS for side in block):
        return f"it takes blocks with sides of {SUPPORTED_BLOCKS}, got {tuple(block)}"
    return None


@dataclass(frozen=True)
class Config:
    """Meta-parameters of a launch.

    Attributes:
        block_m: Rows of activations to a tile.
        block_in: Features in one step of the reduction of ``block_matmul``. ``block_grad`` reduces over rows of
            activations, ``block_m`` at a step, and has the same number here.
        split: Programs that share one output tile; their partial sums are added in a second kernel.
        group: Tiles of rows that run together, for reuse in L2.
        num_warps: Warps of a program.
        num_stages: Triton's pipeline depth. ``block_matmul`` reads an index before each tile, and Triton divides the
            depth between index and tile: ``(num_stages - 1) // 2`` tiles are in flight there, ``num_stages - 1`` in
            ``block_grad``.
    """

    block_m: int
    block_in: int
    split: int
    group: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Problem:
    """What a launch must do.

    Attributes:
        op: ``"block_matmul"`` (forward and dX) or ``"block_grad"`` (dW).
        m: Rows of activations.
        block: ``(out, in)`` of the block as the kernel multiplies it; ``(bn, bk)`` for ``block_grad``.
        tiles: Output tiles along the features: segments (block rows, or block columns for dX), or stored blocks for
            ``block_grad``.
        steps: Mean number of blocks in a segment; 0 for ``block_grad``.
        width: Features of the activations, or for dX of their gradient; 0 for ``block_grad``.
        itemsize: Bytes of an operand's element.
        tf32: Whether they are multiplied in TF32.
    """

    op: str
    m: int
    block: tuple[int, int]
    tiles: int
    steps: int
    width: int
    itemsize: int
    tf32: bool = False

    family: ClassVar[str] = "block"
    config: ClassVar[type] = Config

    def rule(self, device: Device) -> Config:
        """The configuration where nothing was tuned."""
        return _grad_rule(self, device) if self.op == "block_grad" else _matmul_rule(self, device)

    def fits(self, config: Config, device: Device) -> bool:
        """Whether a configuration can run: sizes divide, and the pipeline's buffers fit into shared memory."""
        powers = (config.block_m, config.block_in, config.split, config.num_warps)
        if any(size < 1 or size & (size - 1) for size in powers) or config.num_stages < 1 or config.group < 1:
            return False
        if config.block_m < 16 or limit(self.block):
            return False
        if self.op == "block_matmul" and (self.block[1] % config.block_in or config.block_in < 16):
            return False
        return shared_bytes(self, config) <= device.shared


def matmul_problem(layout: BlockLayout, transposed: bool, m: int, itemsize: int, tf32: bool = False) -> Problem:
    """The forward of ``m`` rows, or (``transposed``) their dX."""
    blocks = layout.rows.shape[0]
    if transposed:
        segments, width, block = layout.grid[1], layout.shape[0], layout.block[::-1]
    else:
        segments, width, block = layout.grid[0], layout.shape[1], layout.block
    return Problem("block_matmul", m, block, segments, blocks // max(segments, 1), width, itemsize, tf32)


def grad_problem(layout: BlockLayout, m: int, itemsize: int) -> Problem:
    """The dW of ``m`` rows."""
    return Problem("block_grad", m, layout.block, layout.rows.shape[0], 0, 0, itemsize)


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory that the pipelined operand tiles take, in bytes."""
    out, inner = problem.block
    if problem.op == "block_matmul":
        tile, buffers = config.block_in * (config.block_m + out), (config.num_stages - 1) // 2
    else:
        tile, buffers = config.block_m * (out + inner), config.num_stages - 1
    return tile * problem.itemsize * max(buffers, 1)


def _grad_rule(problem: Problem, device: Device) -> Config:
    block_m = 64 if problem.itemsize == 2 else 32
    warps = 8 if problem.block[0] * problem.block[1] >= 128 * 128 else 4
    split = split_reduction(problem.tiles, ceil(problem.m / block_m), device)
    return Config(block_m, block_m, split, 1, warps, num_stages=4)


def _matmul_rule(problem: Problem, device: Device) -> Config:
    (out, inner), itemsize = problem.block, problem.itemsize
    block_m = min(max(16, power_above(problem.m)), 128 if out * itemsize <= 256 else 64)
    if problem.tf32 and device.sets_fence and out == 128 and inner >= 64:
        block_m = min(block_m, 32)  # ``mma``: the assembler would make every ``wgmma`` wait for the one before
    block_in = min(inner, 64 if itemsize == 2 else 32 if out > 16 else 16)  # float32 by 16 spills at 32
    # With more warps than the weight tile has 16-byte loads for, the loads would be narrower. Large tiles of float32,
    # and 64 x 64 on some architectures, spill with four warps.
    warps = 8 if block_m * out >= 128 * (64 if itemsize == 4 else 128) else 4
    if itemsize == 2 and block_m * out == 64 * 64 and architecture(device.arch).spills_square:
        warps = 8
    warps = max(1, min(warps, block_in * out * itemsize // 512))

    programs, work = ceil(problem.m / block_m) * problem.tiles, problem.steps * inner // block_in
    weights = max(problem.steps * inner * itemsize, 1)  # bytes of one output's weights
    split = split_reduction(programs, work, device, problem.m * 4, weights)

    # The rows that run together, with the weights of the segments in flight and the output tiles, fit into L2.
    slots, group = 2 * device.sms, 8
    while group < 64:
        rows = 2 * group * block_m * problem.width * itemsize
        flight = slots / (2 * group) * weights * out + slots * block_m * out * itemsize
        if rows + flight > device.l2:
            break
        group *= 2
    return Config(block_m, block_in, split, group, warps, num_stages=7)
