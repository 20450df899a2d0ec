"""All facts about GPUs that the package uses, in one place; neither torch nor Triton is imported.

A new GPU is a line of :data:`GPUS`; a new architecture is a line of :data:`ARCHITECTURES` and an example of it. An
unknown architecture is taken for the newest known one that is not newer (:func:`architecture`): compute capability 8.7
for 8.6, 10.3 and 11.0 for 10.0, 12.1 for 12.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


@dataclass(frozen=True)
class Architecture:
    """What GPUs of one compute capability share.

    Attributes:
        arch: Compute capability, as 90 for 9.0.
        example: A GPU of it, by its key in :data:`GPUS`; without a device, kernels are compiled for it.
        matrix: Its own matrix instruction: ``"mma"`` of a warp, ``"wgmma"`` of four warps, or ``"tcgen05.mma"``.
            ``"mma"`` runs on all of them.
        shared: Bytes of shared memory that one program may use.
        shared_sm: Bytes of shared memory of a multiprocessor; each program takes 1024 more of them than it asks for.
        warps: Resident warps of a multiprocessor.
        programs: Resident programs of a multiprocessor.
        tensor: Columns of tensor memory of a multiprocessor.
        warp_mma: Share of the arithmetic rate that is reached with ``mma`` instead of its own instruction; assumed.
        measured_warp_mma: The same for ``mma.sp``, from a publication that measured it; ``None`` if there is none.
        spills_square: Whether four warps spill registers on a tile of 64 x 64 sums of 16-bit operands, as compiled.
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


@cache
def architecture(arch: int) -> Architecture:
    """The newest known architecture that is not newer than a compute capability, as 103 for 10.3; else the oldest."""
    return ARCHITECTURES[max((known for known in ARCHITECTURES if known <= arch), default=OLDEST)]


def runs_mma_sp(arch: int) -> bool:
    """Whether the kernel on sparse tensor cores may run. Beside ``tcgen05.mma`` it may not: ``mma`` is slow there."""
    return architecture(arch).matrix != "tcgen05.mma"


def reads_kept_values(arch: int) -> bool:
    """Whether kernels may multiply by packed values as they gather them.

    What Triton 3.7.1 compiles for ``tcgen05.mma`` lacks a fence between gathered values and the product, as the lab
    finds.
    """
    return architecture(arch).matrix != "tcgen05.mma"


class Gpu(NamedTuple):
    """A GPU as its vendor publishes it.

    Attributes:
        name: Its vendor's name.
        arch: Compute capability, as 90 for 9.0.
        bandwidth: Memory bandwidth in GB/s.
        tensor: TFLOP/s of 16-bit operands on tensor cores, float32 sums, without sparsity.
        tf32: TFLOP/s of TF32 on tensor cores, without sparsity.
        fp32: TFLOP/s of float32.
        l2: MB of L2.
        sms: Multiprocessors.
        clock: Boost clock in GHz.
        source: A key of :data:`SOURCES`.
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
    source: str


SOURCES: Mapping[str, str] = {
    "ga100": "NVIDIA A100 Tensor Core GPU Architecture, white paper; A100 and A30 data sheets",
    "ga102": "NVIDIA Ampere GA102 GPU Architecture, white paper; GeForce RTX 30 specifications",
    "ampere": "NVIDIA's data sheets of the A2, A10, A40 and RTX A series",
    "a10g": "NVIDIA A10G data sheet, as AWS publishes it for EC2 G5",
    "ad102": "NVIDIA Ada GPU Architecture, white paper; GeForce RTX 40 specifications",
    "ada": "NVIDIA's data sheets of the L4, L40, L40S and RTX Ada Generation series",
    "gh100": "NVIDIA H100 Tensor Core GPU Architecture, white paper; H100 and H200 data sheets",
    "gb100": "NVIDIA's data sheet of the HGX B200",
    "gb202": "NVIDIA RTX Blackwell GPU Architecture, white paper; GeForce RTX 50 specifications",
}
"""Where figures are published. Many data sheets give rates with sparsity, which are twice the rates here."""


def _geforce(
    name: str, arch: int, bandwidth: float, fp32: float, l2: float, sms: int, clock: float, source: str
) -> Gpu:
    """A GPU whose tensor cores sum in float32 at half rate: TF32 is as fast as float32, 16 bits twice as fast."""
    return Gpu(name, arch, bandwidth, round(2 * fp32, 1), fp32, fp32, l2, sms, clock, source)


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu("A100 80GB SXM", 80, 2039, 312, 156, 19.5, 40, 108, 1.41, "ga100"),
    "a100-40": Gpu("A100 40GB SXM", 80, 1555, 312, 156, 19.5, 40, 108, 1.41, "ga100"),
    "a100-pcie": Gpu("A100 80GB PCIe", 80, 1935, 312, 156, 19.5, 40, 108, 1.41, "ga100"),
    "a100-pcie-40": Gpu("A100 40GB PCIe", 80, 1555, 312, 156, 19.5, 40, 108, 1.41, "ga100"),
    "a30": Gpu("A30", 80, 933, 165, 82, 10.3, 24, 56, 1.44, "ga100"),
    "a2": Gpu("A2", 86, 200, 18, 9, 4.5, 2, 10, 1.77, "ampere"),
    "a10": Gpu("A10", 86, 600, 125, 62.5, 31.2, 6, 72, 1.695, "ampere"),
    "a10g": Gpu("A10G", 86, 600, 70, 35, 35, 6, 80, 1.71, "a10g"),
    "a40": Gpu("A40", 86, 696, 149.7, 74.8, 37.4, 6, 84, 1.74, "ampere"),
    "a4000": Gpu("RTX A4000", 86, 448, 76.7, 38.4, 19.2, 4, 48, 1.56, "ampere"),
    "a4500": Gpu("RTX A4500", 86, 640, 94.6, 47.3, 23.7, 6, 56, 1.65, "ampere"),
    "a5000": Gpu("RTX A5000", 86, 768, 111.1, 55.6, 27.8, 6, 64, 1.695, "ampere"),
    "a6000": Gpu("RTX A6000", 86, 768, 154.8, 77.4, 38.7, 6, 84, 1.80, "ampere"),
    "3060": _geforce("RTX 3060", 86, 360, 12.7, 3, 28, 1.777, "ga102"),
    "3060-ti": _geforce("RTX 3060 Ti", 86, 448, 16.2, 4, 38, 1.665, "ga102"),
    "3070": _geforce("RTX 3070", 86, 448, 20.3, 4, 46, 1.725, "ga102"),
    "3070-ti": _geforce("RTX 3070 Ti", 86, 608, 21.7, 4, 48, 1.77, "ga102"),
    "3080": _geforce("RTX 3080", 86, 760, 29.8, 5, 68, 1.71, "ga102"),
    "3080-ti": _geforce("RTX 3080 Ti", 86, 912, 34.1, 6, 80, 1.665, "ga102"),
    "3090": Gpu("RTX 3090", 86, 936, 71, 35.6, 35.6, 6, 82, 1.70, "ga102"),
    "3090-ti": _geforce("RTX 3090 Ti", 86, 1008, 40, 6, 84, 1.86, "ga102"),
    "l4": Gpu("L4", 89, 300, 121, 60, 30.3, 48, 58, 2.04, "ada"),
    "l40": Gpu("L40", 89, 864, 181, 90.5, 90.5, 96, 142, 2.49, "ada"),
    "l40s": Gpu("L40S", 89, 864, 362, 183, 91.6, 96, 142, 2.52, "ada"),
    "4060": _geforce("RTX 4060", 89, 272, 15.1, 24, 24, 2.46, "ad102"),
    "4060-ti": _geforce("RTX 4060 Ti", 89, 288, 22.1, 32, 34, 2.535, "ad102"),
    "4070": _geforce("RTX 4070", 89, 504, 29.1, 36, 46, 2.475, "ad102"),
    "4070-super": _geforce("RTX 4070 SUPER", 89, 504, 35.5, 48, 56, 2.475, "ad102"),
    "4070-ti": _geforce("RTX 4070 Ti", 89, 504, 40.1, 48, 60, 2.61, "ad102"),
    "4070-ti-super": _geforce("RTX 4070 Ti SUPER", 89, 672, 44.1, 48, 66, 2.61, "ad102"),
    "4080": _geforce("RTX 4080", 89, 717, 48.7, 64, 76, 2.505, "ad102"),
    "4080-super": _geforce("RTX 4080 SUPER", 89, 736, 52.2, 64, 80, 2.55, "ad102"),
    "4090": Gpu("RTX 4090", 89, 1008, 165.2, 82.6, 82.6, 72, 128, 2.52, "ad102"),
    "4000-ada": Gpu("RTX 4000 Ada", 89, 360, 106.9, 53.4, 26.7, 48, 48, 2.175, "ada"),
    "5000-ada": Gpu("RTX 5000 Ada", 89, 576, 261.1, 130.6, 65.3, 72, 100, 2.55, "ada"),
    "6000-ada": Gpu("RTX 6000 Ada", 89, 960, 364.2, 182.1, 91.1, 96, 142, 2.505, "ada"),
    "h100": Gpu("H100 SXM", 90, 3350, 989, 494, 66.9, 50, 132, 1.98, "gh100"),
    "h100-pcie": Gpu("H100 PCIe", 90, 2039, 756, 378, 51.2, 50, 114, 1.755, "gh100"),
    "h100-nvl": Gpu("H100 NVL", 90, 3938, 835, 417, 60, 50, 132, 1.785, "gh100"),
    "h200": Gpu("H200", 90, 4800, 989, 494, 66.9, 50, 132, 1.98, "gh100"),
    "b200": Gpu("B200", 100, 8000, 2250, 1125, 75, 126, 148, 1.965, "gb100"),
    "5060-ti": _geforce("RTX 5060 Ti", 120, 448, 23.7, 32, 36, 2.572, "gb202"),
    "5070": _geforce("RTX 5070", 120, 672, 30.9, 48, 48, 2.512, "gb202"),
    "5070-ti": _geforce("RTX 5070 Ti", 120, 896, 43.9, 48, 70, 2.452, "gb202"),
    "5080": _geforce("RTX 5080", 120, 960, 56.3, 64, 84, 2.617, "gb202"),
    "5090": Gpu("RTX 5090", 120, 1792, 209.5, 104.8, 104.8, 96, 170, 2.407, "gb202"),
}
"""By a short name: the words that tell a GPU from the others, joined by ``-``."""
