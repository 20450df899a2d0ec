"""The kernels' accesses without running them: a program's addresses follow from its position and the layout.

``tests/test_lab_traffic.py`` holds this equal to the real kernels' traces, access by access, so that shapes too large
for the interpreter can be counted. Biases are left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fpe.kernels.block.config import Config
from fpe.kernels.block.layout import BlockLayout
from fpe.kernels.partition.config import Config as PartitionConfig
from fpe.kernels.partition.config import Problem
from fpe.kernels.partition.labels import digits, row_bytes
from fpe.kernels.semi_structured.config import STEP, SparseConfig
from fpe.kernels.semi_structured.config import Config as SemiStructuredConfig
from fpe.kernels.semi_structured.fragments import TILE_ROWS

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


def block_launches(op: str, m: int, layout: BlockLayout, config: Config, itemsize: int) -> list[Launch]:
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


def partition_launches(problem: Problem, config: PartitionConfig, holes: bool = False) -> list[Launch]:
    """The launches of one partition operation on contiguous operands.

    Args:
        problem: The operation and its sizes, as the chooser of configurations takes them.
        config: Tiles.
        holes: Whether the labels have a plane of owned edges.
    """
    if problem.op == "partition_grad":
        return _partition_outer(problem, config, holes)
    return _partition_multiply(problem, config)


def semi_structured_launches(
    op: str, m: int, shape: tuple[int, int], children: int, config: SemiStructuredConfig, itemsize: int
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
        first, rows = _span(tile_n, config.block_n, n)
        start = tile_k * block_q // 2
        return Access("codes", False, first, rows, start, min(block_q // 2, pitch - start), pitch)

    def pair(child: int, tile_n: int, tile_k: int) -> Access:
        first, rows = _span(tile_n, config.block_n, n)
        start, width = _span(tile_k, block_q, quads)
        row = child * n + first
        return Access("pair", False, row, rows, start * 2 * size, width * 2 * size, quads * 2 * size)

    def activations(tensor: str, tile_m: int, child: int, of: int, columns: int, block: int, tile: int) -> Access:
        row, rows = _span(tile_m, config.block_m, m)
        first, width = _span(tile, block, columns)
        return Access(tensor, False, row, rows, (child * columns + first) * size, width * size, of * columns * size)

    def forward(pid: int, pid_split: int) -> Program:
        tile_m, tile_n = _in_groups(pid, tiles_m, tiles_n, config.group)
        for step in range(tiles_k * pid_split // split, tiles_k * (pid_split + 1) // split):
            x = activations("x", tile_m, 0, 1, k, config.block_k, step)
            yield x, codes(tile_n, step), *(pair(child, tile_n, step) for child in range(children))
        row, rows = _span(tile_m, config.block_m, m)
        first, width = _span(tile_n, config.block_n, n)
        yield tuple(
            Access(
                target, True, pid_split * m + row, rows, (c * n + first) * stored, width * stored, children * n * stored
            )
            for c in range(children)
        )

    def backward(pid: int, pid_split: int) -> Program:
        tile_m, tile_k = _in_groups(pid, tiles_m, tiles_k, config.group)
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
        row, rows = _span(tile_m, config.block_m, m)
        first, width = _span(tile_k, config.block_k, k)
        yield (Access(target, True, pid_split * m + row, rows, first * stored, width * stored, k * stored),)

    def outer(pid: int, pid_split: int) -> Program:
        tile_n, tile_k = _in_groups(pid, tiles_n, tiles_k, config.group)
        for step in range(tiles_m * pid_split // split, tiles_m * (pid_split + 1) // split):
            yield (
                activations("x", step, 0, 1, k, config.block_k, tile_k),
                *(activations("dy", step, c, children, n, config.block_n, tile_n) for c in range(children)),
            )
        yield (codes(tile_n, tile_k),)
        first, rows = _span(tile_n, config.block_n, n)
        start, width = _span(tile_k, 2 * block_q, 2 * quads)
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
    return [launched] if split == 1 else [launched, _reduce(results, split, size)]


def sparse_tensor_core_launches(
    m: int, shape: tuple[int, int], children: int, config: SparseConfig, itemsize: int = 2
) -> list[Launch]:
    """The launches of the 2:4 forward on sparse tensor cores; arguments as of :func:`semi_structured_launches`."""
    (n, k), split = shape, config.split
    tiles_m, tiles_n, steps = -(-m // config.block_m), -(-n // TILE_ROWS), -(-k // STEP)
    warps = TILE_ROWS // 32
    target, stored = ("out", itemsize) if split == 1 else ("partial", 4)

    def program(pid: int, pid_split: int) -> Program:
        tile_m, tile_n = _in_groups(pid, tiles_m, tiles_n, config.group)
        row, rows = _span(tile_m, config.block_m, m)
        for step in range(steps * pid_split // split, steps * (pid_split + 1) // split):
            first = tile_n * warps
            yield (
                *(
                    Access("weights", False, child * tiles_n * warps + first, warps, step * 2048, 2048, steps * 2048)
                    for child in range(children)
                ),
                Access("metadata", False, first, warps, step * 256, 256, steps * 256),
                Access("x", False, row, rows, step * STEP * itemsize, STEP * itemsize, steps * STEP * itemsize),
            )
        first, width = _span(tile_n, TILE_ROWS, n)
        pitch = children * n * stored
        yield tuple(
            Access(target, True, pid_split * m + row, rows, (child * n + first) * stored, width * stored, pitch)
            for child in range(children)
        )

    launched = Launch("multiply", (tiles_m * tiles_n, split), program)
    return [launched] if split == 1 else [launched, _reduce(m * children * n, split, itemsize)]


def _span(tile: int, block: int, size: int) -> tuple[int, int]:
    """Where a tile begins, and how much of it lies inside."""
    return tile * block, min(block, size - tile * block)


def _in_groups(pid: int, first: int, second: int, group: int) -> tuple[int, int]:
    """As ``fpe.kernels.epilogue.in_groups``."""
    band, inside = divmod(pid, group * second)
    width = min(first - band * group, group)
    return band * group + inside % width, inside // width


def _flat(tensor: str, start: int, size: int, store: bool = False) -> Access:
    return Access(tensor, store, 0, 1, start, size, start + size)


def _multiply(m: int, layout: BlockLayout, transposed: bool, config: Config, itemsize: int) -> list[Launch]:
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
        pid_m, position = _in_groups(pid, tiles_m, segments, config.group)
        segment = order[position]
        yield (
            _flat("longest", INDEX * position, INDEX),
            _flat("segment", INDEX * segment, INDEX),
            _flat("segment", INDEX * (segment + 1), INDEX),
        )
        row, rows = pid_m * block_m, min(block_m, m - pid_m * block_m)
        start, count = bounds[segment], bounds[segment + 1] - bounds[segment]
        stop, start = start + count * (pid_split + 1) // split, start + count * pid_split // split
        for step in range(start * steps, stop * steps):
            entry, part = divmod(step, steps)
            column = tile[entry] * inner + part * block_in
            width = max(min(block_in, size_in - column), 0)
            a = Access("a", False, row, rows, column * itemsize, width * itemsize, size_in * itemsize)
            index = _flat("tile", INDEX * entry, INDEX)
            if transposed:
                v = Access(
                    "values", False, first[entry] * bn + part * block_in, block_in, 0, bk * itemsize, bk * itemsize
                )
                yield _flat("block", INDEX * entry, INDEX), index, a, v
            else:
                offset = part * block_in * itemsize
                yield index, a, Access("values", False, entry * bn, bn, offset, block_in * itemsize, bk * itemsize)
        width = min(out, size_out - segment * out)
        result = Access(target, True, pid_split * m + row, rows, segment * out * size, width * size, size_out * size)
        yield (result,)

    launched = Launch("_block_multiply", (tiles_m * segments, split), program)
    return [launched] if split == 1 else [launched, _reduce(m * size_out, split, itemsize)]


def _outer(m: int, layout: BlockLayout, config: Config, itemsize: int) -> list[Launch]:
    (bn, bk), (n, k), split = layout.block, layout.shape, config.split
    rows, cols, panels = layout.rows.tolist(), layout.cols.tolist(), layout.panels.tolist()
    tiles_m = -(-m // config.block_m)
    target, size = ("out", itemsize) if split == 1 else ("partial", 4)

    def program(position: int, pid_split: int) -> Program:
        block = panels[position]
        yield (_flat("panel", INDEX * position, INDEX),)
        yield _flat("row", INDEX * block, INDEX), _flat("col", INDEX * block, INDEX)
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
    return [launched] if split == 1 else [launched, _reduce(len(rows) * bn * bk, split, itemsize)]


def _reduce(size: int, split: int, itemsize: int, block: int = 1024) -> Launch:
    def program(pid: int, _: int) -> Program:
        start, count = pid * block, min(block, size - pid * block)
        for part in range(split):
            yield (_flat("partial", 4 * (part * size + start), 4 * count),)
        yield (_flat("out", itemsize * start, itemsize * count, store=True),)

    return Launch("_reduce", (-(-size // block), 1), program)


def _planes(n: int, k: int, count: int, first_n: int, rows: int, first_k: int, config: PartitionConfig) -> list[Access]:
    """The words of labels of a tile, plane by plane: whole groups of 128 columns, or the part of one."""
    pitch, first = row_bytes(k), first_k // 8
    column = 4 * (first // 16 * 4 + first % 4)
    width = max(min(max(config.block_k // 8, min(config.block_k // 2, 16)), pitch - column), 0)
    return [Access("planes", False, p * n + first_n, rows, column, width, pitch) for p in range(count)]


def _partition_multiply(problem: Problem, config: PartitionConfig) -> list[Launch]:
    m, n, k, alpha, size = problem.m, problem.n, problem.k, problem.alpha, problem.itemsize
    merge, transposed, split = problem.op == "merge_matmul", problem.transposed, config.split
    size_out, size_in = (k, n) if transposed else (n, k)
    out, inner = (config.block_k, config.block_n) if transposed else (config.block_n, config.block_k)
    operands, sums = (alpha, 1) if merge else (1, alpha)
    steps, tiles_m, tiles_out = -(-size_in // inner), -(-m // config.block_m), -(-size_out // out)
    target, stored = ("out", size) if split == 1 else ("partial", 4)

    def program(pid: int, pid_split: int) -> Program:
        pid_m, pid_out = _in_groups(pid, tiles_m, tiles_out, config.group)
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
            yield words, *_planes(n, k, digits(alpha), first_n, rows_n, first_k, config), *xs
        width, pitch = min(out, size_out - pid_out * out) * stored, sums * size_out * stored
        yield tuple(
            Access(target, True, pid_split * m + row, rows, (child * size_out + pid_out * out) * stored, width, pitch)
            for child in range(sums)
        )

    name = ("multiply_columns" if transposed else "multiply_rows") if config.direct else "_partition_multiply"
    launched = Launch(name, (tiles_m * tiles_out, split), program)
    return [launched] if split == 1 else [launched, _reduce(m * sums * size_out, split, size)]


def _partition_outer(problem: Problem, config: PartitionConfig, holes: bool) -> list[Launch]:
    m, n, k, alpha, size, split = problem.m, problem.n, problem.k, problem.alpha, problem.itemsize, config.split
    left, right = (1, alpha) if problem.transposed else (alpha, 1)
    tiles_m, tiles_n, tiles_k = -(-m // config.block_m), -(-n // config.block_n), -(-k // config.block_k)
    target, stored = ("out", size) if split == 1 else ("partial", 4)

    def program(pid: int, pid_split: int) -> Program:
        tile_n, tile_k = _in_groups(pid, tiles_n, tiles_k, config.group)
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
        yield tuple(_planes(n, k, digits(alpha) + holes, first_n, rows_n, first_k, config))
        yield (Access(target, True, pid_split * n + first_n, rows_n, first_k * stored, rows_k * stored, k * stored),)

    launched = Launch("_partition_outer", (tiles_n * tiles_k, split), program)
    return [launched] if split == 1 else [launched, _reduce(n * k, split, size)]
