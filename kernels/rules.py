"""What the families' configurations and rules share: pure functions of sizes and a device."""

from dataclasses import dataclass

from .device import Device


@dataclass(frozen=True)
class Tiles:
    """Meta-parameters of a launch that multiplies activations by a weight, or two of them into a weight's gradient.

    Attributes:
        block_m: Rows of activations to a tile.
        block_n: Rows of the stored weight to a tile.
        block_k: Columns of the stored weight to a tile.
        split: Programs that share one output tile; their partial sums are added in a second kernel.
        group: Tiles of rows (of the weight's rows in a gradient) that run together, for reuse in L2.
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


def power_above(n: int) -> int:
    """The smallest power of two not below ``n``; 1 for less."""
    return 1 << max(n - 1, 0).bit_length()


def power_below(n: int) -> int:
    """The largest power of two not above ``n``, which is at least 1."""
    return 1 << (n.bit_length() - 1)


PARTIAL = 0.04
"""Bytes of partial sums over the streamed ones up to which a reduction is split further."""


def split_reduction(programs: int, steps: int, device: Device, partial: float = 0, streamed: float = 1) -> int:
    """How many programs share an output tile, so that there are enough to hide latency and each has four steps.

    It stops where the partial sums would move more than :data:`PARTIAL` of the streamed bytes, but not before half of
    the device is filled.

    Args:
        programs: Without a split.
        steps: Of the reduction.
        device: Where they run.
        partial: Bytes of one part of the sums; 0 where they do not matter.
        streamed: Bytes of what is streamed, in the same measure.
    """
    split = 1
    while programs * split < 1.5 * device.sms and steps >= 8 * split and split < 16:
        if 2 * split * partial > PARTIAL * streamed and programs * split >= device.sms / 2:
            break
        split *= 2
    return split
