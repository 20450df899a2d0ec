"""Which tiles a block kernel runs with: data, chosen by a pure function and testable without a GPU."""

from dataclasses import dataclass, replace
from math import ceil

from ..device import Device
from ..gpus import architecture
from ..rules import power_above, split_reduction
from ..tables import tuned
from .layout import BlockLayout

SUPPORTED_BLOCKS = (16, 32, 64, 128)
"""Sizes of a block's sides that the kernels take."""


def limit(block: tuple[int, int]) -> str | None:
    """What of a block the kernels do not take, in words."""
    if any(side not in SUPPORTED_BLOCKS for side in block):
        return f"it takes blocks with sides of {SUPPORTED_BLOCKS}, got {tuple(block)}"
    return None


@dataclass(frozen=True)
class Config:
    """Meta-parameters of a launch.

    Attributes:
        block_m: Rows of activations to a tile.
        block_in: Length of one step along the reduction (``block_matmul``; for ``block_grad`` it is ``block_m``).
        split: Programs that share one output tile; their partial sums are added in a second kernel.
        group: Tiles of rows that run together, for reuse in L2.
        num_warps: Warps of a program.
        num_stages: Triton's pipeline depth. ``block_matmul`` reads an index before each tile, and Triton shares the
            depth between the two: ``(num_stages - 1) // 2`` tiles are in flight there, ``num_stages - 1`` in
            ``block_grad``.
    """

    block_m: int
    block_in: int
    split: int
    group: int
    num_warps: int
    num_stages: int


def is_valid(op: str, config: Config, block: tuple[int, int], itemsize: int, device: Device) -> bool:
    """Whether a configuration can run: sizes divide, and the pipeline's buffers fit into shared memory.

    Args:
        op: ``"block_matmul"`` or ``"block_grad"``.
        config: The configuration.
        block: ``(out, in)`` of the block as the kernel multiplies it; ``(bn, bk)`` for ``block_grad``.
        itemsize: Bytes of an operand's element.
        device: Where it would run.
    """
    powers = (config.block_m, config.block_in, config.split, config.num_warps)
    if any(size < 1 or size & (size - 1) for size in powers) or config.num_stages < 1 or config.group < 1:
        return False
    if config.block_m < 16 or any(side not in SUPPORTED_BLOCKS for side in block):
        return False
    if op == "block_matmul" and (block[1] % config.block_in or config.block_in < 16):
        return False
    return shared_bytes(op, config, block, itemsize) <= device.shared


def shared_bytes(op: str, config: Config, block: tuple[int, int], itemsize: int) -> int:
    """Shared memory that the pipelined operand tiles take, in bytes."""
    if op == "block_matmul":
        tile, buffers = config.block_in * (config.block_m + block[0]), (config.num_stages - 1) // 2
    else:
        tile, buffers = config.block_m * (block[0] + block[1]), config.num_stages - 1
    return tile * itemsize * max(buffers, 1)


@dataclass(frozen=True)
class Problem:
    """What a launch must do.

    Attributes:
        op: ``"block_matmul"`` (forward and dX) or ``"block_grad"`` (dW).
        m: Rows of activations.
        block: ``(out, in)`` of the block as the kernel multiplies it; ``(bn, bk)`` for ``block_grad``.
        tiles: Output tiles along the features: segments, or stored blocks for ``block_grad``.
        steps: Mean number of blocks to a segment; 0 for ``block_grad``.
        width: Features that the activations have; 0 for ``block_grad``.
        itemsize: Bytes of an operand's element.
    """

    op: str
    m: int
    block: tuple[int, int]
    tiles: int
    steps: int
    width: int
    itemsize: int


def matmul_problem(layout: BlockLayout, transposed: bool, m: int, itemsize: int) -> Problem:
    """The forward of ``m`` rows, or (``transposed``) their dX."""
    blocks = layout.rows.shape[0]
    if transposed:
        segments, width, block = layout.grid[1], layout.shape[0], layout.block[::-1]
    else:
        segments, width, block = layout.grid[0], layout.shape[1], layout.block
    return Problem("block_matmul", m, block, segments, blocks // max(segments, 1), width, itemsize)


def grad_problem(layout: BlockLayout, m: int, itemsize: int) -> Problem:
    """The dW of ``m`` rows."""
    return Problem("block_grad", m, layout.block, layout.rows.shape[0], 0, 0, itemsize)


def choose(problem: Problem, device: Device) -> Config:
    """The configuration of a launch: a tuned entry where there is one, else a rule."""
    for entry in tuned("block", device, Config):
        if entry.fits(problem) and is_valid(problem.op, entry.config, problem.block, problem.itemsize, device):
            return entry.config
    return _grad_rule(problem, device) if problem.op == "block_grad" else _matmul_rule(problem, device)


def _grad_rule(problem: Problem, device: Device) -> Config:
    block_m = 64 if problem.itemsize == 2 else 32
    warps = 8 if problem.block[0] * problem.block[1] >= 128 * 128 else 4
    split = split_reduction(problem.tiles, ceil(problem.m / block_m), device)
    return _deepest(problem, Config(block_m, block_m, split, 1, warps, num_stages=4), device)


def _matmul_rule(problem: Problem, device: Device) -> Config:
    (out, inner), itemsize = problem.block, problem.itemsize
    block_m = min(max(16, power_above(problem.m)), 128 if out * itemsize <= 256 else 64)
    block_in = min(inner, 64 if itemsize == 2 else 32 if out > 16 else 16)  # float32 by 16 spills at 32
    # More warps than 16-byte loads of the weight tile would narrow the loads; large tiles of float32, and 64 x 64
    # on some architectures, spill with four.
    warps = 8 if block_m * out >= 128 * (64 if itemsize == 4 else 128) else 4
    if itemsize == 2 and block_m * out == 64 * 64 and architecture(device.arch).spills_square:
        warps = 8
    warps = max(1, min(warps, block_in * out * itemsize // 512))

    programs, work = ceil(problem.m / block_m) * problem.tiles, problem.steps * inner // block_in
    weights = max(problem.steps * inner * itemsize, 1)  # of one output
    split = split_reduction(programs, work, device, problem.m * 4, weights)

    # The rows that run together, with the weights of the segments in flight and the output tiles, fit into L2.
    slots, group = 2 * device.sms, 8
    while group < 64:
        rows = 2 * group * block_m * problem.width * itemsize
        flight = slots / (2 * group) * weights * out + slots * block_m * out * itemsize
        if rows + flight > device.l2:
            break
        group *= 2
    return _deepest(problem, Config(block_m, block_in, split, group, warps, num_stages=7), device)


def _deepest(problem: Problem, config: Config, device: Device) -> Config:
    """The configuration with as deep a pipeline as shared memory allows."""
    while config.num_stages > 2 and not is_valid(problem.op, config, problem.block, problem.itemsize, device):
        config = replace(config, num_stages=config.num_stages - 1)
    return config
