"""Which tiles a partition kernel runs with: data, chosen by a pure function and testable without a GPU."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from ..bitmap.layout import WORD
from ..device import Device
from ..rules import PARTIAL, Tiles, power_above, power_below, split_reduction

DIRECT_ROWS = 64
"""Rows of activations up to which the direct kernels serve."""

GROUP, COLUMNS = 128, 64
"""Columns of 16 rows of a weight that a warp of a direct kernel loads at once; on the transpose, the most."""

MAX_ALPHA = 8
"""Children that the Triton kernels take: an accumulator, or a tile of activations, for each."""


def limit(alpha: int) -> str | None:
    """Returns why the kernels reject this number of children, or ``None``."""
    return f"it takes up to {MAX_ALPHA} children, got {alpha}" if alpha > MAX_ALPHA else None


@dataclass(frozen=True)
class Config(Tiles):
    """Meta-parameters of a launch.

    Attributes:
        direct: Whether weights go from memory to the tensor cores without shared memory (``gluon.py``), which suits few
            rows; then ``block_n`` x ``block_k`` is what its warps load at once.
    """

    direct: bool = False


@dataclass(frozen=True)
class Problem:
    """What a launch must do.

    Attributes:
        op: ``"split_matmul"``, ``"merge_matmul"`` or ``"partition_grad"``.
        m: Rows of activations.
        n: Rows of the stored weight.
        k: Columns of the stored weight.
        transposed: Whether the operation is on the transposed weight.
        alpha: Children.
        itemsize: Bytes of an operand's element.
        pairs: Whether the weight can be read as words of two, or its kept values by lines, as a direct kernel does.
        kept: Share of the entries that exist, where the weight is stored as its kept values alone; none where all are.
        seeded: Whether labels are made of a seed.
    """

    op: str
    m: int
    n: int
    k: int
    transposed: bool
    alpha: int
    itemsize: int
    pairs: bool = False
    kept: float | None = None
    seeded: bool = False

    family: ClassVar[str] = "partition"
    config: ClassVar[type] = Config

    def rule(self, device: Device) -> Config:
        """The configuration where nothing was tuned."""
        if self.op == "partition_grad":
            return _grad_rule(self, device)
        return _direct_rule(self, device) if self.pairs and self.m <= DIRECT_ROWS else _matmul_rule(self, device)

    @property
    def sums(self) -> int:
        """How many sums a program holds for each output: one for every child of a split, one in all of a merge."""
        return 1 if self.op == "merge_matmul" else self.alpha

    def fits(self, config: Config, device: Device) -> bool:
        """Whether a configuration can run: sizes are powers of two, and what it keeps on chip fits."""
        powers = (config.block_m, config.block_n, config.block_k, config.split, config.num_warps)
        if any(size < 1 or size & (size - 1) for size in powers) or config.num_stages < 1 or config.group < 1:
            return False
        if config.direct:
            return _is_direct(self, config) and shared_bytes(self, config, device) <= device.shared
        if min(config.block_m, config.block_n, config.block_k) < 16 or config.block_k % 8:
            return False
        if self.kept is not None and config.block_k < WORD:
            return False
        return shared_bytes(self, config, device) <= device.shared


def in_pairs(problem: Problem, config: Config) -> bool:
    """Whether kept values are placed two at a time, on the transpose: more children or rows leave no registers for it.

    An empty weight has no last tile, at which such a kernel looks first.
    """
    able = problem.kept is not None and problem.transposed and problem.itemsize == 2 and not config.direct
    able = able and problem.op != "partition_grad" and min(problem.n, problem.k) > 0
    return able and problem.alpha <= 4 and config.block_m <= 32


def columns_of(block_m: int, sums: int) -> int:
    """Columns of the transpose that a warp of a direct kernel takes: half as many where their sums would not fit."""
    return COLUMNS if sums * block_m <= 64 else COLUMNS // 2


def warps_of(config: Config, transposed: bool, sums: int) -> tuple[int, int]:
    """How many warps of a direct kernel share a reduction, and how many such groups take outputs of their own."""
    columns = columns_of(config.block_m, sums)
    inner = config.num_warps * columns // config.block_k if transposed else config.block_k // GROUP
    return inner, config.num_warps // max(inner, 1)


def _is_direct(problem: Problem, config: Config) -> bool:
    """Whether a direct kernel can run it: its warps load the tile once or twice, and the sums fit registers."""
    warps_in, warps_out = warps_of(config, problem.transposed, problem.sums)
    able = problem.pairs and problem.op != "partition_grad" and config.num_warps in (4, 8)
    if not (able and warps_in and warps_out):
        return False
    if problem.transposed:
        outputs, loads = columns_of(config.block_m, problem.sums), config.block_n // (16 * warps_in)
        tile = (16 * warps_in * loads, outputs * warps_out)
        if outputs < COLUMNS and (problem.seeded or loads != 2):
            return False
    else:
        outputs, loads = config.block_n // warps_out, config.block_n // (16 * warps_out)
        tile = (16 * warps_out * loads, GROUP * warps_in)
    sums = problem.sums * config.block_m * outputs // 32
    return (config.block_n, config.block_k) == tile and loads in (1, 2) and config.block_m >= 8 and sums <= 128


def shared_bytes(problem: Problem, config: Config, device: Device) -> int:
    """Shared memory of the pipelined tiles and of the shares that go through it, in bytes; of a direct kernel its sums.

    ``wgmma`` and ``tcgen05.mma`` read shared memory while the next tiles arrive: one buffer more than ``mma`` needs.
    """
    if config.direct:
        # Of the warps that share a reduction: one of their sums at a time.
        warps_in, warps_out = warps_of(config, problem.transposed, problem.sums)
        tiles = 1 if problem.transposed else config.block_n // (16 * warps_out)
        return config.num_warps * tiles * config.block_m // 8 * 512 if warps_in > 1 else 0
    m, n, k, alpha = config.block_m, config.block_n, config.block_k, problem.alpha
    buffers = max(config.num_stages - (1 if device.matrix == "mma" else 0), 1)
    if problem.op == "partition_grad":
        children = m * (k if problem.transposed else n)
        other = m * (n if problem.transposed else k)
        return (alpha * children + other) * problem.itemsize * buffers
    x = m * (n if problem.transposed else k) * (alpha if problem.op == "merge_matmul" else 1)
    return ((n * k + x) * buffers + 2 * n * k) * problem.itemsize


def _direct_rule(problem: Problem, device: Device) -> Config:
    """Few rows: enough warps must be under way to hide the latency of memory, at little cost in bytes.

    What fills the device, cheapest first:

    - narrower tiles, whose warps share the reduction, while programs ask L2 for at most half as many bytes of
      activations as of weights;
    - a split reduction, while its partial sums are at most 2 % of the weights' bytes (4 % above 16 rows);
    - more warps in a program;
    - only where all this leaves half of the device empty, the narrowest tiles and up to 16 splits.
    """
    sums, children = problem.sums, problem.alpha // problem.sums
    outputs, reduced = (problem.k, problem.n) if problem.transposed else (problem.n, problem.k)
    narrowest, tiles, depth = 16, 1, GROUP
    if problem.transposed:
        # A warp takes 32 columns where 16 rows of activations then need one pass instead of two. It loads 16 rows of
        # the weight at a time, or 32 where the registers hold them beside the sums.
        narrow = sums > 4 and problem.m > 8 and not problem.seeded
        narrowest, depth = (COLUMNS // 2, 32) if narrow else (COLUMNS, 32 if sums <= 2 and problem.alpha <= 4 else 16)
    most = min(power_below(128 * 32 // (sums * narrowest)), 32 if problem.alpha <= 4 else 16)
    block_m = min(max(8, power_above(problem.m)), most)
    tiles_m, partial = ceil(problem.m / block_m), problem.m * outputs * sums * 4
    read: float = min(problem.m, block_m) * children
    weights: float = problem.n * problem.k * problem.itemsize
    if problem.kept is not None:
        weights *= problem.kept
        read /= max(problem.kept, 1 / 32)
        tiles = 2 if problem.alpha == 1 and block_m <= 16 else 1  # of a warp, which share its loads of activations
    allowed = (0.02 if problem.m <= 16 else 0.04) * weights
    out, split, warps = 4 * tiles * narrowest, 1, 4

    def of_a_warp() -> int:
        return narrowest * min(tiles, max(out // 32, 1))

    def fills(share: float) -> bool:
        return tiles_m * ceil(outputs / out) * split >= share * device.sms

    def steps() -> float:
        return reduced / (depth * (warps * of_a_warp() // out) * split)

    while not fills(1.5) and out > narrowest and steps() >= 4 and 4 * read <= out:
        out //= 2
    while not fills(1.5) and steps() >= 8 and 2 * split * partial <= allowed:
        split *= 2
    if not fills(1.5) and steps() >= 4:
        warps = 8
    while not fills(0.5) and out > narrowest and steps() >= 4:
        out //= 2
    while not fills(0.5) and steps() >= 8 and split < 16:
        split *= 2
    inner = depth * (warps * of_a_warp() // out)
    block_n, block_k = (inner, out) if problem.transposed else (out, inner)
    return Config(block_m, block_n, block_k, split, 8, warps, 1, direct=True)


def _matmul_rule(problem: Problem, device: Device) -> Config:
    m, narrow, alpha = problem.m, problem.itemsize == 2, power_above(problem.alpha)
    merge, packed = problem.op == "merge_matmul", problem.kept is not None
    sums = 1 if merge else alpha
    outer = 64 if narrow else 32
    # The accumulators, and a merge's tiles of activations, share the registers and shared memory of a program: more
    # children leave room for fewer rows and a shorter step.
    most = (256 // alpha if merge or alpha == 2 else 128 // alpha) if narrow else 64 // alpha
    if narrow and device.computed_right:
        most = max(most, 64)  # the rows of activations must fill a warpgroup's matrix instruction
    if merge and device.matrix == "mma":
        most = min(most, 64)  # warp-wide matrix instructions keep both operands in registers
    block_m = min(max(16, power_above(m)), max(most, 16))
    wide = alpha <= 2 and block_m <= 16 and not packed  # places of kept values share the registers
    inner = (128 if wide else 64 if alpha <= 4 else 32) if narrow else 32
    few = 2 if problem.seeded else 4  # children whose places and words four warps can hold
    crowded = packed and (alpha > few or alpha * block_m > 64 or not narrow)
    warps = 8 if max(sums * block_m, alpha * block_m if merge else 0) > 128 or crowded else 4
    outputs, reduced = (problem.k, problem.n) if problem.transposed else (problem.n, problem.k)
    partial = m * outputs * sums * 4
    weights: float = problem.n * problem.k * problem.itemsize
    if problem.kept is not None:
        weights *= problem.kept
        half, whole = device.sms / 2, ceil(m / block_m) * ceil(outputs / outer)
        if half / 2 <= whole < half and 2 * partial > PARTIAL * weights:
            outer = 32  # fills half of the device where the sums of a split would cost more beside few values
    block_n, block_k = (inner, outer) if problem.transposed else (outer, inner)
    programs, steps = ceil(m / block_m) * ceil(outputs / outer), ceil(reduced / inner)
    split = split_reduction(programs, steps, device, partial, weights)
    return Config(block_m, block_n, block_k, split, 8, warps, 4)


def _grad_rule(problem: Problem, device: Device) -> Config:
    narrow, alpha = problem.itemsize == 2, problem.alpha
    large, small = (128 if alpha <= 2 else 64, 64 if alpha <= 2 else 32) if narrow else (64 if alpha <= 4 else 32, 32)
    block_n, block_k = (small, large) if problem.transposed else (large, small)
    block_m = 64 if narrow else 32
    tiles = ceil(problem.n / block_n) * ceil(problem.k / block_k)
    split = split_reduction(tiles, ceil(problem.m / block_m), device)
    warps = 8 if alpha * block_n * block_k >= 128 * 128 else 4
    return Config(block_m, block_n, block_k, split, 8, warps, 4)
