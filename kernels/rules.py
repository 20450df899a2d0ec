"""What the families' launch configurations and their rules share: pure functions of sizes and a device."""

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
    """The smallest power of two that is at least ``n``; 1 for ``n`` below 1."""
    return 1 << max(n - 1, 0).bit_length()


def power_below(n: int) -> int:
    """The largest power of two that is at most ``n``, for ``n`` of at least 1."""
    return 1 << (n.bit_length() - 1)


PARTIAL = 0.04
"""A reduction is split further while the bytes of its partial sums are at most this share of the streamed bytes."""


def split_reduction(programs: int, steps: int, device: Device, partial: float = 0, streamed: float = 1) -> int:
    """How many programs share an output tile: enough to hide latency, at most 16, each with at least four steps.

    Splitting stops before the partial sums would move more than :data:`PARTIAL` of the streamed bytes, if half of the
    device is filled by then.

    Args:
        programs: Number of programs without a split.
        steps: Number of steps of the reduction.
        device: Where they run.
        partial: Bytes of one part of the sums; 0 if they do not matter.
        streamed: Bytes that are streamed, in the unit of ``partial``.
    """
    split = 1
    while programs * split < 1.5 * device.sms and steps >= 8 * split and split < 16:
        if 2 * split * partial > PARTIAL * streamed and programs * split >= device.sms / 2:
            break
        split *= 2
    return split
