"""Which tiles the MLP in one launch runs with: few choices, because it is for small layers."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from ..device import Device
from ..partition.config import DIRECT_ROWS, GROUP
from ..rules import power_above

MAX_HIDDEN = 128
"""The most parents of a layer: a program holds all of them, with their children."""
MAX_ACCUMULATORS = 16_384
"""The most sums that a program holds: one for each of its rows and each child of each parent."""


@dataclass(frozen=True)
class Config:
    """Meta-parameters of a launch.

    Attributes:
        block_m: Rows of activations to a program.
        block_h: All parents, rounded up to a power of two.
        block_k: Inputs in one step of the reduction.
        block_o: Outputs to a program.
        num_warps: Warps of a program.
        num_stages: Triton's pipeline depth.
        direct: Whether weights go from memory to the tensor cores without shared memory (``gluon.py``), which suits few
            rows; then ``block_k`` is what the warps that share a reduction load at once, and ``block_o`` is 16 outputs
            for each warp.
    """

    block_m: int
    block_h: int
    block_k: int
    block_o: int
    num_warps: int
    num_stages: int
    direct: bool = False


def limit(hidden: int, alpha: int, itemsize: int) -> str | None:
    """Returns why the kernel rejects a layer's sizes or dtype, or ``None``."""
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
        k: Inputs.
        alpha: Children of each parent.
        pairs: Whether both weights can be read as words of two, as a direct kernel does.
    """

    m: int
    hidden: int
    k: int
    alpha: int
    pairs: bool = False

    family: ClassVar[str] = "mlp"
    config: ClassVar[type] = Config

    def rule(self, device: Device) -> Config:
        """The configuration where nothing was tuned."""
        if self.pairs and self.m <= DIRECT_ROWS:
            return self._direct_rule()
        block_h, held = _tile(self.hidden), power_above(self.alpha) * _tile(self.hidden)
        block_m = min(_tile(self.m), max(MAX_ACCUMULATORS // (2 * held), 16), 64)
        return Config(block_m, block_h, 64, 64, num_warps=8 if held * block_m > 4096 else 4, num_stages=3)

    def fits(self, config: Config, device: Device) -> bool:
        """Whether a configuration can run: a program holds all parents, and its sums fit."""
        if config.block_h < self.hidden:
            return False
        if config.direct:
            return self._is_direct(config)
        return power_above(self.alpha) * config.block_h * config.block_m <= MAX_ACCUMULATORS

    def _is_direct(self, config: Config) -> bool:
        """Whether the direct kernel can run it: its warps cover the tiles exactly, and the sums fit registers."""
        warps_in, warps_out = warps_of(config)
        tiles = config.block_h // 16
        whole = (
            warps_in * GROUP == config.block_k and 0 < warps_out <= tiles and config.block_o == 16 * config.num_warps
        )
        sums = self.alpha * config.block_m * config.block_h // (32 * max(warps_out, 1))
        return self.pairs and whole and config.block_h >= 32 and config.block_m >= 8 and sums <= 128

    def _direct_rule(self) -> Config:
        """Few rows: each warp takes 16 parents, and warps that are left share the reduction if it is long enough.

        A program has eight warps at best, so that many loads are under way although there are few programs.
        """
        block_h = max(32, power_above(self.hidden))
        block_m = min(max(8, power_above(self.m)), 32 if self.alpha <= 4 else 16)
        warps_out = block_h // 16
        warps_in = min(max(8 // warps_out, 1), max(power_above(ceil(self.k / GROUP)), 4 // warps_out, 1))
        warps = warps_in * warps_out
        return Config(block_m, block_h, GROUP * warps_in, 16 * warps, warps, 1, direct=True)


def warps_of(config: Config) -> tuple[int, int]:
    """How many warps of a direct kernel share a reduction, and how many such groups take parents of their own."""
    inner = config.block_k // GROUP
    return inner, config.num_warps // max(inner, 1)


def _tile(n: int) -> int:
    return max(16, power_above(n))
