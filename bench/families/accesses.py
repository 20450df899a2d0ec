"""The kernels' accesses without running them: a program's addresses follow from its position and the layout.

``tests/test_lab_traffic.py`` holds what the families say of theirs equal to the real kernels' traces, access by access,
so that shapes too large for the interpreter can be counted. Biases are left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ...kernels.device import Device
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


ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
SPARSE = "forward, mma.sp"
"""The forward on sparse tensor cores, of ``"2:4"`` layers only; the other operations are those on dense ones."""


@dataclass(frozen=True)
class Case:
    """A layer and a batch.

    Attributes:
        m: Rows of activations.
        n: Output features of the parent.
        k: Input features.
        alpha: Children per parent.
        block: ``(bn, bk)``; none for labels that follow no blocks.
        quads: Whether the labels are 2:4 and the layer runs on the semi-structured kernels.
        dropped: Share of the blocks that are dropped.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        seeded: Whether the labels are a function of a seed.
    """

    m: int
    n: int
    k: int
    alpha: int = 2
    block: tuple[int, int] | None = (64, 64)
    dropped: float = 0.0
    dtype: str = "bf16"
    quads: bool = False
    seeded: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations that its kernels have."""
        if self.quads:
            return OPS if self.dtype == "fp32" else (*OPS, SPARSE)
        return OPS if self.block else OPS + MERGED_OPS

    @property
    def kind(self) -> str:
        """``"2:4"``, ``"seeded"``, a block's sides, or ``"none"``."""
        if self.seeded:
            return "seeded"
        return "2:4" if self.quads else f"{self.block[0]}x{self.block[1]}" if self.block else "none"


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
