"""What every walker of the kernels asks of a family: its kernels, its launches, and what a launch is meant to be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ...kernels import epilogue
from ...kernels.activations import finish
from ...kernels.dispatch import Backend
from ...kernels.gpus import architecture
from ...kernels.partition.labels import PackedLabels, digits, row_bytes
from ...kernels.partition.seeded import SeededLabels
from .check import Check

Row = dict[str, Any]
"""What is known of a binary."""

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
SHAPE = (14336, 4096)
"""``(N, K)`` of the layer: an LLM's."""


@dataclass(frozen=True)
class Problem:
    """Operands of a launch, and what runs on them.

    Attributes:
        operands: The floating ones, in the case's dtype.
        kernel: Of the operands: launches.
        twin: Of the operands: the same in plain PyTorch, without bias and activation.
        length: Longest sum.
        finish: Bias and activation, where they come last, of the twin's result.
    """

    operands: tuple[Tensor, ...]
    kernel: Callable[..., Tensor]
    twin: Callable[..., Tensor]
    length: int
    finish: Callable[[Tensor], Tensor] = lambda y: y


@dataclass(frozen=True)
class Case:
    """One launch of an operation on meta tensors; each family adds what is its own.

    Attributes:
        op: One of the family's.
        dtype: A name in ``TYPES``; ``"fp32"`` multiplies in full precision.
        m: Rows of activations.
        alpha: Children.
        activation: Fused into a forward together with a bias, or none of both.
        shape: ``(N, K)`` of the stored weight; of a block operation that of the wide one.
        block: ``(bn, bk)`` of a block operation.
        operands: What the family says of a case and :class:`Draw`: see :class:`Family`.
        file: Results that its rows go to.
    """

    op: str
    dtype: str
    m: int
    alpha: int | None = None
    activation: str | None = None
    shape: tuple[int, int] = SHAPE
    block: tuple[int, int] | None = None
    operands: ClassVar[Callable[[Any, "Draw"], Problem]]
    file: ClassVar[str] = "compile"
    each: ClassVar[bool] = False
    """Whether each case has a row of its own, though another may launch the same binary."""
    usual: ClassVar[tuple[int, int]] = SHAPE
    """The shape that its id leaves out."""
    holes, packed, merged, lying, seeded = False, True, False, "plain", False
    """Nothing odd, as ``fpe lab execute`` has it."""

    @property
    def id(self) -> str:
        """As ``forward-64x128-bf16-m16`` or ``split-alpha2-bf16-m16``."""
        structure = f"{self.block[0]}x{self.block[1]}" if self.block else f"alpha{self.alpha}"
        structure += "-seeded" * self.seeded + "-holes" * self.holes
        end = f"-{self.activation}" if self.activation else ""
        size = "" if self.shape == self.usual else f"-{self.shape[0]}x{self.shape[1]}"
        return f"{self.op}-{structure}-{self.dtype}-m{self.m}{end}{size}"

    @property
    def name(self) -> str:
        """All of it, as ``compile-split-bf16-16-2-(14336, 4096)``: rows of what compiling took are found by it."""
        parts = [getattr(self, part.name) for part in fields(self) if part.name not in ("seeded", "holes")]
        named = [str(part) for part in parts if part is not None]
        return "-".join([self.file.replace("-", "_"), *named, *["seeded"] * self.seeded, *["holes"] * self.holes])

    @property
    def option(self) -> str:
        """By which name the command line chooses it."""
        return self.op

    @property
    def columns(self) -> Row:
        """Its own columns of a row."""
        return {"block": list(self.block) if self.block else None, "alpha": self.alpha, "dtype": self.dtype}

    @property
    def bias(self) -> bool:
        """Whether one is added: with an activation."""
        return self.activation is not None

    def owns(self, kernel: str) -> bool:
        """Whether a kernel that it launches is its own, and no other case's."""
        return True

    def runs_on(self, arch: int) -> bool:
        """Whether an architecture runs it."""
        return True

    def posed(self) -> Problem:
        """Its launcher with operands without numbers."""
        return self.operands(Draw(self))

    def call(self) -> None:
        """Calls the launcher, float32 as the case wants it."""
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.dtype == "tf32"
        try:
            problem = self.posed()
            problem.kernel(*problem.operands)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


NARROW = dict.fromkeys(
    [("dx", "tf32"), ("dw", "tf32"), ("grad", "tf32"), ("grad_t", "tf32")],
    "tensor cores read TF32 along the reduction only, the operands lie across it: copied 4 bytes at a time",
)
NARROW |= dict.fromkeys(
    product([f"kept_{op}" for op in ("split", "merge", "split_t", "merge_t")], TYPES),
    "kept values lie one after the other, whatever holes are between their places: read one by one",
)
"""Operations and types whose streamed loads cannot be 128 bits wide everywhere, and why."""


def expected_matrix(row: Row) -> str:
    """The instruction that a configuration is meant to multiply with."""
    if row["dtype"] == "fp32":
        return "FFMA"
    if row["rows"] >= 64 and row["num_warps"] % 4 == 0:
        return {"mma": "HMMA", "wgmma": "HGMMA", "tcgen05.mma": "UTCHMMA"}[architecture(row["arch"]).matrix]
    return "HMMA"


def as_meant(row: Row, load_bits: int = 128) -> list[str]:
    """Complaints of a row with another matrix instruction than the one meant, or with loads below ``load_bits``."""
    complaints, meant = [], expected_matrix(row)
    found = {name.split(".")[0] for name in row["matrix"]} or ({"FFMA"} if row["multiply_adds"] else set())
    if found != {meant}:
        complaints.append(f"matrix instruction: meant {meant}, got {', '.join(sorted(found)) or 'none'}")
    if row["load_bits"] < (8 * TYPES[row["dtype"]].itemsize if (row["op"], row["dtype"]) in NARROW else load_bits):
        threads = 32 * row["num_warps"]
        complaints.append(f"loads of {row['load_bits']} bits: {row['tile_bytes']} bytes a step for {threads} threads")
    return complaints


@dataclass(frozen=True)
class Kernel:
    """What the lab knows of a kernel.

    Attributes:
        function: The kernel.
        streams: Source of the loads of its streamed operands: the weights, for dW both operands.
        step: Of a launch's keyword arguments and an element's bytes: the bytes of the streamed operands that one step
            of a program takes, and the rows of the tile that multiplies first. Without it costs are not counted.
        multiplies: Whether it has matrix instructions.
        check: Complaints of a row of its own.
        loads: The parts of the kernel that have the loads, if not the kernel itself.
        alias: Its name in rows, where the function's says too little.
    """

    function: JITFunction
    streams: tuple[str, ...]
    step: Callable[[Mapping[str, Any], int], tuple[int, int]] | None = None
    multiplies: bool = True
    check: Callable[[Row], list[str]] = as_meant
    loads: tuple[JITFunction, ...] = ()
    alias: str = ""

    @property
    def name(self) -> str:
        """The function's name, as Triton gives it."""
        return self.function.fn.__name__

    @property
    def shown(self) -> str:
        """Its name in rows."""
        return self.alias or self.name


REDUCE = Kernel(
    epilogue._reduce, ("tl.load(partial_ptr",), lambda given, size: (given["BLOCK"] * 4, 0), False, lambda row: []
)
"""The sum of a split reduction: every family's."""


class Draw:
    """Who makes the operands of a case: without numbers, for launches that are only compiled.

    Attributes:
        case: Whose they are.
        device: Where they lie.
        rest: What integers may be at most beside others that fill their type, for exact sums.
        generator: Of what is random.
    """

    device: ClassVar[str] = "meta"

    def __init__(self, case: Any) -> None:
        self.case, self.rest, self.generator = case, 0, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, lying: str = "plain", most: int | None = None) -> Tensor:
        """A floating operand; integers between ``-most`` and ``most``."""
        return torch.empty(shape, dtype=TYPES[self.case.dtype], device="meta")

    def labels(self, *shape: int) -> Tensor:
        """Labels of a weight, as a plain table."""
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def packed(self, labels: Tensor) -> PackedLabels:
        """Labels, packed."""
        (n, k), alpha = labels.shape, self.case.alpha or 2
        return PackedLabels(self.labels(digits(alpha), n, row_bytes(k)), (n, k), alpha)

    def seeded(self, n: int, k: int) -> SeededLabels:
        """Labels of a seed, of a part of a larger weight."""
        return SeededLabels.of(5, (n, k), self.case.alpha, (6, 256))

    def mask(self, *shape: int) -> Tensor:
        """Which blocks are kept, in numbers, since the launch depends on them: of as many as there are children one."""
        rows, columns = (torch.arange(size) for size in shape)
        return (rows[:, None] + columns) % (self.case.alpha or 2) == 0

    def stored(self, layout: Any, w: Tensor) -> Tensor:
        """A dense weight's values, as a layout stores them."""
        return self(*layout.values_shape)


def pair(name: str, kernels: ModuleType, twins: ModuleType) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """An operation's launcher and its eager twin, by the name that the package has for it."""
    return kernels.OPERATIONS[name], twins.OPERATIONS[name]


def laid(values: Tensor, shape: tuple[int, ...], lying: str) -> Tensor:
    """The values as a tensor that lies otherwise in memory."""
    if lying == "broadcast":
        return values.expand(shape)
    if lying == "columns":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if lying in ("strided", "padded", "offset"):
        apart = {"strided": 6, "padded": 528 - shape[-1] % 16, "offset": 7}[lying]
        below = ROWS_BELOW if lying == "padded" else 0
        room = torch.zeros(*shape[:-2], shape[-2] + below, shape[-1] + apart, dtype=values.dtype)
        view = room[..., : shape[-2], (1 if lying == "offset" else 0) :][..., : shape[-1]]
        return view.copy_(values)
    return values


ROWS_BELOW = 128
"""Rows between two planes that lie apart: as many as a tile has."""


def ending(case: Any, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Bias and activation of a case, in plain PyTorch."""
    return lambda y: finish(y if bias is None else y + bias.double(), case.activation)


class Family(Protocol):
    """A family of kernels: a module of this package."""

    @property
    def KERNELS(self) -> Sequence[Kernel]:  # noqa: N802
        """Its kernels."""

    @property
    def LAUNCHERS(self) -> Sequence[ModuleType]:  # noqa: N802
        """Modules whose launchers ask for the device."""

    @property
    def BACKENDS(self) -> Sequence[dict[str, Backend]]:  # noqa: N802
        """Its tables of backends."""

    @property
    def CASES(self) -> Sequence[Case]:  # noqa: N802
        """Launches that ``fpe lab compile`` compiles."""

    @property
    def QUICK(self) -> Sequence[Case]:  # noqa: N802
        """A few of each kind, for CI."""

    def operands(self, case: Any, draw: Draw) -> Problem:
        """The operands of a case, and what runs on them: a :class:`Case`, or another with such fields."""

    def checks(self) -> Iterator[Check]:
        """What the correctness gate compares on a device; nothing here touches one."""
