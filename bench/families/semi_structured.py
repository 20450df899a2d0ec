"""The 2:4 kernels: on dense tensor cores, on sparse ones, and what packs weights for those."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import Partition
from ... import kernels as public
from ...kernels.device import Device
from ...kernels.gpus import runs_mma_sp
from ...kernels.partition.eager import split_matmul_eager
from ...kernels.semi_structured import config as configs
from ...kernels.semi_structured import eager as twins
from ...kernels.semi_structured import gluon as on_sparse
from ...kernels.semi_structured import pack, quads, sparse_tensor_core
from ...kernels.semi_structured import triton as kernels
from ...kernels.semi_structured.backends import BACKENDS as _BACKENDS
from ...kernels.semi_structured.fragments import TILE_ROWS, pack_weights
from ...kernels.semi_structured.layout import SemiStructuredLayout
from ...kernels.structures import TWO_FOUR
from . import accesses, contract
from .accesses import SPARSE, Access, Launch, Program, in_groups, reduce, span
from .check import SPARSE_BACKENDS, Cast, Check, drawn
from .contract import REDUCE, TYPES, Draw, Kernel, Problem, Row, ending, pair


def _matrix(row: Row) -> list[str]:
    """Complaints of a kernel on dense tensor cores."""
    found = ", ".join(sorted(_instructions(row)))
    wrong = bool(found) != (row["dtype"] != "fp32")
    return [f"matrix instruction: {found or 'none'} for {row['dtype']}"] if wrong else []


def _sparse_matrix(row: Row) -> list[str]:
    found = _instructions(row)
    said = f"matrix instruction: meant HMMA.SP.16832, got {', '.join(sorted(found)) or 'none'}"
    return ([] if found == {"HMMA.SP.16832"} else [said]) + _wide(row)


def _instructions(row: Row) -> set[str]:
    return {name.removesuffix(".BF16").removesuffix(".F32") for name in row["matrix"]}


def _wide(row: Row) -> list[str]:
    return [f"loads of the weights of {row['load_bits']} bits"] if row["load_bits"] < 128 else []


def _multiply(row: Row) -> list[str]:
    return _matrix(row) + _wide(row)


def _moves(row: Row) -> list[str]:
    """Compressing and expanding read as wide as their operands lie."""
    return []


_PAIR = ("tl.load(pair",)
KERNELS = (
    Kernel(on_sparse.multiply, ("_copy(weights_smem",), check=_sparse_matrix, alias="sparse_tensor_core"),
    Kernel(kernels._multiply, _PAIR, check=_multiply),
    Kernel(kernels._multiply_t, _PAIR, check=_multiply),
    Kernel(kernels._outer, ("dy = tl.load(", "x = tl.load("), check=_matrix),
    Kernel(quads._compress, ("w = tl.load(",), multiplies=False, check=_moves),
    Kernel(quads._spread, _PAIR, multiplies=False, check=_moves),
    Kernel(pack._pack, ("tl.load(source", "tl.load(kept_ptr"), multiplies=False, check=_wide),
    Kernel(pack._pack_transposed, ("tl.load(pairs",), multiplies=False, check=_wide),
)
LAUNCHERS = (kernels, sparse_tensor_core)
BACKENDS = (_BACKENDS,)

PACKED = ("values", "parent", "parent.T", "parent with holes", "parent of four", "transposed values")
"""What is packed: stored values, a parent's weight along its rows and across them, with a mask, children of four."""
FORMS: tuple[pack.Form, ...] = ("fragments", "rows", "dense")


def _quads(case: Any, draw: Draw) -> SemiStructuredLayout:
    """A layout with two of every four inputs at each child; of two children some edges belong to nobody."""
    n, k = case.shape
    if draw.device == "meta":
        return SemiStructuredLayout(case.shape, draw.labels(n, k // 8), None, case.children)
    places = torch.rand(n, -(-k // 4), 4, generator=draw.generator).argsort(-1).flatten(1)[:, :k]
    if case.alpha != 2:
        return SemiStructuredLayout.from_mask(places < 2)
    labels = torch.where(places < 2, places.new_zeros(()), places.new_ones(())).byte()
    return SemiStructuredLayout.from_labels(torch.where(draw.labels(n, k) < 2, labels, 255))


def operands(case: Any, draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    if case.family == "pack":
        return _packing(case, draw)
    if case.seeded:
        return _of_seed(case, draw)
    (n, k), m, layout = case.shape, case.m, _quads(case, draw)
    w = draw(n, k)
    values = draw.stored(layout, w)
    bias = draw(layout.children, n) if case.bias else None
    x = draw(m, k, lying=case.lying, most=None if case.op == "dw" else draw.rest)
    dy = draw(m, layout.children, n, lying=case.lying, most=draw.rest)
    given, name, length = {
        "forward": ((x, values), "semi_structured_matmul", k),
        "dx": ((dy, values), "semi_structured_matmul_t", 2 * n),
        "dw": ((dy, x), "semi_structured_grad", m),
        "compress": ((w,), "semi_structured_compress", 1),
        "expand": ((values,), "semi_structured_expand", 1),
    }["forward" if case.op == "sparse" else case.op]
    ours, twin = pair(name, sparse_tensor_core if case.family == "sparse" else kernels, twins)
    rest = (layout, bias) if name == "semi_structured_matmul" else (layout,)
    return Problem(given, lambda *o: ours(*o, *rest), lambda *o: twin(*o, layout), length, ending(case, bias))


def _of_seed(case: Any, draw: Draw) -> Problem:
    """The forward of two children of a seed on sparse tensor cores."""
    (n, k), m = case.shape, case.m
    labels, w = draw.seeded(n, k), draw(n, k)
    x = draw(m, k, lying=case.lying, most=draw.rest)
    bias = draw(2, n) if case.bias else None
    return Problem(
        (x, w),
        lambda x, w: sparse_tensor_core.split_matmul_seeded(x, w, labels, 2, bias),
        lambda x, w: split_matmul_eager(x, w, labels, 2),
        k,
        ending(case, bias),
    )


def _packing(case: Any, draw: Draw) -> Problem:
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
    return Problem((given,), lambda w: kernel(w).view(dtype), lambda w: eager[form]().double(), 1)


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of a 2:4 operation.

    Attributes:
        op: ``"forward"``, ``"dx"``, ``"dw"``, ``"compress"``, ``"expand"``; ``"sparse"``: the forward on sparse tensor
            cores; or what is packed and into which form, as ``"pack parent.T into rows"``.
        alpha: 1 or 2.
        shape: ``(N, K)`` of the parent.
        seeded: Whether labels are of a seed, with no metadata to load: two children on sparse tensor cores.
    """

    alpha: int = 2
    seeded: bool = False
    file: ClassVar[str] = "semi-structured"
    each: ClassVar[bool] = True

    @property
    def id(self) -> str:
        """As ``sparse-bf16-2-m16``."""
        return f"{self.op}{'-seeded' * self.seeded}-{self.dtype}-{self.alpha}-m{self.m}"

    @property
    def children(self) -> int:
        """Of each parent."""
        return self.alpha

    @property
    def family(self) -> str:
        """As ``fpe lab execute`` names it."""
        return "sparse" if self.op == "sparse" else "semi_structured"

    @property
    def option(self) -> str:
        """See :class:`.contract.Case`."""
        return TWO_FOUR

    @property
    def columns(self) -> Row:
        """See :class:`.contract.Case`."""
        return {"dtype": self.dtype, "children": self.children, "m": self.m}

    def owns(self, kernel: str) -> bool:
        """The sum of a split reduction is compiled with other families; packing is a case of its own."""
        return kernel != REDUCE.name and (self.op.startswith("pack") or not kernel.startswith("_pack"))

    def runs_on(self, arch: int) -> bool:
        """See :class:`.contract.Case`."""
        return self.op != "sparse" or runs_mma_sp(arch)

    def posed(self) -> Problem:
        """See :class:`.contract.Case`."""
        if self.op.startswith("pack"):
            return Problem((), self._pack, self._pack, 1)
        return operands(self, Draw(self))

    def _pack(self) -> Tensor:
        """Calls a packer; codes of the result have a nibble for each quad of four inputs."""
        (n, k), source = self.shape, self.op.removeprefix("pack ").partition(" into ")[0]
        form = next(form for form in FORMS if self.op.endswith(form))
        empty = Draw(self)

        def codes(rows: int, inputs: int) -> Tensor:
            return empty.labels(rows, inputs // 8)

        def of_result(rows: int, inputs: int) -> tuple[Tensor, int] | tuple[()]:
            return (codes(rows, inputs), inputs) if form == "dense" else ()

        if source == "values":
            return pack.pack_values(empty(2, n, k // 2), form, *of_result(n, k))
        if source == "transposed values":
            return pack.pack_transposed(empty(2, n, k // 2), codes(n, k), k, form, *of_result(k, 2 * n)[:1])
        if source == "parent.T":
            return pack.pack_parent(empty(n, k).T, 2, None, form, *of_result(k, 2 * n))
        alpha = 4 if source == "parent of four" else 2
        kept = None
        if source != "parent":
            kept = torch.empty(1, n, k * alpha // 2, dtype=torch.bool, device="meta")
        return pack.pack_parent(empty(n, k), alpha, kept, form, *of_result(n, alpha * k))


CASES = (
    *(Case("sparse", t, m, a) for t, a, m in product(("bf16", "fp16"), (1, 2), (1, 16, 32, 64, 1024))),
    *(Case("sparse", t, m, seeded=True) for t, m in product(("bf16", "fp16"), (1, 16, 32, 64, 1024))),
    *(
        Case(op, t, m, a)
        for op, t, a, m in product(("forward", "dx", "dw"), ("bf16", "fp16", "fp32"), (1, 2), (1, 64, 1024))
    ),
    *(Case(op, t, 1, a) for op, t, a in product(("compress", "expand"), ("bf16", "fp32"), (1, 2))),
    *(Case(f"pack {source} into {form}", "bf16", 1) for source, form in product(PACKED, FORMS)),
)
QUICK = (Case("sparse", "bf16", 64), Case("forward", "bf16", 64), Case("pack parent.T into fragments", "bf16", 1))


def launches(
    op: str, m: int, shape: tuple[int, int], children: int, config: configs.Config, itemsize: int
) -> list[Launch]:
    """The launches of one 2:4 operation on dense tensor cores, on contiguous operands.

    Args:
        op: ``"forward"``, ``"dX"`` or ``"dW"``.
        m: Rows of activations.
        shape: ``(N, K)`` of the parent.
        children: 1 or 2.
        config: Tiles.
        itemsize: Bytes of an operand's element; the result has the same.
    """
    (n, k), split, size = shape, config.split, itemsize
    quads, block_q = -(-k // 4), config.block_k // 4
    pitch = -(-quads // 2)  # of a row of codes, in bytes
    tiles_m, tiles_n, tiles_k = -(-m // config.block_m), -(-n // config.block_n), -(-k // config.block_k)
    target, stored = ("out", size) if split == 1 else ("partial", 4)

    def codes(tile_n: int, tile_k: int) -> Access:
        first, rows = span(tile_n, config.block_n, n)
        start = tile_k * block_q // 2
        return Access("codes", False, first, rows, start, min(block_q // 2, pitch - start), pitch)

    def pair(child: int, tile_n: int, tile_k: int) -> Access:
        first, rows = span(tile_n, config.block_n, n)
        start, width = span(tile_k, block_q, quads)
        row = child * n + first
        return Access("pair", False, row, rows, start * 2 * size, width * 2 * size, quads * 2 * size)

    def activations(tensor: str, tile_m: int, child: int, of: int, columns: int, block: int, tile: int) -> Access:
        row, rows = span(tile_m, config.block_m, m)
        first, width = span(tile, block, columns)
        return Access(tensor, False, row, rows, (child * columns + first) * size, width * size, of * columns * size)

    def forward(pid: int, pid_split: int) -> Program:
        tile_m, tile_n = in_groups(pid, tiles_m, tiles_n, config.group)
        for step in range(tiles_k * pid_split // split, tiles_k * (pid_split + 1) // split):
            x = activations("x", tile_m, 0, 1, k, config.block_k, step)
            yield x, codes(tile_n, step), *(pair(child, tile_n, step) for child in range(children))
        row, rows = span(tile_m, config.block_m, m)
        first, width = span(tile_n, config.block_n, n)
        yield tuple(
            Access(
                target, True, pid_split * m + row, rows, (c * n + first) * stored, width * stored, children * n * stored
            )
            for c in range(children)
        )

    def backward(pid: int, pid_split: int) -> Program:
        tile_m, tile_k = in_groups(pid, tiles_m, tiles_k, config.group)
        for step in range(tiles_n * pid_split // split, tiles_n * (pid_split + 1) // split):
            yield (
                codes(step, tile_k),
                *(
                    access
                    for child in range(children)
                    for access in (
                        activations("dy", tile_m, child, children, n, config.block_n, step),
                        pair(child, step, tile_k),
                    )
                ),
            )
        row, rows = span(tile_m, config.block_m, m)
        first, width = span(tile_k, config.block_k, k)
        yield (Access(target, True, pid_split * m + row, rows, first * stored, width * stored, k * stored),)

    def outer(pid: int, pid_split: int) -> Program:
        tile_n, tile_k = in_groups(pid, tiles_n, tiles_k, config.group)
        for step in range(tiles_m * pid_split // split, tiles_m * (pid_split + 1) // split):
            yield (
                activations("x", step, 0, 1, k, config.block_k, tile_k),
                *(activations("dy", step, c, children, n, config.block_n, tile_n) for c in range(children)),
            )
        yield (codes(tile_n, tile_k),)
        first, rows = span(tile_n, config.block_n, n)
        start, width = span(tile_k, 2 * block_q, 2 * quads)
        start, width, across = start * stored, width * stored, 2 * quads * stored
        yield tuple(
            Access(target, True, (pid_split * children + c) * n + first, rows, start, width, across)
            for c in range(children)
        )

    launched, results = {
        "forward": (Launch("_multiply", (tiles_m * tiles_n, split), forward), m * children * n),
        "dX": (Launch("_multiply_t", (tiles_m * tiles_k, split), backward), m * k),
        "dW": (Launch("_outer", (tiles_n * tiles_k, split), outer), children * n * 2 * quads),
    }[op]
    return [launched] if split == 1 else [launched, reduce(results, split, size)]


def sparse_launches(
    m: int, shape: tuple[int, int], children: int, config: configs.SparseConfig, itemsize: int = 2
) -> list[Launch]:
    """The launches of the 2:4 forward on sparse tensor cores; arguments as of :func:`launches`."""
    (n, k), split = shape, config.split
    tiles_m, tiles_n, steps = -(-m // config.block_m), -(-n // TILE_ROWS), -(-k // configs.STEP)
    warps, width_x = TILE_ROWS // 32, configs.STEP * itemsize
    target, stored = ("out", itemsize) if split == 1 else ("partial", 4)

    def program(pid: int, pid_split: int) -> Program:
        tile_m, tile_n = in_groups(pid, tiles_m, tiles_n, config.group)
        row, rows = span(tile_m, config.block_m, m)
        for step in range(steps * pid_split // split, steps * (pid_split + 1) // split):
            first = tile_n * warps
            yield (
                *(
                    Access("weights", False, child * tiles_n * warps + first, warps, step * 2048, 2048, steps * 2048)
                    for child in range(children)
                ),
                Access("metadata", False, first, warps, step * 256, 256, steps * 256),
                Access("x", False, row, rows, step * width_x, width_x, steps * width_x),
            )
        first, width = span(tile_n, TILE_ROWS, n)
        pitch = children * n * stored
        yield tuple(
            Access(target, True, pid_split * m + row, rows, (child * n + first) * stored, width * stored, pitch)
            for child in range(children)
        )

    launched = Launch("multiply", (tiles_m * tiles_n, split), program)
    return [launched] if split == 1 else [launched, reduce(m * children * n, split, itemsize)]


def checks() -> Iterator[Check]:
    """The three 2:4 operations: one child with a mask of its own, and both children of a parent."""
    for m, n, k in ((17, 70, 88), (1, 16, 64), (64, 128, 256), (130, 257, 96), (5, 1, 36)):
        for children in (1, 2):
            labels = Partition.semi_structured(n, k, generator=torch.Generator().manual_seed(0)).labels
            both = public.SemiStructuredLayout.from_labels(labels)
            layout = both if children == 2 else public.SemiStructuredLayout.from_mask(labels == 0)
            tensors = [drawn(n, k, seed=1), drawn(m, k, seed=2)]
            tensors.append(drawn(m, children, n, seed=3))
            for op in ("semi_structured_matmul", "semi_structured_matmul_t", "semi_structured_grad"):
                run = partial(_checked, op, tensors, layout)
                yield Check(f"{op} {m}x{n}x{k}, {children} children", "semi_structured", op, run, SPARSE_BACKENDS)


def _checked(
    op: str, tensors: list[Tensor], layout: public.SemiStructuredLayout, cast: Cast, backend: str
) -> list[Tensor]:
    w, x, dy = map(cast, tensors)
    kept = layout.kept if layout.kept is None else layout.kept.to(x.device)
    layout = layout._replace(codes=layout.codes.to(x.device), kept=kept)
    values = public.semi_structured_compress(w, layout, backend="eager")
    if op == "semi_structured_matmul":
        return [public.semi_structured_matmul(x, values, layout, backend=backend)]
    if op == "semi_structured_matmul_t":
        return [public.semi_structured_matmul_t(dy, values, layout, backend=backend)]
    return [public.semi_structured_grad(dy, x, layout, backend=backend)]


@dataclass(frozen=True)
class Layer:
    """An expanded layer of two 2:4 children."""

    case: accesses.Case

    def problem(self, op: str) -> configs.Problem | configs.SparseProblem:
        """See :class:`.accesses.Layer`."""
        c = self.case
        return configs.SparseProblem(c.m, c.n, c.k, 2) if op == SPARSE else self._on_dense(op)

    def _on_dense(self, op: str) -> configs.Problem:
        c = self.case
        return configs.Problem(_OPERATIONS[op], c.m, c.n, c.k, 2, c.itemsize)

    def launches(self, op: str, config: Any) -> list[Launch]:
        """See :class:`.accesses.Layer`."""
        c = self.case
        if op == SPARSE:
            return sparse_launches(c.m, (c.n, c.k), 2, config)
        return launches(op, c.m, (c.n, c.k), 2, config, c.itemsize)

    def on_chip(self, op: str, config: Any, device: Device) -> tuple[int, int]:
        """See :class:`.accesses.Layer`."""
        if op == SPARSE:
            return config.num_stages * configs.stage_bytes(config.block_m, 2), 2 * TILE_ROWS * config.block_m
        used = configs.shared_bytes(self._on_dense(op), config)
        m, n, k = config.block_m, config.block_n, config.block_k
        return used, {"forward": 2 * n * m, "dX": m * k, "dW": 2 * n * k}[op]

    def compulsory(self, op: str) -> int:
        """The parent's weights or their gradient, half a byte a quad, activations and results, each once."""
        c = self.case
        quads = -(-c.k // 4)
        return c.n * (4 * quads * c.itemsize + -(-quads // 2)) + c.itemsize * c.m * (c.k + 2 * c.n)

    def results(self, op: str) -> int:
        """See :class:`.accesses.Layer`."""
        c = self.case
        return {"dX": c.m * c.k, "dW": 4 * c.n * -(-c.k // 4)}.get(op, 2 * c.m * c.n)


_OPERATIONS = {
    "forward": "semi_structured_matmul",
    "dX": "semi_structured_matmul_t",
    "dW": "semi_structured_grad",
}
