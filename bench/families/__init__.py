"""The families of kernels, one module each, and what every walker derives from them.

Whatever compiles, traces, executes or counts kernels asks here: a new kernel is an entry of its family's ``KERNELS``.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from ...kernels.device import Device
from . import bitmap, block, mlp, partition, semi_structured
from .contract import REDUCE, TYPES, Case, Family, Kernel, Row

FAMILIES: dict[str, Family] = {
    "block": block,
    "partition": partition,
    "mlp": mlp,
    "semi_structured": semi_structured,
    "bitmap": bitmap,
}
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (*(k for family in FAMILIES.values() for k in family.KERNELS), REDUCE)
}
"""By the functions' names."""
SHOWN: dict[str, Kernel] = {kernel.shown: kernel for kernel in KERNELS.values()}
"""By their names in rows."""
CASES: tuple[Case, ...] = tuple(case for family in FAMILIES.values() for case in family.CASES)
QUICK: tuple[Case, ...] = tuple(case for family in FAMILIES.values() for case in family.QUICK)


@contextmanager
def on(device: Device) -> Iterator[None]:
    """Within it every launcher takes tensors to lie on a device of these properties."""
    with ExitStack() as stack:
        for family in FAMILIES.values():
            for module in family.LAUNCHERS:
                stack.enter_context(patch.object(module, "device_of", lambda tensor: device))
        yield


__all__ = ["CASES", "FAMILIES", "KERNELS", "QUICK", "REDUCE", "SHOWN", "TYPES", "Case", "Family", "Kernel", "Row", "on"]
