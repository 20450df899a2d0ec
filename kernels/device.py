"""What a launcher must know of the device. A device is queried once, when a kernel first runs there."""

import os
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .gpus import ARCHITECTURES, GPUS, architecture


@dataclass(frozen=True)
class Device:
    """Properties that choose a configuration.

    Attributes:
        arch: Compute capability, as 90 for 9.0.
        sms: Streaming multiprocessors.
        shared: Bytes of shared memory that one program may use.
        l2: Bytes of L2.
        name: The driver's name for it; empty if it stands for all devices of its architecture.
    """

    arch: int
    sms: int
    shared: int
    l2: int
    name: str = ""

    @property
    def matrix(self) -> str:
        """The name of its own matrix instruction: see :class:`~fpe.kernels.gpus.Architecture`."""
        return architecture(self.arch).matrix

    @property
    def computed_right(self) -> bool:
        """Whether a tile that a program computes must be the right operand of its product.

        Triton passes a computed left operand to ``wgmma`` in registers. The assembler then lets the next iteration
        overwrite them while they may still be read, or makes the matrix instructions wait for each other. The right
        operand always lies in shared memory.
        """
        return self.matrix == "wgmma"

    @property
    def sets_fence(self) -> bool:
        """Whether kernels must set the fence before ``wgmma`` that Triton leaves out (:func:`fences_copies`)."""
        return self.computed_right and not fences_copies()


KNOWN = {
    a.arch: Device(a.arch, GPUS[a.example].sms, a.shared, int(GPUS[a.example].l2) << 20) for a in ARCHITECTURES.values()
}
"""A device of each architecture, to compile and choose for without such a GPU."""


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``, read by Triton at import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def triton_version() -> tuple[int, ...]:
    """The installed Triton's version, as ``(3, 7, 1)``; a suffix, as in ``3.9.0rc1``, is left out."""
    import triton

    return tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:3])


def fences_copies() -> bool:
    """Whether the installed Triton sets a fence between copies to shared memory and matrix instructions that read it.

    From compute capability 9.0 on they access it by different proxies (``cp.async`` by the generic one, ``wgmma`` and
    ``tcgen05.mma`` by the asynchronous one). Without a fence between them the reader may see older contents. Triton
    older than 3.7.1 sets it only where an operand was stored from registers.
    """
    return triton_version() >= (3, 7, 1)


def device_of(tensor: Tensor) -> Device:
    """The device of a tensor; under the interpreter, an A100."""
    return _query(tensor.get_device()) if tensor.is_cuda else KNOWN[80]


def arch_of(device: torch.device) -> int:
    """Compute capability of a CUDA device, as 90 for 9.0; ``torch.compile`` treats it as a constant."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor


@cache
def _query(index: int) -> Device:
    from triton.runtime import driver

    properties = torch.cuda.get_device_properties(index)
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    arch = properties.major * 10 + properties.minor
    return Device(arch, properties.multi_processor_count, shared, properties.L2_cache_size, properties.name)


def input_precision(x: Tensor) -> str:
    """How operands are multiplied: float32 by ``"tf32"`` if PyTorch allows it for its matmuls, all else ``"ieee"``."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def stored_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a kernel stores for operands like ``x``: theirs, but float32 for bfloat16 under the interpreter.

    Triton's interpreter truncates to bfloat16 where hardware rounds, so the launcher converts the result instead.
    """
    return torch.float32 if x.dtype == torch.bfloat16 and interpreting() else x.dtype
