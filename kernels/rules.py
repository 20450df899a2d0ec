"""What the families' rules for untuned sizes share: pure functions of sizes and a device."""

from .device import Device


def power_above(n: int) -> int:
    """The smallest power of two not below ``n``; 1 for less."""
    return 1 << max(n - 1, 0).bit_length()


def power_below(n: int) -> int:
    """The largest power of two not above ``n``, which is at least 1."""
    return 1 << (n.bit_length() - 1)


def split_reduction(programs: int, steps: int, device: Device, partial: float = 0, streamed: float = 1) -> int:
    """How many programs share an output tile, so that there are enough to hide latency and each has four steps.

    It stops where the partial sums would move more than 4 % of the streamed bytes, but not before half of the device
    is filled.

    Args:
        programs: Without a split.
        steps: Of the reduction.
        device: Where they run.
        partial: Bytes of one part of the sums; 0 where they do not matter.
        streamed: Bytes of what is streamed, in the same measure.
    """
    split = 1
    while programs * split < 1.5 * device.sms and steps >= 8 * split and split < 16:
        if 2 * split * partial > 0.04 * streamed and programs * split >= device.sms / 2:
            break
        split *= 2
    return split
