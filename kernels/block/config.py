"""Which tiles a block kernel runs with: data, chosen by a pure function and testable without a GPU."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import ceil
from typing import Any

from ..device import Device

SUPPORTED_BLOCKS = (16, 32, 64, 128)
"""Sizes of a block's sides that the kernels take."""


@dataclass(frozen=True)
class Config:
    """Meta-parameters of a launch.

    Attributes:
        block_m: Rows of activations to a tile.
        block_in: Length of one step along the reduction (``block_matmul``; for ``block_grad`` it is ``block_m``).
        split: Programs that share one output tile; their partial sums are added in a second kernel.
        group_m: Tiles of rows that run together, for reuse in L2.
        num_warps: Warps of a program.
        num_stages: Triton's pipeline depth. ``block_matmul`` reads an index before each tile, and Triton shares the
            depth between the two: ``(num_stages - 1) // 2`` tiles are in flight there, ``num_stages - 1`` in
            ``block_grad``.
    """

    block_m: int
    block_in: int
    split: int
    group_m: int
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
    if any(size < 1 or size & (size - 1) for size in powers) or config.num_stages < 1 or config.group_m < 1:
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


def choose(op: str, m: int, block: tuple[int, int], tiles: int, steps: int, itemsize: int, device: Device) -> Config:
    """The configuration of a launch: a tuned entry where there is one, else a rule.

    Args:
        op: ``"block_matmul"`` (forward and dX) or ``"block_grad"`` (dW).
        m: Rows of activations.
        block: ``(out, in)`` of the block as the kernel multiplies it; ``(bn, bk)`` for ``block_grad``.
        tiles: Output tiles along the features: segments, or stored blocks for ``block_grad``.
        steps: Mean number of blocks to a segment; ignored by ``block_grad``.
        itemsize: Bytes of an operand's element.
        device: Where it will run.
    """
    for entry in tuned(device.arch):
        if entry.fits(op, m, block, itemsize) and is_valid(op, entry.config, block, itemsize, device):
            return entry.config
    return _rule(op, m, block, tiles, steps, itemsize, device)


def _rule(op: str, m: int, block: tuple[int, int], tiles: int, steps: int, itemsize: int, device: Device) -> Config:
    if op == "block_grad":
        block_m, largest = 64 if itemsize == 2 else 32, 1 << 30
        programs, work = tiles, ceil(m / block_m)
        warps = 8 if block[0] * block[1] >= 128 * 128 else 4
        block_in = block_m
    else:
        largest = 128 if block[0] * itemsize <= 256 else 64
        block_m = min(max(16, _power_above(m)), largest)
        block_in = min(block[1], 64 if itemsize == 2 else 32)
        programs, work = ceil(m / block_m) * tiles, steps * block[1] // block_in
        warps = 8 if block_m * block[0] >= 128 * 128 else 4
    # Two programs a multiprocessor hide latency; fewer than four steps each are not worth a second kernel.
    split = 1
    while programs * split < 2 * device.sms and work >= 8 * split and split < 16:
        split *= 2
    stages = 4 if op == "block_grad" else 7
    while stages > 2 and not is_valid(op, Config(block_m, block_in, split, 8, warps, stages), block, itemsize, device):
        stages -= 1
    return Config(block_m, block_in, split, 8, warps, stages)


def _power_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Entry:
    """A tuned configuration and where it holds: up to ``max_m`` rows, for one block and element size."""

    op: str
    max_m: int
    block: tuple[int, int]
    itemsize: int
    config: Config

    def fits(self, op: str, m: int, block: tuple[int, int], itemsize: int) -> bool:
        """Whether a launch falls under this entry."""
        return (self.op, self.block, self.itemsize) == (op, block, itemsize) and m <= self.max_m


def parse(table: dict[str, Any]) -> tuple[Entry, ...]:
    """Reads a table: ``{"provenance": {...}, "entries": [{"op", "max_m", "block", "itemsize", "config"}]}``."""
    entries: Iterable[dict[str, Any]] = table["entries"]
    read = (
        Entry(e["op"], e["max_m"], (e["block"][0], e["block"][1]), e["itemsize"], Config(**e["config"]))
        for e in entries
    )
    return tuple(sorted(read, key=lambda entry: entry.max_m))


@cache
def tuned(arch: int) -> tuple[Entry, ...]:
    """Tuned entries shipped for an architecture, smallest ``max_m`` first; none where nothing was measured."""
    file = files(__package__.rpartition(".")[0]) / "configs" / f"block_sm{arch}.json"
    return parse(json.loads(file.read_text())) if file.is_file() else ()
