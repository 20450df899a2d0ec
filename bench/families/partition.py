"""The partition kernels: through shared memory, and for few rows from memory to the tensor cores directly."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ... import kernels as public
from ...kernels.bitmap.gluon import kept_words
from ...kernels.bitmap.triton import kept_pairs
from ...kernels.device import Device
from ...kernels.partition import config as configs
from ...kernels.partition import eager as twins
from ...kernels.partition import gluon, gluon_kept, gluon_transposed, tiles
from ...kernels.partition import triton as kernels
from ...kernels.partition.backends import MERGE, SPLIT
from ...kernels.partition.config import GROUP
from ...kernels.partition.eager import Labels
from ...kernels.partition.labels import PackedLabels, digits, row_bytes
from ...kernels.structures import SEEDED
from . import accesses, contract, job
from .accesses import Access, Launch, Program, in_groups, reduce
from .check import SHAPES, SPARSE_BACKENDS, Cast, Check, drawn
from .contract import Draw, Kernel, Problem, Row, as_meant, laid, pair

ISSUE_SLOTS = 14
"""Instructions that an H200's lanes can issue while a 16-bit weight arrives at 4.8 TB/s (132 x 128 lanes, 1.98 GHz)."""

IN_FLIGHT = 40 << 10
"""Bytes that a multiprocessor of an H200 must have under way for memory never to wait: 25 KB, with a margin."""


def _step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    rows = given["BLOCK_M" if given["TURNED"] else "BLOCK_K" if given["TRANSPOSED"] else "BLOCK_N"]
    return given["BLOCK_N"] * given["BLOCK_K"] * size, rows


def _rows_step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_N"] * GROUP * given["WARPS_IN"] * size, 16


def _columns_step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["UNROLL"] * 16 * given["num_warps"] * given["EACH"] * 8 * size, 16


def _outer_step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    left = given["BLOCK_N"] * (given["ALPHA"] if given["CHILDREN_LEFT"] else 1)
    right = given["BLOCK_K"] * (1 if given["CHILDREN_LEFT"] else given["ALPHA"])
    return given["BLOCK_M"] * (left + right) * size, given["BLOCK_N"]


def check_no_shared(row: Row, load_bits: int = 128) -> list[str]:
    """Complaints of any direct kernel."""
    complaints = as_meant(row, load_bits)
    if row["loop_shared"]:
        complaints.append(f"{row['loop_shared']} instructions on shared memory in a loop that needs none")
    return complaints


def check_direct(row: Row) -> list[str]:
    """Complaints of a kernel whose weights go from memory to the tensor cores through nothing in between."""
    # A split's sums of 16 rows and eight children leave a lane four columns of the transpose.
    complaints = check_no_shared(row, 64 if row["op"] == "split_t" and row["alpha"] > 4 else 128)
    few = row["tile"].startswith(("8", "16"))
    if few and row["instructions_per_weight"] > ISSUE_SLOTS:
        spent = row["instructions_per_weight"]
        complaints.append(f"{spent} instructions a weight: unpacking would outlast the memory")
    if few and row["arch"] == 90 and row["in_flight_l2"] < IN_FLIGHT:
        complaints.append(f"{row['in_flight_l2']} bytes in flight on a multiprocessor: memory would wait")
    return complaints


_LINES = ("gl.load(line_at)",)  # the first of two lines: its bytes are those of the positions if all of them exist
ROWS, _COLUMNS = ("gl.load(upper_ptrs", "gl.load(lower_ptrs"), ("gl.load(words_at",)
_BY_COLUMNS = (gluon_transposed._rows, gluon_transposed._rows_narrow)
_BY_TILES = (tiles._partition_multiply, kept_pairs)
KERNELS = (
    Kernel(tiles._partition_multiply, ("tl.load(words_at", "tl.load(values_at"), _step, loads=_BY_TILES),
    Kernel(gluon.multiply_rows, ROWS, _rows_step, check=check_direct, loads=(gluon._group,)),
    Kernel(gluon_kept.multiply_kept_rows, _LINES, _rows_step, check=check_no_shared, loads=(kept_words,)),
    Kernel(gluon_transposed.multiply_columns, _COLUMNS, _columns_step, check=check_direct, loads=_BY_COLUMNS),
    Kernel(tiles._partition_outer, ("tl.load(left_at", "tl.load(right_at"), _outer_step),
)
LAUNCHERS = (kernels,)
BACKENDS = (SPLIT, MERGE)
OPERATIONS = ("split", "merge", "grad", "split_t", "merge_t", "grad_t")
"""On the weight as it is stored, and on its transpose: forward, dX and dW of both layers of a pair."""
MULTIPLIES = ("split", "merge", "split_t", "merge_t")


NAMES = {"split": "split_matmul", "merge": "merge_matmul", "grad": "partition_grad"}
"""Of the operations, as the package has them."""


def operands(case: Any, draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    (n, k), alpha, m, lying = case.shape, case.alpha, case.m, case.lying
    plain: Tensor = draw.labels(n, k)
    w = draw(n, k, lying="plain" if lying == "broadcast" else lying)
    if case.holes:
        w = laid(torch.where(plain < alpha, w, 0), (n, k), "plain" if lying == "broadcast" else lying)
    labels: Labels = draw.seeded(n, k) if case.seeded else draw.packed(plain) if case.packed else plain
    op = case.op.removesuffix("_t")
    if op != case.op:
        w, labels, (n, k) = w.T, labels.T, (k, n)
    fused: tuple[Any, ...] = ()
    bias, rest = None, (labels, alpha) if op == "split" else (labels,)
    if op == "grad":
        given, length = (draw(m, alpha, n, lying=lying, most=draw.rest), draw(m, k, lying=lying)), m
    else:
        bias = (draw(alpha, n) if op == "split" else draw(n)) if case.bias else None
        sides = (m, k) if op == "split" else (m, alpha, k)
        given, length, fused = (draw(*sides, lying=lying, most=draw.rest), w), k, (bias, case.activation)
    ours, twin = pair(NAMES[op], kernels, twins)
    ending = (contract.ending(case, bias),) if fused else ()
    return Problem(given, lambda *o: ours(*o, *rest, *fused), lambda *o: twin(*o, *rest), length, *ending)


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of a partition operation."""

    seeded: bool = False
    operands = operands


CASES = (
    *(Case(op, "bf16", m, alpha) for op, alpha, m in product(OPERATIONS, (2, 3, 4, 8), (16, 32, 64, 1024, 8192))),
    *(Case(op, t, m, 2) for op, t, m in product(OPERATIONS, ("fp16", "fp32", "tf32"), (16, 64, 8192))),
    *(Case(op, "bf16", m, 2, "gelu") for op, m in product(("split", "merge"), (16, 64, 8192))),
    *(Case(op, "bf16", 16, alpha, seeded=True) for op, alpha in product(MULTIPLIES, (2, 4, 8))),
    *(Case(op, "bf16", 1024, 2, seeded=True) for op in OPERATIONS),
)
QUICK = (
    Case("split", "bf16", 16, 2),
    Case("merge_t", "bf16", 16, 2),
    Case("split_t", "fp16", 64, 4),
    Case("merge", "bf16", 1024, 2),
    Case("grad", "bf16", 1024, 2),
)


def checks() -> Iterator[Check]:
    """The three partition operations, holes in the labels, operands strided and not, labels as bytes and packed."""
    cases = [(shape, alpha, False) for shape in SHAPES for alpha in (2, 4)]
    cases += [(SHAPES[0], alpha, True) for alpha in (2, 3, 8)]
    for (m, n, k), alpha, strided in cases:
        for packed in (False, True):
            operands = _check_operands(m, n, k, alpha, strided)
            case = f"{m}x{n}x{k} alpha {alpha}{' strided' * strided}{' packed' * packed}"
            for op in ("split_matmul", "merge_matmul", "partition_grad"):
                run = partial(_checked, op, operands, alpha, packed)
                backends = SPARSE_BACKENDS if op == "merge_matmul" else ("triton",)
                yield Check(f"{op} {case}", "partition", op, run, backends)
    m, n, k = SHAPES[3]
    for alpha in (2, 4, 8):
        run = partial(_of_a_seed, _check_operands(m, n, k, alpha, False), alpha)
        yield Check(f"labels of a seed {m}x{n}x{k} alpha {alpha}", "partition", "", run)
    for m, n, k in SHAPES:
        run = partial(_split_of_seed, _check_operands(m, n, k, 2, False))
        name = f"labels of a seed {m}x{n}x{k} on sparse tensor cores"
        yield Check(name, "partition", "", run, ("sparse_tensor_core",))


def _check_operands(m: int, n: int, k: int, alpha: int, strided: bool) -> dict[str, Tensor]:
    labels = torch.randint(alpha + 1, (n, k), generator=torch.Generator().manual_seed(alpha))
    shapes = {"x": (m, k), "w": (n, k), "dy": (m, alpha, n), "z": (m, alpha, k)}
    tensors = {name: drawn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    if strided:
        tensors |= {name: tensors[name].mT.contiguous().mT for name in ("x", "w")}
    tensors["w"] = tensors["w"].masked_fill(labels == alpha, 0)  # holes, as packed labels want them
    return {**tensors, "labels": torch.where(labels == alpha, public.HOLE, labels).to(torch.uint8)}


def _checked(op: str, operands: dict[str, Tensor], alpha: int, packed: bool, cast: Cast, backend: str) -> list[Tensor]:
    x, w, dy, z = (cast(operands[name]) for name in ("x", "w", "dy", "z"))
    labels: Any = operands["labels"].to(x.device)
    if packed and backend != "eager":
        labels = public.PackedLabels.pack(labels, alpha)
    if op == "split_matmul":
        return [public.split_matmul(x, w, labels, alpha, backend=backend)]
    if op == "merge_matmul":
        return [public.merge_matmul(z, w, labels, backend=backend)]
    return [public.partition_grad(dy, x, labels, backend=backend)]


def _split_of_seed(operands: dict[str, Tensor], cast: Cast, backend: str) -> list[Tensor]:
    x, w = cast(operands["x"]), cast(operands["w"])
    labels = public.SeededLabels.of(5, (w.shape[0], w.shape[1]), 2)
    return [public.split_matmul(x, w, labels, 2, backend=backend)]


def _of_a_seed(operands: dict[str, Tensor], alpha: int, cast: Cast, backend: str) -> list[Tensor]:
    """The operations on a whole weight, on kept values in a bitmap, and on those that the seed keeps."""
    x, w, dy, z = (cast(operands[name]) for name in ("x", "w", "dy", "z"))
    n, k = operands["labels"].shape
    labels, holes = public.SeededLabels.of(5, (n, k), alpha), public.SeededHoles.of(5, (n, k), k // 2)
    bitmap = public.Bitmap.pack(operands["labels"] < alpha).to(x.device)
    results = []
    for kept in (None, bitmap, holes):
        values = w if kept is None else kept.from_dense(w)
        results.append(public.split_matmul(x, values, labels, alpha, kept=kept, backend=backend))
        results.append(public.merge_matmul(z, values, labels, kept=kept, backend=backend))
        results.append(public.partition_grad(dy, x, labels, kept=kept, backend=backend))
    return results


def candidates(problem: configs.Problem, device: Device) -> Iterator[configs.Config]:
    """Every valid configuration worth trying."""
    m, grad = problem.m, problem.op == "partition_grad"
    rows = (32, 64) if grad else tuple(b for b in (16, 32, 64, 128) if b <= max(16, 2 * m))
    splits = (1, 2, 4, 8) if m <= 256 or grad else (1,)
    sides = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
    depths, outputs = ((16, 32), (32, 64, 128, 256)) if problem.transposed else ((128,), (16, 32, 64, 128))
    every = product(depths, outputs, (1, 2, 4, 8))
    loads = [(depth * warps, out) if problem.transposed else (out, depth * warps) for depth, out, warps in every]
    direct = product((8, 16, 32, 64), loads, splits, (4, 8), (1,), (True,))
    tiled = product(rows, sides, splits, (4, 8), (1, 3, 4), (False,))
    for block_m, (n, k), split, warps, stages, is_direct in (*direct, *tiled):
        config = configs.Config(block_m, n, k, split, 8, warps, stages, is_direct)
        if problem.fits(config, device):
            yield config


@dataclass(frozen=True, kw_only=True)
class Job(job.Job):
    """One entry of the partition table: an operation on the stored weight or on its transpose."""

    transposed: bool
    alpha: int = 2
    family = "partition"
    candidates = staticmethod(candidates)

    @property
    def id(self) -> str:
        """As ``split_matmul of the transpose alpha=2 m=16 torch.bfloat16``."""
        return f"{self.op}{' of the transpose' * self.transposed} alpha={self.alpha} m={self.m} {self.dtype}"

    def conditions(self, problem: configs.Problem) -> dict[str, Any]:
        """Where the entry will hold."""
        return {name: getattr(problem, name) for name in ("op", "transposed", "alpha", "itemsize")}

    def setup(self, target: str) -> job.Setup:
        """See :data:`.job.Setup`."""
        (n, k), alpha, size = self.shape, self.alpha, self.dtype.itemsize
        pairs = size == 2 and k % 2 == 0
        problem = configs.Problem(self.op, self.m, n, k, self.transposed, alpha, size, pairs)
        labels = PackedLabels(job.draw((digits(alpha), n, row_bytes(k)), "meta", torch.uint8), self.shape, alpha)
        if target != "meta":
            generator = torch.Generator(target).manual_seed(0)
            drawn = torch.randint(alpha, self.shape, generator=generator, device=target, dtype=torch.uint8)
            labels = PackedLabels.pack(drawn, alpha)
        w = job.draw((n, k), target, self.dtype)
        if self.transposed:
            labels, w, n, k = labels.T, w.T, k, n
        sizes = ((self.m, k), (self.m, alpha, k), (self.m, alpha, n))
        x, z, dy = (job.draw(shape, target, self.dtype) for shape in sizes)
        arguments: tuple = {
            "split_matmul": (x, w, labels, alpha),
            "merge_matmul": (z, w, labels),
            "partition_grad": (dy, x, labels),
        }[self.op]
        ours, twin = pair(self.op, kernels, twins)
        return partial(ours, *arguments), partial(twin, *arguments), problem


def launches(
    problem: configs.Problem, config: configs.Config, holes: bool = False, seeded: bool = False
) -> list[Launch]:
    """The launches of one partition operation on contiguous operands.

    Args:
        problem: The operation and its sizes, as the chooser of configurations takes them.
        config: Tiles.
        holes: Whether the labels have a plane of owned edges.
        seeded: Whether the labels are of a seed, and there is no plane.
    """
    planes = 0 if seeded or (problem.kept and problem.alpha == 1) else digits(problem.alpha)
    if problem.op == "partition_grad":
        return _outer(problem, config, planes + holes)
    return _multiply(problem, config, planes)


def _planes(n: int, k: int, count: int, first_n: int, rows: int, first_k: int, config: configs.Config) -> list[Access]:
    """The words of labels of a tile, plane by plane: whole groups of 128 columns, or the part of one."""
    pitch, first = row_bytes(k), first_k // 8
    column = 4 * (first // 16 * 4 + first % 4)
    width = max(min(max(config.block_k // 8, min(config.block_k // 2, 16)), pitch - column), 0)
    return [Access("planes", False, p * n + first_n, rows, column, width, pitch) for p in range(count)]


def _multiply(problem: configs.Problem, config: configs.Config, planes: int) -> list[Launch]:
    m, n, k, alpha, size = problem.m, problem.n, problem.k, problem.alpha, problem.itemsize
    merge, transposed, split = problem.op == "merge_matmul", problem.transposed, config.split
    size_out, size_in = (k, n) if transposed else (n, k)
    out, inner = (config.block_k, config.block_n) if transposed else (config.block_n, config.block_k)
    operands, sums = (alpha, 1) if merge else (1, alpha)
    steps, tiles_m, tiles_out = -(-size_in // inner), -(-m // config.block_m), -(-size_out // out)
    target, stored = ("out", size) if split == 1 else ("partial", 4)

    def program(pid: int, pid_split: int) -> Program:
        pid_m, pid_out = in_groups(pid, tiles_m, tiles_out, config.group)
        row, rows = pid_m * config.block_m, min(config.block_m, m - pid_m * config.block_m)
        for step in range(steps * pid_split // split, steps * (pid_split + 1) // split):
            first_n, first_k = (step * inner, pid_out * out) if transposed else (pid_out * out, step * inner)
            rows_n = min(config.block_n, n - first_n)
            width = min(config.block_k, k - first_k) * size
            words = Access("words", False, first_n, rows_n, first_k * size, width, k * size)
            width = min(inner, size_in - step * inner) * size
            xs = (
                Access("x", False, row, rows, (child * size_in + step * inner) * size, width, operands * size_in * size)
                for child in range(operands)
            )
            yield words, *_planes(n, k, planes, first_n, rows_n, first_k, config), *xs
        width, pitch = min(out, size_out - pid_out * out) * stored, sums * size_out * stored
        yield tuple(
            Access(target, True, pid_split * m + row, rows, (child * size_out + pid_out * out) * stored, width, pitch)
            for child in range(sums)
        )

    name = ("multiply_columns" if transposed else "multiply_rows") if config.direct else "_partition_multiply"
    launched = Launch(name, (tiles_m * tiles_out, split), program)
    return [launched] if split == 1 else [launched, reduce(m * sums * size_out, split, size)]


def _outer(problem: configs.Problem, config: configs.Config, planes: int) -> list[Launch]:
    m, n, k, alpha, size, split = problem.m, problem.n, problem.k, problem.alpha, problem.itemsize, config.split
    left, right = (1, alpha) if problem.transposed else (alpha, 1)
    tiles_m, tiles_n, tiles_k = -(-m // config.block_m), -(-n // config.block_n), -(-k // config.block_k)
    target, stored = ("out", size) if split == 1 else ("partial", 4)

    def program(pid: int, pid_split: int) -> Program:
        tile_n, tile_k = in_groups(pid, tiles_n, tiles_k, config.group)
        first_n, first_k = tile_n * config.block_n, tile_k * config.block_k
        rows_n, rows_k = min(config.block_n, n - first_n), min(config.block_k, k - first_k)
        for tile in range(tiles_m * pid_split // split, tiles_m * (pid_split + 1) // split):
            row, rows = tile * config.block_m, min(config.block_m, m - tile * config.block_m)
            lefts = [
                Access("left", False, row, rows, (child * n + first_n) * size, rows_n * size, left * n * size)
                for child in range(left)
            ]
            rights = [
                Access("right", False, row, rows, (child * k + first_k) * size, rows_k * size, right * k * size)
                for child in range(right)
            ]
            yield lefts[0], rights[0], *lefts[1:], *rights[1:]
        if planes:
            yield tuple(_planes(n, k, planes, first_n, rows_n, first_k, config))
        yield (Access(target, True, pid_split * n + first_n, rows_n, first_k * stored, rows_k * stored, k * stored),)

    launched = Launch("_partition_outer", (tiles_n * tiles_k, split), program)
    return [launched] if split == 1 else [launched, reduce(n * k, split, size)]


@dataclass(frozen=True)
class Layer:
    """A layer of labels that follow no blocks: expanded ``[n, k]``, or (``"merged ..."``) its successor ``[n, k]``."""

    case: accesses.Case

    def problem(self, op: str) -> configs.Problem:
        """See :class:`.accesses.Layer`."""
        merged, what = op.startswith("merged"), op.split()[-1]
        split = merged == (what == "dX")
        name = "partition_grad" if what == "dW" else "split_matmul" if split else "merge_matmul"
        transposed = merged if what == "dW" else what == "dX"
        c = self.case
        pairs = c.itemsize == 2 and c.k % 2 == 0
        seeded = c.structure == SEEDED
        return configs.Problem(name, c.m, c.n, c.k, transposed, c.alpha, c.itemsize, pairs, seeded=seeded)

    def launches(self, op: str, config: configs.Config) -> list[Launch]:
        """See :class:`.accesses.Layer`."""
        return launches(self.problem(op), config, seeded=self.case.structure == SEEDED)

    def on_chip(self, op: str, config: configs.Config, device: Device) -> tuple[int, int]:
        """See :class:`.accesses.Layer`."""
        problem = self.problem(op)
        columns = config.block_n if problem.transposed else config.block_k
        tile = config.block_n * config.block_k
        area = tile if problem.op == "partition_grad" else config.block_m * tile // columns
        shares = configs.warps_of(config, problem.transposed, problem.sums)[0] if config.direct else 1
        return configs.shared_bytes(problem, config, device), shares * problem.sums * area

    def compulsory(self, op: str) -> int:
        """The parent's weights or their gradient, the labels' bits, activations and results, each once."""
        c = self.case
        narrow, wide = (c.n, c.k) if op.startswith("merged") else (c.k, c.n)
        weights = c.itemsize * c.n * c.k + (0 if c.structure == SEEDED else digits(c.alpha) * c.n * row_bytes(c.k))
        return weights + c.itemsize * c.m * (narrow + c.alpha * wide)

    def results(self, op: str) -> int:
        """See :class:`.accesses.Layer`."""
        c, problem = self.case, self.problem(op)
        if problem.op == "partition_grad":
            return c.n * c.k
        outputs = c.k if problem.transposed else c.n
        return c.m * outputs * (1 if problem.op == "merge_matmul" else c.alpha)
