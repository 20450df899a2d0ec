"""Tiles of the fused MLP: few choices, as it is for small layers."""

from dataclasses import dataclass
from typing import ClassVar

from ..device import Device
from ..rules import power_above

MAX_HIDDEN = 128
"""Parents that a program holds, for each of its rows and of their children."""
MAX_ACCUMULATORS = 16_384
"""Sums that a program holds."""


@dataclass(frozen=True)
class Config:
    """Meta-parameters of a launch.

    Attributes:
        block_m: Rows of activations to a program.
        block_h: All parents, rounded up to a power of two.
        block_k: Step along the inputs.
        block_o: Outputs to a program.
        num_warps: Warps of a program.
        num_stages: Triton's pipeline depth.
    """

    block_m: int
    block_h: int
    block_k: int
    block_o: int
    num_warps: int
    num_stages: int


def limit(hidden: int, alpha: int, itemsize: int) -> str | None:
    """What of a layer's sizes and type the kernel does not take, in words."""
    most = MAX_ACCUMULATORS // 16
    if itemsize != 2:
        return "it takes float16 and bfloat16: in float32 the children's sums do not fit into registers"
    if hidden > MAX_HIDDEN or power_above(alpha) * _tile(hidden) > most:
        return f"it takes up to {MAX_HIDDEN} hidden parents with {most} children in all, got {hidden} with {alpha} each"
    return None


@dataclass(frozen=True)
class Problem:
    """What a launch must do.

    Attributes:
        m: Rows of activations.
        hidden: Parents in the hidden layer.
        alpha: Children of each.
    """

    m: int
    hidden: int
    alpha: int

    family: ClassVar[str] = "mlp"
    config: ClassVar[type] = Config

    def rule(self, device: Device) -> Config:
        """The configuration where nothing was tuned."""
        block_h, held = _tile(self.hidden), power_above(self.alpha) * _tile(self.hidden)
        block_m = min(_tile(self.m), max(MAX_ACCUMULATORS // (2 * held), 16), 64)
        return Config(block_m, block_h, 64, 64, num_warps=8 if held * block_m > 4096 else 4, num_stages=3)

    def fits(self, config: Config, device: Device) -> bool:
        """Whether a configuration can run: a program holds all parents, and its sums fit."""
        held = power_above(self.alpha) * config.block_h
        return config.block_h >= self.hidden and held * config.block_m <= MAX_ACCUMULATORS


def _tile(n: int) -> int:
    return max(16, power_above(n))
