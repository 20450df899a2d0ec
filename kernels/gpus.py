"""The facts about GPUs that anything here rests on, in one place and pure: neither torch nor Triton is imported.

A new GPU is a line of :data:`GPUS`; a new architecture is one of :data:`ARCHITECTURES` and an example of it. What is in
neither is taken for the newest known one that is not newer (:func:`architecture`): compute capability 8.7 for 8.6, 10.3
and 11.0 for 10.0, 12.1 for 12.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Architecture:
    """What GPUs of one compute capability share.

    Attributes:
        arch: Compute capability, as 90 for 9.0.
        example: A GPU of it, by its key in :data:`GPUS`; what is compiled without a device is compiled for it.
        matrix: Its own matrix instruction: ``"mma"`` of a warp, ``"wgmma"`` of four, or ``"tcgen05.mma"``. The first
            runs everywhere.
        shared: Bytes of shared memory that one program may use.
        shared_sm: Bytes of a multiprocessor, of which each program costs 1024 more than it asks for.
        warps: Resident warps of a multiprocessor.
        programs: Resident programs of a multiprocessor.
        tensor: Columns of tensor memory of a multiprocessor.
        warp_mma: What is left of the arithmetic rate with ``mma`` instead of its own instruction; assumed.
        measured_warp_mma: The same of ``mma.sp`` as somebody measured it; none where nobody did.
        spills_square: Whether four warps spill sums of 64 x 64 beside 16-bit operands, as compiled.
    """

    arch: int
    example: str
    matrix: str
    shared: int
    shared_sm: int
    warps: int
    programs: int
    tensor: int = 0
    warp_mma: float = 1.0
    measured_warp_mma: float | None = 1.0
    spills_square: bool = False


ARCHITECTURES: Mapping[int, Architecture] = {
    a.arch: a
    for a in (
        Architecture(80, "a100", "mma", 166_912, 167_936, 64, 32, spills_square=True),
        Architecture(86, "a6000", "mma", 101_376, 102_400, 48, 16, spills_square=True),
        Architecture(89, "4090", "mma", 101_376, 102_400, 48, 24),
        # Measured: Luo et al., arXiv 2501.12084, the mean over types.
        Architecture(90, "h200", "wgmma", 232_448, 233_472, 64, 32, warp_mma=0.65, measured_warp_mma=0.629),
        Architecture(100, "b200", "tcgen05.mma", 232_448, 233_472, 64, 32, 512, 0.35, None, spills_square=True),
        Architecture(120, "5090", "mma", 101_376, 102_400, 48, 24),
    )
}
"""By compute capability: CUDA programming guide, technical specifications."""

OLDEST = min(ARCHITECTURES)
"""The first compute capability that the kernels run on."""


def architecture(arch: int) -> Architecture:
    """The newest known architecture that is not newer than a compute capability, as 103 for 10.3; else the oldest."""
    return ARCHITECTURES[max((known for known in ARCHITECTURES if known <= arch), default=OLDEST)]


def runs_mma_sp(arch: int) -> bool:
    """Whether the kernel on sparse tensor cores is meant to run: where ``tcgen05`` is, ``mma`` is too slow for it."""
    return architecture(arch).matrix != "tcgen05.mma"


class Gpu(NamedTuple):
    """A GPU by its vendor's data sheet: GB/s, dense TFLOP/s without sparsity, MB, multiprocessors, boost clock in GHz.

    Products are of 16-bit operands (``tensor``) and of TF32 on tensor cores, both with float32 sums, and of float32.
    """

    name: str
    arch: int
    bandwidth: float
    tensor: float
    tf32: float
    fp32: float
    l2: float
    sms: int
    clock: float


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu("A100 80GB SXM", 80, 2039, 312, 156, 19.5, 40, 108, 1.41),
    "a100-40": Gpu("A100 40GB SXM", 80, 1555, 312, 156, 19.5, 40, 108, 1.41),
    "3090": Gpu("RTX 3090", 86, 936, 71, 35.6, 35.6, 6, 82, 1.70),
    "a6000": Gpu("RTX A6000", 86, 768, 154.8, 77.4, 38.7, 6, 84, 1.80),
    "l4": Gpu("L4", 89, 300, 121, 60, 30.3, 48, 58, 2.04),
    "l40s": Gpu("L40S", 89, 864, 362, 183, 91.6, 96, 142, 2.52),
    "4090": Gpu("RTX 4090", 89, 1008, 165.2, 82.6, 82.6, 72, 128, 2.52),
    "h100": Gpu("H100 SXM", 90, 3350, 989, 494, 66.9, 50, 132, 1.98),
    "h100-pcie": Gpu("H100 PCIe", 90, 2039, 756, 378, 51.2, 50, 114, 1.755),
    "h200": Gpu("H200", 90, 4800, 989, 494, 66.9, 50, 132, 1.98),
    "b200": Gpu("B200", 100, 8000, 2250, 1125, 75, 126, 148, 1.965),
    "5090": Gpu("RTX 5090", 120, 1792, 209.5, 104.8, 104.8, 96, 170, 2.407),
}
"""By a short name."""
