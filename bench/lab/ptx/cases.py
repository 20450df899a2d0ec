"""What is executed: small launches of every family, each a launcher, its eager twin and operands for both."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ....kernels.gpus import reads_kept_values, runs_mma_sp
from ....kernels.partition.labels import PackedLabels
from ....kernels.structures import TWO_FOUR
from ...families import FAMILIES, TYPES
from ...families.contract import Draw, Problem, laid
from ...families.semi_structured import FORMS

PARTITION = ("split", "merge", "grad", "split_t", "merge_t", "grad_t")
MULTIPLIES = ("split", "merge", "split_t", "merge_t")
BLOCK = ("forward", "dx", "dw")
SEMI_STRUCTURED = ("forward", "dx", "dw", "compress", "expand")
SPARSE = ("forward", "dx")
KEPT = tuple(f"kept_{op}" for op in PARTITION)
BITMAP = ("unpack", "pack", *KEPT)
"""Moves of packed values, and the partition operations on them."""
PACKED = ("values", "transposed", "parent", "parent_t")
"""What is packed for sparse tensor cores (stored values, the same seen from their outputs, a parent's weight that lies
along its rows or across them), and into which forms: an operation is ``"values-rows"``, and so on."""


@dataclass(frozen=True)
class Case:
    """One operation on small operands.

    Attributes:
        family: ``"partition"``, ``"block"``, ``"mlp"``, ``"semi_structured"``, ``"sparse"``, ``"pack"`` or
            ``"bitmap"``.
        op: One of the family's.
        dtype: A name in ``TYPES``; ``"fp32"`` multiplies in full precision.
        m: Rows of activations.
        shape: ``(N, K)`` of the parent; of the fused MLP ``(hidden, inputs)``.
        alpha: Children.
        block: Of the block family.
        bias: Whether one is added.
        activation: Fused into a forward.
        holes: Whether some edges belong to nobody; beside labels of a seed, whether a bitmap says which, and no seed.
        packed: Whether labels are packed, or a plain table.
        lying: How the activations, and the weight of a partition, lie: ``"plain"``, ``"strided"`` (rows apart),
            ``"padded"`` (rows apart and aligned, further than a pipeline loads ahead, and planes of them; labels of
            a partition too),
            ``"broadcast"`` (one row for all), ``"columns"`` (transposed) or ``"offset"`` (from an odd element on).
            Nobody may touch what lies between the rows.
        integers: Whether operands are integers, of which sums are exact, or normally distributed.
        density: Chance that a block is kept, or an entry of a bitmap.
        merged: Whether the second layer of the MLP has labels.
        outputs: Of the fused MLP.
        seeded: Whether labels are of a seed.
    """

    family: str
    op: str
    dtype: str = "bf16"
    m: int = 19
    shape: tuple[int, int] = (70, 90)
    alpha: int = 2
    block: tuple[int, int] = (0, 0)
    bias: bool = False
    activation: str | None = None
    holes: bool = False
    packed: bool = True
    lying: str = "plain"
    integers: bool = True
    density: float = 0.5
    merged: bool = False
    outputs: int = 33
    seeded: bool = False

    @property
    def id(self) -> str:
        """As ``partition-split-bf16-19x70x90-alpha2``; the rest only where it is not the default."""
        names = (self.family, self.op, self.dtype, f"{self.m}x{self.shape[0]}x{self.shape[1]}")
        more = (
            f"alpha{self.alpha}" if self.family != "block" else f"blocks{self.block[0]}x{self.block[1]}",
            "bias" if self.bias else "",
            self.activation or "",
            "holes" if self.holes else "",
            "" if self.packed else "table",
            "" if self.lying == "plain" else self.lying,
            "" if self.integers else "normal",
            "merged" if self.merged else "",
            "seeded" if self.seeded else "",
            "" if self.density == 0.5 else f"density{self.density:g}",
        )
        return "-".join((*names, *filter(None, more)))

    @property
    def option(self) -> str:
        """By which name the command line chooses it."""
        if self.family in ("semi_structured", "sparse", "pack"):
            return TWO_FOUR
        return self.family if self.family == "mlp" else self.op


class _Draw(Draw):
    """Operands of a case, the same in every run.

    Integers are drawn so wide that their last bits count, and so small that float32 holds every sum of their products:
    one operand fills the significand of its type, the other takes what is left of 24 bits. They are scaled by a power
    of two in float16, so that sums stay finite, and before GELU and SiLU, so that these are not flat.
    """

    device = "cpu"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.full, self.unit = (255 if case.dtype == "bf16" else 2047), (2.0**-11 if case.dtype == "fp16" else 1.0)
        if case.activation in ("gelu", "silu"):
            self.full, self.unit = 7, 2.0**-4
        self.rest = min(self.full, 2**24 // (self.full * 2 * max(case.m, *case.shape)))

    def __call__(self, *shape: int, lying: str = "plain", most: int | None = None) -> Tensor:
        """A floating operand that fills its type, or with integers between ``-most`` and ``most``."""
        held = (1, *shape[1:]) if lying == "broadcast" else shape
        if self.case.integers:
            limit, unit = (self.full, self.unit) if most is None else (most, 1.0)
            drawn = torch.randint(-limit, limit + 1, held, generator=self.generator).float() * unit
        else:
            drawn = torch.randn(held, generator=self.generator)
        return laid(drawn.to(TYPES[self.case.dtype]), shape, lying)

    def labels(self, *shape: int) -> Tensor:
        """Labels of a weight, as a plain table."""
        return torch.randint(self.case.alpha + self.case.holes, shape, generator=self.generator).byte()

    def packed(self, labels: Tensor) -> PackedLabels:
        """Labels, packed; they lie as the operands of the case do, where those are padded."""
        packed = PackedLabels.pack(labels, self.case.alpha)
        lying = "padded" if self.case.lying == "padded" else "plain"
        return packed._replace(planes=laid(packed.planes, tuple(packed.planes.shape), lying))

    def mask(self, *shape: int) -> Tensor:
        """Which blocks are kept."""
        return torch.rand(shape, generator=self.generator) < self.case.density

    def stored(self, layout: Any, w: Tensor) -> Tensor:
        """A dense weight's values, as a layout stores them."""
        return layout.from_dense(w)


def problem(case: Case) -> Problem:
    """The operands of a case, and what runs on them."""
    return FAMILIES[{"sparse": "semi_structured", "pack": "semi_structured"}.get(case.family, case.family)].operands(
        case, _Draw(case)
    )


def _partition_cases() -> tuple[Case, ...]:
    def each(operations: tuple[str, ...] = PARTITION, **fields: object) -> tuple[Case, ...]:
        return tuple(Case("partition", op, **fields) for op in operations)  # type: ignore[arg-type]

    multiplies = ("split", "merge")
    return (
        *(c for dtype in TYPES for c in each(dtype=dtype)),
        *(c for alpha, m in product((3, 4, 8), (16, 33)) for c in each(alpha=alpha, m=m)),
        *(c for alpha in (5, 6, 7) for c in each(MULTIPLIES, alpha=alpha)),
        *(c for alpha in (2, 3, 4, 8) for c in each(MULTIPLIES, alpha=alpha, m=70)),  # more rows than go directly
        *each(MULTIPLIES, dtype="fp16", m=70, lying="strided", integers=False),
        *each(("split", "merge"), m=70, bias=True, activation="relu"),
        *each(MULTIPLIES, dtype="fp16", shape=(96, 512), m=12, alpha=4),  # whole tiles, directly
        *each(MULTIPLIES, shape=(34, 66), m=9, lying="padded"),  # rows of weights that begin at 4 bytes
        *each(shape=(65, 91)),  # rows of an odd number of 16-bit weights: one to a word
        *each(shape=(128, 256), m=32),
        *each(shape=(64, 640), m=130),
        *each(shape=(1, 1), m=1),
        *each(m=1, dtype="fp16", alpha=4),
        *each(("split", "merge"), shape=(40, 1100), m=3, bias=True),  # warps that share a reduction
        *each(("split_t", "merge_t"), shape=(1100, 40), m=3, bias=True, activation="gelu"),
        *each(("split", "merge"), shape=(20, 4400), m=3, bias=True),  # programs that share it, too
        *each(("split_t", "merge_t"), shape=(4400, 20), m=3, bias=True, activation="gelu"),
        *each(("split_t",), shape=(96, 512), m=16, alpha=8),  # four columns a lane, in whole tiles and not
        *each(("split_t",), shape=(1100, 44), m=12, alpha=8, bias=True),
        *each(("split_t",), dtype="fp16", shape=(34, 66), m=20, alpha=6, lying="padded"),
        *each(("grad", "grad_t"), shape=(20, 40), m=530),
        *each(("grad", "grad_t"), shape=(66, 70), alpha=3, holes=True),
        *each(holes=True, packed=False, alpha=3),
        *(c for lying in ("strided", "broadcast", "columns", "offset") for c in each(lying=lying)),
        *(c for name in ("relu", "gelu", "silu") for c in each(multiplies, bias=True, activation=name)),
        *(c for name in ("gelu", "silu") for c in each(multiplies, dtype="fp32", bias=True, activation=name)),
        *(c for dtype in ("bf16", "fp16", "fp32", "tf32") for c in each(dtype=dtype, integers=False)),
        *(c for alpha in (2, 4, 8) for c in each(alpha=alpha, m=16, seeded=True)),
        *each(MULTIPLIES, dtype="fp16", shape=(96, 512), m=12, alpha=4, seeded=True),  # whole tiles, directly
        *each(("split", "merge_t"), m=70, alpha=4, seeded=True),  # more rows than go directly
    )


def _other_cases() -> tuple[Case, ...]:
    block_sizes = ((16, 16), (32, 64), (64, 64), (128, 128), (16, 64))
    return (
        *(Case("block", op, block=b, shape=(130, 150)) for op, b in product(BLOCK, block_sizes)),
        *(Case("block", op, t, block=(32, 32)) for op, t in product(BLOCK, ("fp16", "fp32", "tf32"))),
        *(Case("block", op, block=(16, 32), lying="strided", m=1) for op in BLOCK),
        *(Case("block", op, block=(32, 32), density=0.1) for op in BLOCK),
        *(Case("block", op, block=(32, 32), integers=False) for op in BLOCK),
        *(Case("block", "forward", block=(32, 32), bias=True, activation=a) for a in ("relu", "gelu", "silu")),
        Case("block", "forward", block=(16, 16), shape=(20, 300), m=3, density=2.0, bias=True),
        Case("block", "dw", block=(16, 16), shape=(17, 33), m=530),
        Case("block", "forward", block=(64, 64), shape=(128, 128), m=140, density=2.0),
        *(
            Case("mlp", "mlp", t, shape=(13, 70), alpha=a, merged=merged, bias=True, activation="relu")
            for t, a, merged in product(("bf16", "fp16"), (2, 4), (False, True))
        ),
        Case("mlp", "mlp", shape=(17, 71), alpha=3, merged=True, outputs=70, activation="relu"),
        Case("mlp", "mlp", shape=(1, 8), alpha=8, m=1, outputs=1, bias=True, activation="relu"),
        Case("mlp", "mlp", shape=(64, 128), m=64, outputs=64, bias=True, activation="relu"),
        Case("mlp", "mlp", shape=(20, 40), lying="strided", activation="relu", integers=False),
        *(  # directly
            Case("mlp", "mlp", t, shape=(14, 70), alpha=a, merged=merged, bias=True, activation="relu")
            for t, a, merged in product(("bf16", "fp16"), (2, 3, 4, 8), (False, True))
        ),
        *(
            Case("mlp", "mlp", m=m, shape=(128, 136), alpha=8, outputs=130, merged=merged, bias=True, activation="relu")
            for m, merged in product((1, 64), (False, True))
        ),
        *(
            Case("mlp", "mlp", m=40, shape=(34, 1100), alpha=4, merged=merged, seeded=True, activation="relu")
            for merged in (False, True)
        ),
        Case("mlp", "mlp", m=5, shape=(64, 512), merged=True, seeded=True, activation="relu"),
        Case("mlp", "mlp", m=70, shape=(64, 128), merged=True, bias=True, activation="relu"),  # more rows
        *(
            Case("semi_structured", op, t, alpha=a)
            for op, t, a in product(("forward", "dx", "dw"), ("bf16", "fp16", "fp32"), (1, 2))
        ),
        *(Case("semi_structured", op, t, alpha=2) for op, t in product(("compress", "expand"), ("bf16", "fp32"))),
        *(Case("semi_structured", op, m=33, shape=(64, 256), alpha=2) for op in ("forward", "dx", "dw")),
        *(Case("semi_structured", op, alpha=2, integers=False, lying="strided") for op in ("forward", "dx", "dw")),
        *(Case("semi_structured", "forward", t, alpha=a, bias=True) for t, a in product(("bf16", "fp32"), (1, 2))),
        *(Case("sparse", "forward", t, alpha=a, bias=True) for t, a in product(("bf16", "fp16"), (1, 2))),
        *(Case("pack", f"{source}-{form}") for source, form in product(PACKED, FORMS)),
        *(Case("pack", f"values-{form}", alpha=1, shape=(33, 203)) for form in FORMS),
        *(Case("pack", f"{source}-{form}", "fp16", alpha=4) for source, form in product(PACKED[2:], FORMS)),
        *(Case("pack", f"{source}-{form}", holes=True, shape=(130, 67)) for source, form in product(PACKED[2:], FORMS)),
        *(Case("pack", f"transposed-{form}", "fp16", shape=(67, 130)) for form in FORMS),
        *(Case("pack", f"parent-{form}", lying="padded", shape=(64, 256)) for form in FORMS),
        *(Case("sparse", op, t, alpha=a) for op, t, a in product(SPARSE, ("bf16", "fp16"), (1, 2))),
        Case("sparse", "forward", m=5, shape=(136, 200), alpha=2),
        Case("sparse", "forward", m=70, shape=(128, 1100), alpha=1),
        Case("sparse", "forward", alpha=2, integers=False),
        *(Case("sparse", "forward", t, seeded=True) for t in ("bf16", "fp16")),
        Case("sparse", "forward", m=5, shape=(136, 200), bias=True, seeded=True),
        Case("sparse", "forward", m=70, shape=(128, 1100), seeded=True),
    )


def _bitmap_cases() -> tuple[Case, ...]:
    def each(operations: tuple[str, ...] = KEPT, **fields: object) -> tuple[Case, ...]:
        return tuple(Case("bitmap", op, **fields) for op in operations)  # type: ignore[arg-type]

    return (
        *(
            c
            for t, density in product(("bf16", "fp32"), (0.25, 1.0))
            for c in each(BITMAP[:2], dtype=t, density=density)
        ),
        *(c for dtype in ("bf16", "fp16", "fp32") for c in each(dtype=dtype)),
        *(c for alpha, m in ((1, 16), (4, 16), (8, 33)) for c in each(alpha=alpha, m=m)),
        *each(alpha=1, m=3, shape=(20, 1100), density=0.25),  # runs that begin inside of rows; programs share the sums
        *each(alpha=1, m=3, shape=(1100, 20), density=0.75),
        *each(alpha=3, m=64, shape=(64, 128), density=1.0),
        *(c for alpha in (1, 2) for c in each(KEPT[:2], alpha=alpha, m=16, shape=(134, 2176))),  # values follow
        *each(KEPT[:2], dtype="fp16", alpha=4, m=40, shape=(96, 1500), density=0.75),
        Case("bitmap", "kept_split", alpha=1, m=5, shape=(40, 1027), bias=True, density=0.25),
        *each(KEPT[:2], bias=True, activation="relu"),
        *each(seeded=True),
        *each(KEPT[:2], alpha=8, m=33, shape=(20, 1100), seeded=True),
        *(c for alpha in (2, 4) for c in each(KEPT[:2], alpha=alpha, shape=(34, 1100), seeded=True, holes=True)),
    )


CASES = tuple(dict.fromkeys((*_partition_cases(), *_other_cases(), *_bitmap_cases())))

QUICK = (
    Case("partition", "split", shape=(64, 640), m=16),
    Case("partition", "split", shape=(64, 128), m=70),
    Case("partition", "merge_t", "fp16", alpha=4, m=16),
    Case("partition", "grad", shape=(66, 70), alpha=3, holes=True),
    Case("block", "forward", block=(32, 32), bias=True, activation="gelu"),
    Case("mlp", "mlp", shape=(13, 70), bias=True, activation="relu"),
    Case("mlp", "mlp", shape=(14, 70), alpha=4, merged=True, bias=True, activation="relu"),
    Case("sparse", "forward", alpha=2, bias=True),
    Case("pack", "parent_t-dense", alpha=4),
    Case("bitmap", "kept_split", alpha=1, m=16, shape=(134, 640)),
)
"""A few of each kind, for CI."""


def runs_on(case: Case, arch: int) -> bool:
    """Whether an architecture runs a case."""
    if case.op in KEPT:
        return reads_kept_values(arch)
    return case.family != "sparse" or runs_mma_sp(arch)
