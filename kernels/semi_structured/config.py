"""Which tiles the semi-structured kernels run with: data, chosen by pure functions and testable without a GPU."""

from dataclasses import dataclass
from math import ceil

from ..device import Device


@dataclass(frozen=True)
class Config:
    """Meta-parameters of a launch of the Triton kernels.

    Attributes:
        block_m: Rows of activations to a tile.
        block_n: Parents' outputs to a tile.
        block_k: Inputs to a tile.
        split: Programs that share one output tile; their partial sums are added afterwards.
        num_warps: Warps of a program.
        num_stages: Triton's pipeline depth.
    """

    block_m: int
    block_n: int
    block_k: int
    split: int
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
    block_m = min(max(16, 1 << max(m - 1, 0).bit_length()), 64 // (itemsize // 2))
    if op == "semi_structured_grad":
        side = 64 if itemsize == 2 else 32
        tiles = ceil(n / side) * ceil(k / side)
        return Config(min(block_m, 32), side, side, _split(tiles, ceil(m / 32), device), 4, 3)
    if op == "semi_structured_matmul_t":
        block_n, block_k = (32, 64) if itemsize == 2 else (16, 64)
        tiles, steps = ceil(m / block_m) * ceil(k / block_k), ceil(n / block_n)
    else:
        block_n, block_k = (64, 64) if itemsize == 2 else (32, 32)
        tiles, steps = ceil(m / block_m) * ceil(n / block_n), ceil(k / block_k)
    return Config(block_m, block_n, block_k, _split(tiles, steps, device), 4, 4)


def _split(tiles: int, steps: int, device: Device) -> int:
    """How many programs share an output tile, so that the device is filled and each has at least four steps."""
    split = 1
    while tiles * split < 1.5 * device.sms and steps >= 8 * split and split < 16:
        split *= 2
    return split
