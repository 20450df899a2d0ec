"""The block kernels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import Partition
from ... import kernels as public
from ...kernels.block import config as configs
from ...kernels.block import eager as twins
from ...kernels.block import triton as kernels
from ...kernels.block.backends import BACKENDS as _BACKENDS
from ...kernels.block.layout import BlockLayout, grid
from ...kernels.device import Device
from . import accesses, contract, job
from .accesses import INDEX, Access, Launch, Program, flat, in_groups, reduce
from .check import SHAPES, Cast, Check, drawn
from .contract import TYPES, Draw, Kernel, Problem, pair


def _step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_IN"] * given["BK" if given["TRANSPOSED"] else "BN"] * size, given["BLOCK_M"]


def _outer_step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_M"] * (given["BN"] + given["BK"]) * size, given["BN"]


KERNELS = (
    Kernel(kernels._block_multiply, ("tl.load(values_ptr",), _step),
    Kernel(kernels._block_outer, ("tl.load(dy_ptr", "tl.load(x_ptr"), _outer_step),
)
LAUNCHERS = (kernels,)
BACKENDS = (_BACKENDS,)
OPERATIONS = ("forward", "dx", "dw")
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (64, 128), (128, 64), (16, 64))


def operands(case: Any, draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    (n, k), m, lying = case.shape, case.m, case.lying
    layout = BlockLayout.from_mask(draw.mask(*grid(case.shape, case.block)), case.shape, case.block)
    layout = BlockLayout(case.shape, case.block, *(index.to(draw.device) for index in layout.tensors))
    values = draw.stored(layout, draw(n, k))
    bias = draw(n) if case.bias else None
    x = draw(m, k, lying=lying, most=None if case.op == "dw" else draw.rest)
    dy = draw(m, n, lying=lying, most=draw.rest)
    given, name, length = {
        "forward": ((x, values), "block_matmul", k),
        "dx": ((dy, values), "block_matmul_t", n),
        "dw": ((dy, x), "block_grad", m),
    }[case.op]
    ours, twin = pair(name, kernels, twins)
    fused, ending = ((bias, case.activation), (contract.ending(case, bias),)) if case.op == "forward" else ((), ())
    return Problem(given, lambda *o: ours(*o, layout, *fused), lambda *o: twin(*o, layout), length, *ending)


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of a block operation; of ``alpha`` blocks one is kept, every other one if it is not given."""

    operands = operands


CASES = (
    *(Case(op, t, m, block=b) for op, b, t, m in product(OPERATIONS, BLOCKS, TYPES, (1, 16, 64, 1024, 8192))),
    *(
        Case("forward", "bf16", m, block=block, activation=activation)
        for block, m, activation in product(BLOCKS, (16, 8192), ("relu", "gelu", "silu"))
    ),
)
QUICK = (
    Case("forward", "bf16", 1024, block=(128, 128)),
    Case("forward", "bf16", 1, block=(64, 64), activation="gelu"),
    Case("dx", "fp16", 1024, block=(64, 64)),
    Case("dw", "bf16", 1024, block=(128, 128)),
)


def checks() -> Iterator[Check]:
    """The three block operations, by side of the block, density and activation."""
    sides = ((64, 64), (16, 16), (128, 128), (32, 16), (16, 128), (128, 32))
    cases = [(shape, block, 0.5) for block in sides for shape in SHAPES[:3]]
    cases += [(shape, (64, 64), 0.5) for shape in SHAPES[3:]] + [(SHAPES[0], (16, 16), d) for d in (0.0, 0.1, 1.0)]
    for (m, n, k), block, density in cases:
        mask = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=torch.Generator().manual_seed(0)) < density
        layout = BlockLayout.from_mask(mask, (n, k), block)
        values = drawn(*layout.values_shape, seed=1)
        values = layout.from_dense(layout.to_dense(values))  # padding is zero
        x, dy = drawn(m, k, seed=2), drawn(m, n, seed=3)
        bias = drawn(n, seed=4)

        def forward(cast: Cast, backend: str, x: Tensor = x, values: Tensor = values, bias: Tensor = bias,
                    layout: BlockLayout = layout) -> list[Tensor]:  # fmt: skip
            operands = cast(x), cast(values), _on(layout, cast)
            fused = public.block_matmul(*operands, cast(bias), "relu", backend=backend)
            return [public.block_matmul(*operands, backend=backend), fused]

        def backward(cast: Cast, backend: str, dy: Tensor = dy, values: Tensor = values,
                     layout: BlockLayout = layout) -> list[Tensor]:  # fmt: skip
            return [public.block_matmul_t(cast(dy), cast(values), _on(layout, cast), backend=backend)]

        def outer(cast: Cast, backend: str, dy: Tensor = dy, x: Tensor = x,
                  layout: BlockLayout = layout) -> list[Tensor]:  # fmt: skip
            return [public.block_grad(cast(dy), cast(x), _on(layout, cast), backend=backend)]

        case = f"{m}x{n}x{k} blocks {block[0]}x{block[1]} density {density}"
        for op, run in (("block_matmul", forward), ("block_matmul_t", backward), ("block_grad", outer)):
            yield Check(f"{op} {case}", "block", op, run)


def _on(layout: BlockLayout, cast: Cast) -> BlockLayout:
    """The layout on the device that operands are cast to."""
    device = cast(torch.empty(0, dtype=torch.float64)).device
    return BlockLayout(layout.shape, layout.block, *(index.to(device) for index in layout.tensors))


def candidates(problem: configs.Problem, device: Device) -> Iterator[configs.Config]:
    """Every valid configuration worth trying for a block as the kernel multiplies it."""
    grad, m = problem.op == "block_grad", problem.m
    rows = (32, 64, 128) if grad else tuple(b for b in (16, 32, 64, 128, 256) if b <= max(16, 2 * m))
    inner = (16,) if grad else tuple(b for b in (16, 32, 64, 128) if b <= problem.block[1])
    splits = (1, 2, 4, 8) if m <= 256 or grad else (1,)
    groups = (1,) if grad or m <= 256 else (8, 16, 32)
    stages = (3, 4, 5) if grad else (5, 7, 9)
    for choice in product(rows, inner, splits, groups, (2, 4, 8), stages):
        config = configs.Config(*choice)
        if problem.fits(config, device):
            yield config


@dataclass(frozen=True, kw_only=True)
class Job(job.Job):
    """One entry of the block table: ``"forward"``, ``"dX"`` or ``"dW"`` of two children in blocks of ``(bn, bk)``."""

    block: tuple[int, int]
    family = "block"
    candidates = staticmethod(candidates)
    smallest = job.Job.smallest | {"block": (16, 32)}

    @property
    def id(self) -> str:
        """As ``dX (64, 64) m=16 torch.bfloat16``."""
        return f"{self.op} {self.block} m={self.m} {self.dtype}"

    def conditions(self, problem: configs.Problem) -> dict[str, Any]:
        """Where the entry will hold."""
        return {"op": problem.op, "block": list(problem.block), "itemsize": problem.itemsize}

    def setup(self, target: str) -> job.Setup:
        """See :data:`.job.Setup`."""
        (n, k), (bn, bk) = self.shape, self.block
        labels = Partition.block(n, k, 2, block=self.block, generator=torch.Generator().manual_seed(0)).labels
        mask = torch.cat([labels[::bn, ::bk] == child for child in range(2)])
        made = BlockLayout.from_mask(mask, (2 * n, k), self.block)
        layout = BlockLayout((2 * n, k), self.block, *(index.to(target) for index in made.tensors))
        sizes = (layout.values_shape, (self.m, k), (self.m, 2 * n))
        values, x, dy = (job.draw(size, target, self.dtype) for size in sizes)
        if self.op == "dW":
            arguments: tuple = (dy, x, layout)
            problem = configs.grad_problem(layout, self.m, values.element_size())
        else:
            arguments = (x if self.op == "forward" else dy, values, layout)
            problem = configs.matmul_problem(layout, self.op == "dX", self.m, values.element_size())
        name = {"forward": "block_matmul", "dX": "block_matmul_t", "dW": "block_grad"}[self.op]
        ours, twin = pair(name, kernels, twins)
        return partial(ours, *arguments), partial(twin, *arguments), problem


def launches(op: str, m: int, layout: BlockLayout, config: configs.Config, itemsize: int) -> list[Launch]:
    """The launches of one block operation on contiguous operands.

    Args:
        op: ``"forward"``, ``"dX"`` or ``"dW"``.
        m: Rows of activations.
        layout: Where the blocks lie.
        config: Tiles.
        itemsize: Bytes of an operand's element; the result has the same.
    """
    if op == "dW":
        return _outer(m, layout, config, itemsize)
    return _multiply(m, layout, op == "dX", config, itemsize)


def _multiply(m: int, layout: BlockLayout, transposed: bool, config: configs.Config, itemsize: int) -> list[Launch]:
    (bn, bk), (n, k), (row_segments, col_segments) = layout.block, layout.shape, layout.grid
    block_m, block_in, split = config.block_m, config.block_in, config.split
    if transposed:
        out, inner, size_out, size_in, segments = bk, bn, k, n, col_segments
        pointers, tiles, longest = layout.col_ptr, layout.col_rows, layout.longest_cols
    else:
        out, inner, size_out, size_in, segments = bn, bk, n, k, row_segments
        pointers, tiles, longest = layout.row_ptr, layout.cols, layout.longest_rows
    bounds, tile, order, first = pointers.tolist(), tiles.tolist(), longest.tolist(), layout.col_order.tolist()
    steps, tiles_m = inner // block_in, -(-m // block_m)
    target, size = ("out", itemsize) if split == 1 else ("partial", 4)

    def program(pid: int, pid_split: int) -> Program:
        pid_m, position = in_groups(pid, tiles_m, segments, config.group)
        segment = order[position]
        yield (
            flat("longest", INDEX * position, INDEX),
            flat("segment", INDEX * segment, INDEX),
            flat("segment", INDEX * (segment + 1), INDEX),
        )
        row, rows = pid_m * block_m, min(block_m, m - pid_m * block_m)
        start, count = bounds[segment], bounds[segment + 1] - bounds[segment]
        stop, start = start + count * (pid_split + 1) // split, start + count * pid_split // split
        for step in range(start * steps, stop * steps):
            entry, part = divmod(step, steps)
            column = tile[entry] * inner + part * block_in
            width = max(min(block_in, size_in - column), 0)
            a = Access("a", False, row, rows, column * itemsize, width * itemsize, size_in * itemsize)
            index = flat("tile", INDEX * entry, INDEX)
            if transposed:
                v = Access(
                    "values", False, first[entry] * bn + part * block_in, block_in, 0, bk * itemsize, bk * itemsize
                )
                yield flat("block", INDEX * entry, INDEX), index, a, v
            else:
                offset = part * block_in * itemsize
                yield index, a, Access("values", False, entry * bn, bn, offset, block_in * itemsize, bk * itemsize)
        width = min(out, size_out - segment * out)
        result = Access(target, True, pid_split * m + row, rows, segment * out * size, width * size, size_out * size)
        yield (result,)

    launched = Launch("_block_multiply", (tiles_m * segments, split), program)
    return [launched] if split == 1 else [launched, reduce(m * size_out, split, itemsize)]


def _outer(m: int, layout: BlockLayout, config: configs.Config, itemsize: int) -> list[Launch]:
    (bn, bk), (n, k), split = layout.block, layout.shape, config.split
    rows, cols, panels = layout.rows.tolist(), layout.cols.tolist(), layout.panels.tolist()
    tiles_m = -(-m // config.block_m)
    target, size = ("out", itemsize) if split == 1 else ("partial", 4)

    def program(position: int, pid_split: int) -> Program:
        block = panels[position]
        yield (flat("panel", INDEX * position, INDEX),)
        yield flat("row", INDEX * block, INDEX), flat("col", INDEX * block, INDEX)
        left, top = cols[block] * bk, rows[block] * bn
        width_dy, width_x = min(bn, n - top), min(bk, k - left)
        for tile in range(tiles_m * pid_split // split, tiles_m * (pid_split + 1) // split):
            row = tile * config.block_m
            height = min(config.block_m, m - row)
            yield (
                Access("dy", False, row, height, top * itemsize, width_dy * itemsize, n * itemsize),
                Access("x", False, row, height, left * itemsize, width_x * itemsize, k * itemsize),
            )
        stored = Access(target, True, (pid_split * len(rows) + block) * bn, bn, 0, bk * size, bk * size)
        yield (stored,)

    launched = Launch("_block_outer", (len(rows), split), program)
    return [launched] if split == 1 else [launched, reduce(len(rows) * bn * bk, split, itemsize)]


@dataclass(frozen=True)
class Layer:
    """A layer of blocks: a block partition, child by child, without the blocks dropped at random."""

    case: accesses.Case
    layout: BlockLayout

    def problem(self, op: str) -> configs.Problem:
        """See :class:`.accesses.Layer`."""
        if op == "dW":
            return configs.grad_problem(self.layout, self.case.m, self.case.itemsize)
        return configs.matmul_problem(self.layout, op == "dX", self.case.m, self.case.itemsize)

    def launches(self, op: str, config: configs.Config) -> list[Launch]:
        """See :class:`.accesses.Layer`."""
        return launches(op, self.case.m, self.layout, config, self.case.itemsize)

    def on_chip(self, op: str, config: configs.Config, device: Device) -> tuple[int, int]:
        """See :class:`.accesses.Layer`."""
        problem = self.problem(op)
        columns = problem.block[1] if op == "dW" else config.block_m
        return configs.shared_bytes(problem, config), columns * problem.block[0]

    def compulsory(self, op: str) -> int:
        """The blocks as stored, the index tensors that the kernel reads, inputs that some block meets, all results."""
        size, m, (bn, bk), (n, k) = self.case.itemsize, self.case.m, self.layout.block, self.layout.shape
        blocks, (segments_n, segments_k) = self.layout.rows.shape[0], self.layout.grid
        used_n = min(len(self.layout.rows.unique()) * bn, n)
        used_k = min(len(self.layout.cols.unique()) * bk, k)
        index = {"forward": blocks + 2 * segments_n + 1, "dX": 2 * blocks + 2 * segments_k + 1, "dW": 2 * blocks}[op]
        sides = {"forward": used_k + n, "dX": used_n + k, "dW": used_n + used_k}[op]
        return size * (blocks * bn * bk + m * sides) + INDEX * index

    def results(self, op: str) -> int:
        """See :class:`.accesses.Layer`."""
        return {
            "forward": self.case.m * self.layout.shape[0],
            "dX": self.case.m * self.case.k,
            "dW": self.layout.rows.shape[0] * prod(self.layout.block),
        }[op]
