"""The kernel that moves packed values to their places and back, and the partition kernels that read them packed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from ... import kernels as public
from ...kernels.bitmap import eager as twins
from ...kernels.bitmap import triton as kernels
from ...kernels.bitmap.backends import BACKENDS as _BACKENDS
from ...kernels.bitmap.existence import Kept
from ...kernels.bitmap.layout import BASE, RUN, WORD, Bitmap, index_sizes
from ...kernels.gpus import reads_kept_values
from ...kernels.partition import config as configs
from ...kernels.partition import eager as partition_twins
from ...kernels.partition import triton as partition_kernels
from ...kernels.partition.labels import PackedLabels, digits, row_bytes
from ...kernels.partition.seeded import SeededLabels
from . import contract, partition
from .accesses import INDEX, Access, Launch, Program, reduce
from .check import SHAPES, Cast, Check, drawn
from .contract import Draw, Kernel, Problem, pair

KERNELS = (Kernel(kernels._bitmap_move, ("tl.load(values_at", "tl.load(dense_at"), None, False, lambda row: []),)
LAUNCHERS = ()
BACKENDS = (_BACKENDS,)
OPERATIONS = ("unpack", "pack")
PRODUCTS = tuple(f"kept_{op}" for op in partition.OPERATIONS)
"""The partition operations on kept values."""


def operands(case: "Case", draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    kept = _kept(case, draw)
    if case.op in PRODUCTS:
        return _product(case, draw, kept)
    ours, twin = pair(f"{case.op}_values", kernels, twins)
    operand = draw(kept.nnz) if case.op == "unpack" else draw(*case.shape)
    return Problem((operand,), lambda t: ours(t, kept), lambda t: twin(t, kept), 1)


def _kept(case: "Case", draw: Draw) -> Kept:
    """The bitmap of a case, of which only the sizes count where nothing has numbers; or holes of a seed."""
    n, k = case.shape
    if case.seeded and not case.holes:
        return public.SeededHoles.of(5, (n, k), k // 2)
    if draw.device != "meta":
        return Bitmap.pack(draw.mask(n, k)).to(draw.device)
    (runs, bases), empty = index_sizes(case.shape), torch.empty
    bits = empty(n, -(-k // WORD), dtype=torch.int32, device="meta")
    starts = empty(runs, dtype=torch.int16, device="meta")
    before = empty(bases, dtype=torch.int32, device="meta")
    return Bitmap(bits, starts, before, (n, k), n * k // (case.alpha or 1))


def _product(case: "Case", draw: Draw, kept: Kept) -> Problem:
    """A partition operation of ``case.alpha`` children; one needs no labels."""
    (n, k), alpha, m = case.shape, case.alpha or 1, case.m
    plain = draw.labels(n, k)
    table: Tensor = plain if alpha > 1 else torch.zeros_like(plain)
    labels: PackedLabels | SeededLabels | None = draw.packed(plain) if alpha > 1 else None
    if case.seeded:
        labels = public.SeededLabels.of(5, (n, k), alpha)
        table = labels.unpack(plain.device)
    op = case.op.removeprefix("kept_").removesuffix("_t")
    if case.op.endswith("_t"):
        (n, k), kept, table, labels = (k, n), kept.T, table.T, None if labels is None else labels.T
    ours, twin = pair(partition.NAMES[op], partition_kernels, partition_twins)
    if op == "grad":
        given = draw(m, alpha, n, most=draw.rest), draw(m, k)
        return Problem(given, lambda *o: ours(*o, labels, kept=kept), lambda *o: kept.from_dense(twin(*o, table)), m)
    bias = (draw(alpha, n) if op == "split" else draw(n)) if case.bias else None
    given = draw(*((m, k) if op == "split" else (m, alpha, k)), most=draw.rest), draw(kept.nnz)
    fused, children = (bias, case.activation), (alpha,) if op == "split" else ()
    return Problem(
        given,
        lambda *o: ours(*o, labels, *children, *fused, kept=kept),
        lambda x, v: twin(x, kept.to_dense(v), table, *children),
        k,
        contract.ending(case, bias),
    )


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of an operation on packed values.

    One of every ``alpha`` positions is kept. A product has ``alpha`` children, too; an operation that only moves values
    has no activations.
    """

    m: int = 0
    alpha: int | None = 2
    seeded: bool = False
    """Whether ownership is of a seed, and existence too."""
    holes: bool = False
    """Whether existence is in a bitmap in any case."""
    file: ClassVar[str] = "bitmap"
    operands = operands

    def runs_on(self, arch: int) -> bool:
        """Not where the products are made of a decompressed weight."""
        return self.op not in PRODUCTS or reads_kept_values(arch)


CASES = (
    *(Case(op, t) for op, t in product(OPERATIONS, ("bf16", "fp32"))),
    *(Case(op, "bf16", 16, alpha) for op, alpha in product(PRODUCTS, (1, 2, 4, 8))),
    *(Case(op, "bf16", 64, 2) for op in PRODUCTS),
    *(Case(op, "bf16", 16, alpha, seeded=True) for op, alpha in product(PRODUCTS, (2, 4, 8))),
    *(Case(op, "bf16", 16, alpha, seeded=True, holes=True) for op, alpha in product(PRODUCTS[:2], (2, 4, 8))),
    *(Case(f"kept_{op}", "bf16", 64, 1) for op in partition.MULTIPLIES),
    *(Case(op, "fp32", 16, 2) for op in ("kept_split", "kept_merge_t", "kept_grad")),
)
"""Numbers of 16 bits are moved alike, of whatever type."""
QUICK = (*(Case(op, "bf16") for op in OPERATIONS), *(Case(op, "bf16", 16, 2) for op in ("kept_split", "kept_grad")))


def launches(problem: configs.Problem, config: configs.Config, share: float) -> list[Launch]:
    """The launches of a product of kept values, of a mask that keeps the same share of every 32 positions.

    The values of a tile's rows are then a rectangle, as the tile is.

    Args:
        problem: The operation and its sizes; columns are whole runs, so that rows begin with one.
        config: Tiles.
        share: Of the entries that exist; a multiple of 1 / 32.
    """
    n, k, size = problem.n, problem.k, problem.itemsize
    if k % RUN or share * WORD % 1:
        raise ValueError(f"expected columns in multiples of {RUN} and a share in 32nds, got {k} and {share}")
    first, *rest = partition.launches(problem, config)
    if config.direct:
        groups = partition.launches(problem, replace(config, block_k=configs.GROUP, split=1))[0].program
        parts = config.block_k // configs.GROUP
        steps_k = -(-k // config.block_k)
    transposed = problem.transposed
    paired = configs.in_pairs(problem, config)

    def packed(access: Access, values: int) -> Access:
        """The kept part of a rectangle of the weight, whose elements have so many bytes."""
        column, width, pitch = (int(share * part) for part in (access.column, access.width, k * values))
        return access._replace(column=column, width=width, pitch=pitch)

    def bits(tile: Access, values: int) -> Access:
        return Access("bits", False, tile.row, tile.rows, tile.column // values // 8, tile.width // values // 8, k // 8)

    def lookup(tile: Access, values: int) -> tuple[Access, ...]:
        """What says how many values stand before a tile's rows."""
        run, word = tile.column // values // RUN, tile.column // values // WORD
        begin = run * (RUN // WORD)
        found = [(row * k + run * RUN) // BASE for row in range(tile.row, tile.row + tile.rows)]
        bases = (Access("bases", False, 0, found.count(base), INDEX * base, INDEX, 0) for base in dict.fromkeys(found))
        starts = Access("starts", False, tile.row, tile.rows, 2 * run, 2, k // RUN * 2)
        earlier = Access("bits", False, tile.row, tile.rows, 4 * begin, 4 * (word - begin), k // 8)
        return *bases, starts, earlier

    def following(row: int) -> tuple[Access, ...]:
        """What says whether enough values follow those before a row, which decides how a program loads."""
        run = row * (k // RUN) + 1
        if not (paired or config.direct) or run >= n * (k // RUN):
            return ()
        bases = Access("bases", False, 0, 1, INDEX * (run // (BASE // RUN)), INDEX, 0)
        return bases, Access("starts", False, 0, 1, 2 * run, 2, k // RUN * 2)

    def lines(access: Access) -> Iterator[Access]:
        """The kept part of some columns of a direct kernel's rows: whole lines of 16 bytes, and the one behind them.

        Behind a row's last values are the next row's first. They are counted as those of the tile's own rows, of which
        only one row is another.
        """
        part = packed(access, size)
        if access.row + config.block_n >= n:  # where values are read one by one
            yield part
            return
        begin, end = part.column // 16 * 16, (part.column + part.width) // 16 * 16 + 32
        yield part._replace(column=begin, width=min(end, part.pitch) - begin)
        if end > part.pitch:
            yield part._replace(column=0, width=end - part.pitch)

    def along_rows(x: int, y: int) -> Program:
        """Of a direct kernel: each part of its warps goes on from its own first column."""
        begin, end = (steps_k * split // config.split for split in (y, y + 1))
        columns, own = end - begin, list(groups(x, 0))
        firsts = [begin * parts + part * columns for part in range(parts)]
        tiles = [own[group][0] for group in firsts if group < len(own) - 1]
        yield (*following(tiles[0].row + config.block_n), *(a for tile in tiles for a in lookup(tile, size)))
        for step in range(columns):
            for group in firsts:
                if group + step < len(own) - 1:
                    tile, *others = own[group + step]
                    yield bits(tile, size), *lines(tile), *others
        yield list(first.program(x, y))[-1]

    def program(x: int, y: int) -> Program:
        """As of the whole weight: its tiles come with their bits, and with what precedes a row where it begins."""
        begins = True
        if transposed:
            yield following((n - 1) // config.block_n * config.block_n)
        for step in first.program(x, y):
            found: list[Access] = []
            for access in step:
                if access.tensor == "words":
                    if begins or transposed:
                        found += lookup(access, size)
                    if begins and not transposed:
                        found += following(access.row + config.block_n)
                    found += [bits(access, size), packed(access, size)]
                elif access.store and problem.op == "partition_grad":
                    values = size if access.tensor == "out" else 4
                    tile = access._replace(row=access.row % n)
                    found += [*lookup(tile, values), bits(tile, values), packed(access, values)]
                else:
                    found.append(access)
            begins = False
            yield tuple(found)

    if problem.op == "partition_grad" and rest:
        rest = [reduce(int(share * n * k), config.split, size)]
    if config.direct:
        return [replace(first, kernel="multiply_kept_rows", program=along_rows), *rest]
    return [replace(first, program=program), *rest]


@dataclass(frozen=True)
class Layer(partition.Layer):
    """A layer of kept values: of any mask with one child, else of labels with holes."""

    def problem(self, op: str) -> configs.Problem:
        """See :class:`.accesses.Layer`."""
        problem = super().problem(op)
        pairs = self.case.itemsize == 2 and not problem.transposed and problem.op != "partition_grad"
        return replace(problem, pairs=pairs, kept=self.share)

    def launches(self, op: str, config: configs.Config) -> list[Launch]:
        """See :class:`.accesses.Layer`."""
        return launches(self.problem(op), config, self.share)

    @property
    def share(self) -> float:
        """Of the entries that exist."""
        assert self.case.kept is not None
        return self.case.kept

    def compulsory(self, op: str) -> int:
        """The kept values or their gradient, the index, the labels' bits, activations and results, each once."""
        c, (runs, bases) = self.case, index_sizes((self.case.n, self.case.k))
        dense = c.itemsize * c.n * c.k
        labels = digits(c.alpha) * c.n * row_bytes(c.k) if c.alpha == 1 else 0
        index = c.n * c.k // 8 + 2 * runs + INDEX * bases
        return super().compulsory(op) - labels - dense + int(self.share * dense) + index

    def results(self, op: str) -> int:
        """See :class:`.accesses.Layer`."""
        every = super().results(op)
        return int(self.share * every) if self.problem(op).op == "partition_grad" else every


def checks() -> Iterator[Check]:
    """Both moves, and a product with its gradients, by shape and density."""
    for (m, n, k), density in ((shape, d) for shape in SHAPES for d in (0.0, 0.5, 1.0)):
        kept = Bitmap.pack(torch.rand(n, k, generator=torch.Generator().manual_seed(0)) < density)
        w, x, dy = drawn(n, k, seed=1), drawn(m, k, seed=2), drawn(m, 1, n, seed=3)

        def run(cast: Cast, backend: str, kept: Bitmap = kept, w: Tensor = w, x: Tensor = x,
                dy: Tensor = dy) -> list[Tensor]:  # fmt: skip
            x, w, dy = cast(x), cast(w), cast(dy)
            there = kept.to(x.device)
            values = public.pack_values(w, there, backend=backend)
            moved = [values, public.unpack_values(values, there.T, backend=backend)]
            products = [public.masked_matmul(x, values, there, backend=backend)]
            products += [public.partition_grad(dy, x, None, kept=there, backend=backend)]
            return [*moved, *products, public.masked_matmul(dy[:, 0], values, there.T, backend=backend)]

        yield Check(f"bitmap {m}x{n}x{k} density {density}", "bitmap", "unpack_values", run)
