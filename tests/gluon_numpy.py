"""The package's Gluon kernel run as plain Python on NumPy: layouts fall away, ``mma.sp`` is emulated, copies take time.

A copy to shared memory first spoils its destination and arrives when its group is waited for, so that a pipeline that
reads too early or overwrites too soon computes nonsense. What stands outside a buffer raises ``IndexError``.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from mma_sp import mma_sp
from torch import Tensor

from fpe.kernels.semi_structured import gluon

SPOILT = -0x01010102  # as metadata: indices out of order; as a float: huge


class Tile(np.ndarray):
    """An array with the few methods of a Gluon tensor that the kernel uses."""

    def to(self, dtype: Any) -> "Tile":
        return self.astype(dtype)

    def permute(self, order: list[int]) -> "Tile":
        return self.transpose(order)

    def expand_dims(self, axis: int) -> "Tile":
        return np.expand_dims(self, axis)


def tile(array: np.ndarray) -> Tile:
    return np.asarray(array).view(Tile)


@dataclass
class Pointer:
    """Addresses inside a tensor's memory, counted in elements."""

    tensor: Tensor
    offsets: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=np.float32)  # rounded to the tensor's own type when stored

    def __add__(self, offsets: Any) -> "Pointer":
        return Pointer(self.tensor, self.offsets + offsets)

    def memory(self) -> Tensor:
        reach = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        return self.tensor.as_strided((reach + 1,), (1,))


@dataclass
class Shared:
    """Shared memory."""

    data: np.ndarray

    def index(self, i: int) -> "Shared":
        assert 0 <= i < len(self.data)
        return Shared(self.data[int(i)])  # a view, also for an index that is an array

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        assert start >= 0 and start + length <= self.data.shape[dim]
        return Shared(self.data.take(range(start, start + length), dim))

    def load(self, layout: Any) -> Tile:
        return tile(self.data.copy())


@dataclass
class Machine:
    """What a program talks to: its place in the grid and the copies under way."""

    place: tuple[int, int] = (0, 0)
    started: list[Callable[[], None]] = field(default_factory=list)
    groups: list[list[Callable[[], None]]] = field(default_factory=list)

    def copy(self, shared: Shared, source: Pointer, mask: Any = True) -> None:
        offsets, mask = np.broadcast_arrays(source.offsets, mask)
        value = np.zeros(offsets.shape, np.int32)
        value[mask] = source.memory().numpy()[offsets[mask]]
        assert (offsets[mask] >= 0).all() and shared.data.shape == value.shape
        shared.data[...] = SPOILT
        self.started.append(lambda: np.copyto(shared.data, value))

    def commit(self) -> None:
        self.groups.append(self.started)
        self.started = []

    def wait(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            for arrive in self.groups.pop(0):
                arrive()

    def store(self, target: Pointer, value: np.ndarray, mask: np.ndarray) -> None:
        offsets, value, mask = np.broadcast_arrays(target.offsets, value, mask)
        assert (offsets[mask] >= 0).all()
        memory = target.memory()
        assert int(offsets[mask].max(initial=0)) < len(memory)
        memory[torch.from_numpy(offsets[mask])] = torch.from_numpy(value[mask].astype(np.float32)).to(memory.dtype)


INSTRUCTION = re.compile(
    r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(bf16|f16)\.\1\.f32 "
    r"\{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \$(\d+), (\d);$"
)


def inline_assembly(text: str, constraints: str, args: list[Tile], dtype: Any, is_pure: bool, pack: int) -> Tile:
    """One instruction a warp: reads which operand is what from the text, and emulates it."""
    found = INSTRUCTION.match(text)
    assert found and is_pure and dtype is np.float32
    assert constraints.split(",") == ["=f"] * pack + ["f"] * pack + ["r"] * (3 * pack)
    assert found[2] == "$0, $1, $2, $3"

    def argument(names: str) -> Tile:
        """The argument whose registers, in their order, these operands are."""
        numbers = [int(name.strip(" $")) - pack for name in names.split(",")]
        assert numbers == list(range(numbers[0], numbers[0] + pack)) and numbers[0] % pack == 0
        return args[numbers[0] // pack]

    metadata = int(found[6]) - pack
    e = args[metadata // pack]
    e = np.broadcast_to(e, (*e.shape[:-1], pack))[..., metadata % pack]
    return tile(mma_sp(argument(found[5]), argument(found[3]), argument(found[4]), e, int(found[7]), found[1]))


class Launcher:
    """Stands for the kernel: ``launcher[grid](*args, **meta)``."""

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int, **meta: Any) -> None:
            assert num_warps == 4
            for place in product(*map(range, grid)):
                with _instead(Machine(place)):
                    gluon.multiply.fn(*(Pointer(t) for t in args), **meta)

        return launch


@contextmanager
def _instead(machine: Machine) -> Iterator[None]:
    """Within it the kernel's module holds NumPy in place of Gluon."""
    language = SimpleNamespace(
        int32=np.int32,
        int64=np.int64,
        float32=np.float32,
        constexpr=None,
        program_id=lambda axis: tile(np.array(machine.place[axis])),
        arange=lambda start, end, layout: tile(np.arange(start, end, dtype=np.int64)),
        static_range=range,
        minimum=np.minimum,
        full=lambda shape, value, dtype, layout: tile(np.full(shape, value, dtype)),
        join=lambda a, b: tile(np.stack((a, b), -1)),
        split=lambda a: (a[..., 0], a[..., 1]),
        convert_layout=lambda value, layout, assert_trivial=False: value,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(np.full(shape, SPOILT, dtype)),
        store=machine.store,
        inline_asm_elementwise=inline_assembly,
        **{name: lambda *args: None for name in ("SliceLayout", "BlockedLayout", "SwizzledSharedLayout")},
    )
    copies = SimpleNamespace(commit_group=machine.commit, wait_group=machine.wait)

    names = {"gl": language, "async_copy": copies, "_copy": machine.copy, "_barrier": lambda: None, "WARPS": 4}
    names |= {name: getattr(gluon, name).value for name in ("_ROW", "_COLUMN")}
    names |= {name: lambda *args: None for name in ("_rows_layout", "_stage_layout", "_only")}
    functions = ("_instruction", "_mma", "_part", "_complement", "_metadata", "hash_of", "_epilogue")
    names |= {name: getattr(gluon, name).fn for name in functions}
    with ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(patch.object(gluon, name, value))
        yield


@contextmanager
def on_numpy() -> Iterator[None]:
    """Within it the launcher of the sparse tensor core kernel runs it on NumPy."""
    real = gluon.multiply
    launcher = Launcher()
    launcher.fn = real.fn  # type: ignore[attr-defined]
    with patch.object(gluon, "multiply", launcher):
        yield
