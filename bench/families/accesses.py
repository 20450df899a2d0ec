"""The kernels' accesses without running them: a program's addresses follow from its position and the layout.

``tests/test_lab_traffic.py`` holds what the families say of theirs equal to the real kernels' traces, access by access,
so that shapes too large for the interpreter can be counted. Biases are left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ...kernels.device import Device
from ...kernels.model import Sizes
from ...kernels.structures import BLOCK, RANDOM, TWO_FOUR
from ...kernels.tables import Problem

INDEX = 4
"""Bytes of an index."""


class Access(NamedTuple):
    """A rectangle of one tensor, all of it read or all of it written.

    Attributes:
        tensor: The kernel's argument; ``"partial"`` is the scratch between a split kernel and its reduction.
        store: Whether it is written.
        row: First row.
        rows: Number of rows.
        column: First byte within the rows.
        width: Bytes of a row.
        pitch: Bytes from a row to the next.
    """

    tensor: str
    store: bool
    row: int
    rows: int
    column: int
    width: int
    pitch: int


Program = Iterator[tuple[Access, ...]]
"""What a program touches: one tuple an iteration, the prologue first and the epilogue last."""


@dataclass(frozen=True)
class Launch:
    """A kernel's launch.

    Attributes:
        kernel: Its name.
        grid: Programs along both axes.
        program: What the program at a position touches.
    """

    kernel: str
    grid: tuple[int, int]
    program: Callable[[int, int], Program]


def span(tile: int, block: int, size: int) -> tuple[int, int]:
    """Where a tile begins, and how much of it lies inside."""
    return tile * block, min(block, size - tile * block)


def in_groups(pid: int, first: int, second: int, group: int) -> tuple[int, int]:
    """As ``fpe.kernels.epilogue.in_groups``."""
    band, inside = divmod(pid, group * second)
    width = min(first - band * group, group)
    return band * group + inside % width, inside // width


def flat(tensor: str, start: int, size: int, store: bool = False) -> Access:
    """Consecutive bytes."""
    return Access(tensor, store, 0, 1, start, size, start + size)


def reduce(size: int, split: int, itemsize: int, block: int = 1024) -> Launch:
    """The sum of a split reduction's parts."""

    def program(pid: int, _: int) -> Program:
        start, count = pid * block, min(block, size - pid * block)
        for part in range(split):
            yield (flat("partial", 4 * (part * size + start), 4 * count),)
        yield (flat("out", itemsize * start, itemsize * count, store=True),)

    return Launch("_reduce", (-(-size // block), 1), program)


OPS = ("forward", "dX", "dW")
"""Of an expanded layer."""
MERGED_OPS = ("merged forward", "merged dX", "merged dW")
"""Of the layer that reads one child an edge; ``"random"`` and ``"seeded"`` labels only."""


SPARSE = "forward, mma.sp"
"""The forward on sparse tensor cores, of 2:4 layers only; the other operations are those on dense ones."""


@dataclass(frozen=True)
class Case(Sizes):
    """A layer and a batch.

    Attributes:
        dropped: Share of the blocks that are dropped.
    """

    dropped: float = 0.0

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations that its kernels have."""
        if self.structure == TWO_FOUR:
            return OPS if self.dtype == "fp32" else (*OPS, SPARSE)
        return OPS if self.structure == BLOCK or self.alpha == 1 else OPS + MERGED_OPS

    @property
    def kind(self) -> str:
        """A block's sides, or its structure's name: ``"none"`` for plain labels, ``"kept"`` for kept values alone."""
        if self.kept is not None:
            return "kept"
        if self.structure == BLOCK:
            return f"{self.block[0]}x{self.block[1]}"
        return "none" if self.structure == RANDOM else self.structure


class Layer(Protocol):
    """A layer as its kernels see it: what :func:`measure` asks of a family."""

    def problem(self, op: str) -> Problem[Any]:
        """What the launcher chooses a configuration for."""

    def launches(self, op: str, config: Any) -> list[Launch]:
        """What the launcher launches."""

    def on_chip(self, op: str, config: Any, device: Device) -> tuple[int, int]:
        """Of a program: bytes of shared memory, and float32 accumulators."""

    def compulsory(self, op: str) -> int:
        """Bytes that any kernel must move: each operand and each result once."""

    def results(self, op: str) -> int:
        """Numbers that the operation returns."""
