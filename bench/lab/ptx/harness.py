"""Executes what the real launchers launch: their own PTX, on their own operands.

Launches are caught as in :mod:`fpe.bench.lab.compile`, with the specialization and configuration of a GPU run, but the
operands are CPU tensors with numbers in them. What Triton would hand to the assembler is executed instead, and changes
the tensors. So an operation of several launches works from its first to its last.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..compile import catching
from .machine import MOST_INSTRUCTIONS, WARP, Handler, Machine
from .memory import Array, Global, Region
from .parse import Kernel, parse
from .table import table

POISON = 0xFF
"""Every byte of memory that nobody has written: NaN in every floating type."""

Change = Callable[[Kernel], Kernel]
"""What is done to a kernel before it is executed."""


@dataclass
class Execution:
    """One launch that was executed.

    Attributes:
        kernel: Its code.
        ctas: Programs.
        executed: How often each full opcode was executed by all of them together.
        visited: Of each instruction whether some thread executed it.
    """

    kernel: Kernel
    ctas: int
    executed: Counter[str]
    visited: Array


@dataclass
class _Storages:
    """Storages that were made without contents, and which of their bytes were written since, by address."""

    fresh: dict[int, tuple[Tensor, Array]] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> None:
        data = _stored(tensor)
        if data.numel():
            data.fill_(POISON)
            self.fresh[data.data_ptr()] = (data, np.zeros(len(data), bool))

    def initialised(self, tensor: Tensor) -> Array:
        data = _stored(tensor)
        known = self.fresh.get(data.data_ptr())
        return known[1] if known else np.ones(len(data), bool)


def _stored(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's whole storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class _Watch(TorchDispatchMode):
    """Poisons and remembers what PyTorch hands out without contents."""

    EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self, storages: _Storages) -> None:
        super().__init__()
        self.storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.EMPTY and result.device.type == "cpu":
            self.storages.add(result)
        return result


@contextmanager
def executing(
    arch: int,
    done: list[Execution],
    change: Change = lambda kernel: kernel,
    watch: Handler | None = None,
    limit: int = MOST_INSTRUCTIONS,
) -> Iterator[None]:
    """Within it a launch is compiled to PTX for ``arch`` and executed.

    Args:
        arch: Compute capability, as 80.
        done: The list that launches join.
        change: Done to every kernel before.
        watch: Looks at every instruction, see :class:`.machine.Machine`.
        limit: Instructions after which a launch counts as endless.

    Raises:
        RuntimeError: Triton is interpreting.
    """
    storages = _Storages()

    def run(compiled: Any, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        x, y, z = (*grid, 1, 1)[:3]
        arguments = {name: given[name] for name in names}
        done.append(_execute(compiled, arguments, (x, y, z), arch, storages, change, watch, limit))

    with ExitStack() as stack:
        stack.enter_context(patch.object(triton.knobs.runtime, "add_stages_inspection_hook", _no_assembler))
        stack.enter_context(catching(arch, lambda *key: False, run))
        stack.enter_context(_Watch(storages))
        yield


def _no_assembler(*given: Any) -> tuple[str, str] | None:
    """Triton's hook for its stages: the machine code is not needed."""
    if not given:
        return "ptx alone", "ptx alone"
    _, stages, *_ = given
    stages["cubin"] = lambda ptx, metadata: b""
    return None


@lru_cache(256)
def parsed(ptx: str) -> Kernel:
    """A kernel's code; not to be changed."""
    return parse(ptx)


def _execute(
    compiled: Any,
    arguments: dict[str, Any],
    grid: tuple[int, int, int],
    arch: int,
    storages: _Storages,
    change: Change,
    watch: Handler | None,
    limit: int,
) -> Execution:
    kernel = change(parsed(compiled.asm["ptx"]))
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    memory, addresses = _memory(tensors, storages)
    values = [addresses[name] if name in addresses else int(value) for name, value in arguments.items()]
    # Behind the arguments Triton has pointers to scratch memory, which none of these kernels uses: to use one faults.
    values += [0] * (len(kernel.parameters) - len(values))
    threads, shared = compiled.metadata.num_warps * WARP, compiled.metadata.shared
    machine = Machine(kernel, grid, threads, values, memory, shared, table(arch), watch)
    machine.run(limit)
    memory.write_back()
    return Execution(kernel, machine.ctas, machine.executed, machine.visited)


def _memory(tensors: dict[str, Tensor], storages: _Storages) -> tuple[Global, dict[str, int]]:
    """Global memory with the storages of some tensors, and the address of each tensor."""
    regions: dict[int, Region] = {}
    for name, tensor in tensors.items():
        key = tensor.untyped_storage().data_ptr()
        if key not in regions:
            data = _stored(tensor).numpy()
            regions[key] = Region(name, data, np.zeros(len(data), bool), storages.initialised(tensor))
        if tensor.numel():
            _bytes_of(tensor, regions[key].accessible)[...] = True
    memory = Global(regions.values())
    first = dict(zip(regions, memory.addresses, strict=True))
    addresses = {}
    for name, tensor in tensors.items():
        key = tensor.untyped_storage().data_ptr()
        addresses[name] = first[key] + int(tensor.storage_offset()) * tensor.element_size()
    return memory, addresses


def _bytes_of(tensor: Tensor, plane: Array) -> Array:
    """The facts ``plane[bytes]`` of a storage, seen through a tensor: ``[*shape, itemsize]``."""
    size = tensor.element_size()
    return np.lib.stride_tricks.as_strided(
        plane[tensor.storage_offset() * size :], (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1)
    )
