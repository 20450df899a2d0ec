"""What is executed: small launches of every family, each a launcher, its eager twin and operands for both."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ....kernels.activations import finish
from ....kernels.block import eager as block_twins
from ....kernels.block import triton as block_kernels
from ....kernels.block.layout import BlockLayout, grid
from ....kernels.gpus import runs_mma_sp
from ....kernels.mlp import triton as mlp_kernels
from ....kernels.mlp.eager import expanded_mlp_eager
from ....kernels.partition import eager as partition_twins
from ....kernels.partition import triton as partition_kernels
from ....kernels.partition.labels import PackedLabels
from ....kernels.semi_structured import eager as semi_structured_twins
from ....kernels.semi_structured import pack, sparse_tensor_core
from ....kernels.semi_structured import triton as semi_structured_kernels
from ....kernels.semi_structured.fragments import pack_weights
from ....kernels.semi_structured.layout import SemiStructuredLayout

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
PARTITION = ("split", "merge", "grad", "split_t", "merge_t", "grad_t")
MULTIPLIES = ("split", "merge", "split_t", "merge_t")
BLOCK = ("forward", "dx", "dw")
SEMI_STRUCTURED = ("forward", "dx", "dw", "compress", "expand")
SPARSE = ("forward", "dx")
PACKED = ("values", "transposed", "parent", "parent_t")
FORMS: tuple[pack.Form, ...] = ("fragments", "rows", "dense")
"""What is packed for sparse tensor cores (stored values, the same seen from their outputs, a parent's weight that lies
along its rows or across them), and into which forms: an operation is ``"values-rows"``, and so on."""

ROWS_BELOW = 128
"""Rows between two planes that lie apart: as many as a tile has."""

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One operation on small operands.

    Attributes:
        family: ``"partition"``, ``"block"``, ``"mlp"``, ``"semi_structured"``, ``"sparse"`` or ``"pack"``.
        op: One of the family's.
        dtype: A name in ``TYPES``; ``"fp32"`` multiplies in full precision.
        m: Rows of activations.
        shape: ``(N, K)`` of the parent; of the fused MLP ``(hidden, inputs)``.
        alpha: Children.
        block: Of the block family.
        bias: Whether one is added.
        activation: Fused into a forward.
        holes: Whether some edges belong to nobody.
        packed: Whether labels are packed, or a plain table.
        lying: How the activations, and the weight of a partition, lie: ``"plain"``, ``"strided"`` (rows apart),
            ``"padded"`` (rows apart and aligned, further than a pipeline loads ahead, and planes of them; labels of
            a partition too),
            ``"broadcast"`` (one row for all), ``"columns"`` (transposed) or ``"offset"`` (from an odd element on).
            Nobody may touch what lies between the rows.
        integers: Whether operands are integers, of which sums are exact, or normally distributed.
        density: Chance that a block is kept.
        merged: Whether the second layer of the MLP has labels.
        outputs: Of the fused MLP.
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
            "" if self.density == 0.5 else f"density{self.density:g}",
        )
        return "-".join((*names, *filter(None, more)))


@dataclass(frozen=True)
class Problem:
    """A case with its operands.

    Attributes:
        operands: The floating ones, in the case's dtype.
        kernel: Of the operands: launches.
        twin: Of the operands: the same in plain PyTorch, without bias and activation.
        finish: Bias and activation, where they come last, of the twin's result.
        length: Longest sum.
    """

    operands: tuple[Tensor, ...]
    kernel: Function
    twin: Function
    finish: Callable[[Tensor], Tensor]
    length: int


class _Draw:
    """Operands of a case, the same in every run.

    Integers are drawn so wide that their last bits count, and so small that float32 holds every sum of their products:
    one operand fills the significand of its type, the other takes what is left of 24 bits. They are scaled by a power
    of two in float16, where sums shall stay finite, and before GELU and SiLU, which shall not be flat.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.generator = case, torch.Generator().manual_seed(0)
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
        return _laid(drawn.to(TYPES[self.case.dtype]), shape, lying)

    def labels(self, *shape: int) -> Tensor:
        """Labels of a weight, as a plain table."""
        return torch.randint(self.case.alpha + self.case.holes, shape, generator=self.generator).byte()

    def packed(self, labels: Tensor) -> PackedLabels:
        """Labels, packed; they lie as the operands of the case do, where those are padded."""
        packed = PackedLabels.pack(labels, self.case.alpha)
        lying = "padded" if self.case.lying == "padded" else "plain"
        return packed._replace(planes=_laid(packed.planes, tuple(packed.planes.shape), lying))

    def mask(self, *shape: int) -> Tensor:
        """Which blocks are kept."""
        return torch.rand(shape, generator=self.generator) < self.case.density


def _laid(values: Tensor, shape: tuple[int, ...], lying: str) -> Tensor:
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


def problem(case: Case) -> Problem:
    """The operands of a case, and what runs on them."""
    return {
        "partition": _partition,
        "block": _block,
        "mlp": _mlp,
        "semi_structured": _semi_structured,
        "sparse": _semi_structured,
        "pack": _pack,
    }[case.family](case, _Draw(case))


def _ending(case: Case, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda y: finish(y if bias is None else y + bias.double(), case.activation)


def _partition(case: Case, draw: _Draw) -> Problem:
    (n, k), alpha, m, lying = case.shape, case.alpha, case.m, case.lying
    plain = draw.labels(n, k)
    w = draw(n, k, lying="plain" if lying == "broadcast" else lying)
    if case.holes:
        w = _laid(torch.where(plain < alpha, w, 0), (n, k), "plain" if lying == "broadcast" else lying)
    labels: Tensor | PackedLabels = draw.packed(plain) if case.packed else plain
    op = case.op.removesuffix("_t")
    if op != case.op:
        w, labels, (n, k) = w.T, labels.T, (k, n)
    if op == "grad":
        return Problem(
            (draw(m, alpha, n, lying=lying, most=draw.rest), draw(m, k, lying=lying)),
            lambda dy, x: partition_kernels.partition_grad_triton(dy, x, labels),
            lambda dy, x: partition_twins.partition_grad_eager(dy, x, labels),
            lambda y: y,
            m,
        )
    if op == "split":
        bias = draw(alpha, n) if case.bias else None
        return Problem(
            (draw(m, k, lying=lying, most=draw.rest), w),
            lambda x, w: partition_kernels.split_matmul_triton(x, w, labels, alpha, bias, case.activation),
            lambda x, w: partition_twins.split_matmul_eager(x, w, labels, alpha),
            _ending(case, bias),
            k,
        )
    bias = draw(n) if case.bias else None
    return Problem(
        (draw(m, alpha, k, lying=lying, most=draw.rest), w),
        lambda z, w: partition_kernels.merge_matmul_triton(z, w, labels, bias, case.activation),
        lambda z, w: partition_twins.merge_matmul_eager(z, w, labels),
        _ending(case, bias),
        k,
    )


def _block(case: Case, draw: _Draw) -> Problem:
    (n, k), m, lying = case.shape, case.m, case.lying
    layout = BlockLayout.from_mask(draw.mask(*grid(case.shape, case.block)), case.shape, case.block)
    values = layout.from_dense(draw(n, k))
    bias = draw(n) if case.bias else None
    x = draw(m, k, lying=lying, most=None if case.op == "dw" else draw.rest)
    dy = draw(m, n, lying=lying, most=draw.rest)
    if case.op == "forward":
        return Problem(
            (x, values),
            lambda x, v: block_kernels.block_matmul_triton(x, v, layout, bias, case.activation),
            lambda x, v: block_twins.block_matmul_eager(x, v, layout),
            _ending(case, bias),
            k,
        )
    if case.op == "dx":
        return Problem(
            (dy, values),
            lambda dy, v: block_kernels.block_matmul_t_triton(dy, v, layout),
            lambda dy, v: block_twins.block_matmul_t_eager(dy, v, layout),
            lambda y: y,
            n,
        )
    return Problem(
        (dy, x),
        lambda dy, x: block_kernels.block_grad_triton(dy, x, layout),
        lambda dy, x: block_twins.block_grad_eager(dy, x, layout),
        lambda y: y,
        m,
    )


def _mlp(case: Case, draw: _Draw) -> Problem:
    (hidden, k), alpha, n = case.shape, case.alpha, case.outputs
    first = PackedLabels.pack(draw.labels(hidden, k), alpha)
    second = PackedLabels.pack(draw.labels(n, hidden), alpha) if case.merged else None
    # The hidden activations are rounded to 16 bits: with factors of one they are integers of no more than 8 bits.
    x, w1 = draw(case.m, k, lying=case.lying, most=1), draw(hidden, k, most=1)
    w2 = draw(n, hidden if case.merged else alpha * hidden)
    biases = (draw(alpha, hidden, most=3), draw(n)) if case.bias else ()

    def fields(rest: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        return (rest[0], rest[1]) if rest else (None, None)

    return Problem(
        (x, w1, w2, *biases),
        lambda x, w1, w2, *b: mlp_kernels.expanded_mlp_triton(
            x, w1, first, w2, second, alpha, *fields(b), case.activation
        ),
        lambda x, w1, w2, *b: expanded_mlp_eager(x, w1, first, w2, second, alpha, *fields(b), case.activation),
        lambda y: y,
        k + alpha * hidden,
    )


def _quads(case: Case, draw: _Draw) -> SemiStructuredLayout:
    """A layout with two of every four inputs at each child; of two children some edges belong to nobody."""
    n, k = case.shape
    places = torch.rand(n, -(-k // 4), 4, generator=draw.generator).argsort(-1).flatten(1)[:, :k]
    if case.alpha != 2:
        return SemiStructuredLayout.from_mask(places < 2)
    labels = torch.where(places < 2, places.new_zeros(()), places.new_ones(())).byte()
    return SemiStructuredLayout.from_labels(torch.where(draw.labels(n, k) < 2, labels, 255))


def _semi_structured(case: Case, draw: _Draw) -> Problem:
    (n, k), m, layout = case.shape, case.m, _quads(case, draw)
    w = draw(n, k)
    values = layout.from_dense(w)
    bias = draw(layout.children, n) if case.bias else None
    x = draw(m, k, lying=case.lying, most=None if case.op == "dw" else draw.rest)
    dy = draw(m, layout.children, n, lying=case.lying, most=draw.rest)
    dense, sparse, twins = semi_structured_kernels, sparse_tensor_core, semi_structured_twins
    on_sparse = case.family == "sparse"
    forward: Function = (
        sparse.semi_structured_matmul_sparse_tensor_core if on_sparse else dense.semi_structured_matmul_triton
    )
    backward = (
        sparse.semi_structured_matmul_t_sparse_tensor_core if on_sparse else dense.semi_structured_matmul_t_triton
    )
    known: dict[str, tuple[tuple[Tensor, ...], Function, Function, int]] = {
        "forward": ((x, values), lambda *o: forward(*o, bias), twins.semi_structured_matmul_eager, k),
        "dx": ((dy, values), backward, twins.semi_structured_matmul_t_eager, 2 * n),
        "dw": ((dy, x), dense.semi_structured_grad_triton, twins.semi_structured_grad_eager, m),
        "compress": ((w,), dense.semi_structured_compress_triton, twins.semi_structured_compress_eager, 1),
        "expand": ((values,), dense.semi_structured_expand_triton, twins.semi_structured_expand_eager, 1),
    }
    operands, kernel, twin, length = known[case.op]
    return Problem(operands, lambda *o: kernel(*o, layout), lambda *o: twin(*o, layout), _ending(case, bias), length)


def _pack(case: Case, draw: _Draw) -> Problem:
    """A packing only moves 16-bit words: its result, whatever its form, is compared word by word."""
    (n, k), alpha = case.shape, case.alpha
    source, name = case.op.split("-")
    form = next(form for form in FORMS if form == name)
    dtype = TYPES[case.dtype]
    w = draw(n, k, lying="columns" if source == "parent_t" else case.lying)
    if source in ("parent", "parent_t"):
        layout = SemiStructuredLayout.interleaved(draw.labels(n, k), alpha)
        kept = layout.kept if case.holes or alpha == 4 else None

        def kernel(w: Tensor) -> Tensor:
            return pack.pack_parent(w, alpha, kept, form, layout.codes, layout.shape[1])

        given, values = w, layout.from_parent(w)
    else:
        own = _quads(case, draw)
        given = own.from_dense(w)
        values, layout = (given, own) if source == "values" else own.transposed(given)

        def kernel(w: Tensor) -> Tensor:
            if source == "values":
                return pack.pack_values(w, form, own.codes, k)
            return pack.pack_transposed(w, own.codes, k, form, layout.codes)

    eager = {
        "fragments": lambda: pack_weights(values).view(dtype),
        "rows": lambda: values.flatten(0, 1),
        "dense": lambda: layout.to_dense(values).flatten(0, 1),
    }
    return Problem((given,), lambda w: kernel(w).view(dtype), lambda w: eager[form]().double(), lambda y: y, 1)


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
        *each(("grad", "grad_t"), shape=(20, 40), m=530),
        *each(("grad", "grad_t"), shape=(66, 70), alpha=3, holes=True),
        *each(holes=True, packed=False, alpha=3),
        *(c for lying in ("strided", "broadcast", "columns", "offset") for c in each(lying=lying)),
        *(c for name in ("relu", "gelu", "silu") for c in each(multiplies, bias=True, activation=name)),
        *(c for name in ("gelu", "silu") for c in each(multiplies, dtype="fp32", bias=True, activation=name)),
        *(c for dtype in ("bf16", "fp16", "fp32", "tf32") for c in each(dtype=dtype, integers=False)),
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
    )


CASES = tuple(dict.fromkeys((*_partition_cases(), *_other_cases())))

QUICK = (
    Case("partition", "split", shape=(64, 640), m=16),
    Case("partition", "split", shape=(64, 128), m=70),
    Case("partition", "merge_t", "fp16", alpha=4, m=16),
    Case("partition", "grad", shape=(66, 70), alpha=3, holes=True),
    Case("block", "forward", block=(32, 32), bias=True, activation="gelu"),
    Case("mlp", "mlp", shape=(13, 70), bias=True, activation="relu"),
    Case("sparse", "forward", alpha=2, bias=True),
    Case("pack", "parent_t-dense", alpha=4),
)
"""A few of each kind, for CI."""


def runs_on(case: Case, arch: int) -> bool:
    """Whether an architecture runs a case."""
    return case.family != "sparse" or runs_mma_sp(arch)
