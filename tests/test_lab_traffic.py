"""The traffic lab: the replay is the real kernels' trace, and the simulated L2 is what it says."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import bytes_touched

pytest.importorskip("tilelens")
from fpe.bench.families import bitmap as bitmap_family
from fpe.bench.families import block as block_family
from fpe.bench.families import partition as partition_family
from fpe.bench.families import semi_structured as quads_family
from fpe.bench.families.accesses import MERGED_OPS, OPS, SPARSE, Access, Launch
from fpe.bench.lab import traffic
from fpe.bench.lab.cache import L2, LINE, SECTOR, schedule
from fpe.bench.lab.trace import Trace, family_kernels, tracing
from fpe.kernels import Bitmap, SeededLabels, SemiStructuredLayout
from fpe.kernels.block import triton as block_kernels
from fpe.kernels.block.config import Config
from fpe.kernels.block.layout import BlockLayout, grid
from fpe.kernels.device import KNOWN
from fpe.kernels.partition import PackedLabels
from fpe.kernels.partition import config as partition
from fpe.kernels.partition import triton as partition_kernels
from fpe.kernels.semi_structured import config as semi_structured
from fpe.kernels.semi_structured import triton as semi_structured_kernels

CONFIG = Config(block_m=16, block_in=16, split=1, group=2, num_warps=4, num_stages=3)
TILES = partition.Config(block_m=16, block_n=16, block_k=32, split=1, group=2, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class Small:
    """A launch of the block kernels that the interpreter runs in a moment."""

    id: str
    m: int = 37
    shape: tuple[int, int] = (70, 90)
    block: tuple[int, int] = (16, 32)
    config: Config = CONFIG
    density: float = 0.5
    dtype: torch.dtype = torch.float16
    family = "block"
    module = block_kernels
    ops = OPS

    @property
    def layout(self) -> BlockLayout:
        rows = torch.Generator().manual_seed(1)
        mask = torch.rand(grid(self.shape, self.block), generator=rows) < self.density
        return BlockLayout.from_mask(mask, self.shape, self.block)

    def run(self, op: str) -> None:
        layout, (n, k) = self.layout, self.shape
        x, dy = torch.ones(self.m, k, dtype=self.dtype), torch.ones(self.m, n, dtype=self.dtype)
        values = torch.ones(layout.values_shape, dtype=self.dtype)
        if op == "forward":
            block_kernels.block_matmul_triton(x, values, layout)
        elif op == "dX":
            block_kernels.block_matmul_t_triton(dy, values, layout)
        else:
            block_kernels.block_grad_triton(dy, x, layout)

    def replayed(self, op: str) -> list[Launch]:
        return block_family.launches(op, self.m, self.layout, self.config, self.dtype.itemsize)


@dataclass(frozen=True)
class SmallPartition:
    """A launch of the partition kernels that the interpreter runs in a moment."""

    id: str
    m: int = 37
    shape: tuple[int, int] = (70, 90)
    alpha: int = 2
    config: partition.Config = TILES
    holes: bool = False
    dtype: torch.dtype = torch.float16
    seeded: bool = False
    family = "partition"
    module = partition_kernels
    ops = ("split", "merge", "grad", "split_t", "merge_t", "grad_t")

    def run(self, op: str) -> None:
        (n, k), alpha, transposed = self.shape, self.alpha, op.endswith("_t")
        drawn = torch.randint(alpha + self.holes, (n, k), generator=torch.Generator().manual_seed(0))
        packed, w = PackedLabels.pack(drawn.byte(), alpha), torch.ones(n, k, dtype=self.dtype)
        labels: PackedLabels | SeededLabels = SeededLabels.of(3, (n, k), alpha) if self.seeded else packed
        if transposed:
            labels, w, n, k = labels.T, w.T, k, n
        x, y = torch.ones(self.m, k, dtype=self.dtype), torch.ones(self.m, alpha, n, dtype=self.dtype)
        if op.startswith("split"):
            partition_kernels.split_matmul_triton(x, w, labels, alpha)
        elif op.startswith("merge"):
            z = torch.ones(self.m, alpha, k, dtype=self.dtype)
            partition_kernels.merge_matmul_triton(z, w, labels)
        else:
            partition_kernels.partition_grad_triton(y, x, labels)

    def replayed(self, op: str) -> list[Launch]:
        name = {"split": "split_matmul", "merge": "merge_matmul", "grad": "partition_grad"}[op.removesuffix("_t")]
        size = self.dtype.itemsize
        problem = partition.Problem(name, self.m, *self.shape, op.endswith("_t"), self.alpha, size)
        return partition_family.launches(problem, self.config, self.holes, self.seeded)


@dataclass(frozen=True)
class SmallKept:
    """A launch on kept values, as many of every 32, that the interpreter runs in a moment."""

    id: str
    m: int = 5
    shape: tuple[int, int] = (70, 1024)
    alpha: int = 1
    share: float = 0.25
    config: partition.Config = TILES
    dtype: torch.dtype = torch.float16
    family = "partition"
    module = partition_kernels
    ops = SmallPartition.ops

    def run(self, op: str) -> None:
        (n, k), alpha, generator = self.shape, self.alpha, torch.Generator().manual_seed(0)
        mask = torch.rand(n, k // 32, 32, generator=generator).argsort(-1) < 32 * self.share
        kept = Bitmap.pack(mask.flatten(1))
        drawn = torch.randint(alpha, (n, k), generator=generator).byte()
        labels, values = PackedLabels.pack(drawn, alpha) if alpha > 1 else None, torch.ones(kept.nnz, dtype=self.dtype)
        if op.endswith("_t"):
            kept, labels, n, k = kept.T, None if labels is None else labels.T, k, n
        x, y = torch.ones(self.m, k, dtype=self.dtype), torch.ones(self.m, alpha, n, dtype=self.dtype)
        if op.startswith("split"):
            partition_kernels.split_matmul_triton(x, values, labels, alpha, kept=kept)
        elif op.startswith("merge"):
            z = torch.ones(self.m, alpha, k, dtype=self.dtype)
            partition_kernels.merge_matmul_triton(z, values, labels, kept=kept)
        else:
            partition_kernels.partition_grad_triton(y, x, labels, kept=kept)

    def replayed(self, op: str) -> list[Launch]:
        name = {"split": "split_matmul", "merge": "merge_matmul", "grad": "partition_grad"}[op.removesuffix("_t")]
        size = self.dtype.itemsize
        problem = partition.Problem(name, self.m, *self.shape, op.endswith("_t"), self.alpha, size, kept=self.share)
        return bitmap_family.launches(problem, self.config, self.share)


QUADS = semi_structured.Config(block_m=16, block_n=16, block_k=32, split=1, group=2, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class SmallSemiStructured:
    """A launch of the 2:4 kernels on dense tensor cores that the interpreter runs in a moment."""

    id: str
    m: int = 37
    shape: tuple[int, int] = (70, 90)
    children: int = 2
    config: semi_structured.Config = QUADS
    dtype: torch.dtype = torch.float16
    family = "semi_structured"
    module = semi_structured_kernels
    ops = OPS

    def run(self, op: str) -> None:
        (n, k), children = self.shape, self.children
        codes = torch.full((n, -(-k // 8)), 0x44, dtype=torch.uint8)
        layout = SemiStructuredLayout((n, k), codes, None, children)
        x, dy = torch.ones(self.m, k, dtype=self.dtype), torch.ones(self.m, children, n, dtype=self.dtype)
        values = torch.ones(layout.values_shape, dtype=self.dtype)
        if op == "forward":
            semi_structured_kernels.semi_structured_matmul_triton(x, values, layout)
        elif op == "dX":
            semi_structured_kernels.semi_structured_matmul_t_triton(dy, values, layout)
        else:
            semi_structured_kernels.semi_structured_grad_triton(dy, x, layout)

    def replayed(self, op: str) -> list[Launch]:
        return quads_family.launches(op, self.m, self.shape, self.children, self.config, self.dtype.itemsize)


AnyCase = Small | SmallPartition | SmallKept | SmallSemiStructured
CASES = (
    Small("tails"),
    Small("one-row", m=1),
    Small("grouped", m=83, config=replace(CONFIG, group=4)),
    Small("split", config=replace(CONFIG, split=4)),
    Small("wide-blocks", block=(32, 16), config=replace(CONFIG, split=2)),
    Small("two-steps-a-block", shape=(64, 96), block=(32, 32)),
    Small("float32", dtype=torch.float32),
    Small("sparse", density=0.2, config=replace(CONFIG, split=2)),
    Small("full", shape=(48, 64), density=2.0),
    SmallPartition("labels"),
    SmallPartition("labels-one-row", m=1, alpha=3),
    SmallPartition("labels-grouped", m=83, config=replace(TILES, group=4)),
    SmallPartition("labels-split", alpha=4, config=replace(TILES, split=4), holes=True),
    SmallPartition("labels-even", m=32, shape=(64, 96), config=replace(TILES, block_n=32, block_k=16)),
    SmallPartition("labels-odd", shape=(33, 139), alpha=8, holes=True),
    SmallPartition("labels-seeded", m=17, shape=(33, 43), alpha=4, seeded=True),
    SmallPartition("labels-float32", dtype=torch.float32, config=replace(TILES, split=2)),
    SmallKept("kept", shape=(17, 2048), alpha=3, config=replace(TILES, block_k=256, split=4)),
    SmallKept("kept-float32", shape=(17, 1024), alpha=1, config=replace(TILES, block_k=512), dtype=torch.float32),
    SmallKept("kept-last-rows", shape=(32, 1024), config=replace(TILES, block_k=512, split=2)),
    SmallSemiStructured("quads"),
    SmallSemiStructured("quads-one-row", m=1, children=1),
    SmallSemiStructured("quads-grouped", m=83, config=replace(QUADS, group=4)),
    SmallSemiStructured("quads-split", config=replace(QUADS, split=4)),
    SmallSemiStructured("quads-even", m=32, shape=(64, 128), config=replace(QUADS, block_n=32, block_k=64)),
    SmallSemiStructured("quads-odd", shape=(33, 139), dtype=torch.float32, config=replace(QUADS, split=2)),
)
each_run = pytest.mark.parametrize(
    ("case", "op"), [(c, op) for c in CASES for op in c.ops], ids=lambda value: getattr(value, "id", value)
)
each_op = pytest.mark.parametrize("op", OPS)


def traced(op: str, case: AnyCase, monkeypatch: pytest.MonkeyPatch) -> list[Trace]:
    """The real launches of one operation."""
    monkeypatch.setattr(case.module, "choose", lambda *args: case.config)
    with tracing(family_kernels(case.family)) as launched:
        case.run(op)
    return launched


def together(touches: Iterable[tuple[str, bool, np.ndarray]]) -> list[tuple[str, bool, np.ndarray]]:
    """With sorted bytes, and those of one tensor that follow each other as one: a pair of values takes two loads."""
    groups = groupby(touches, key=lambda touch: touch[:2])
    return [(*key, np.sort(np.concatenate([touched for *_, touched in group]))) for key, group in groups]


def expected(launch: Launch) -> dict:
    """A replayed launch in the form of a trace: by program, (tensor, store, sorted bytes) in order."""
    return {
        (x, y, 0): together(
            (a.tensor, a.store, bytes_touched(a)) for step in launch.program(x, y) for a in step if a.width and a.rows
        )
        for x in range(launch.grid[0])
        for y in range(launch.grid[1])
    }


def observed(trace: Trace, split: int) -> dict:
    scratch = "partial" if split > 1 and trace.kernel != "_reduce" else "out"
    return {
        position: together(
            (
                scratch if t.tensor == "out" else t.tensor,
                t.store,
                (t.offsets[:, None] + np.arange(t.itemsize)).reshape(-1),
            )
            for t in touches
            if t.offsets.size
        )
        for position, touches in trace.programs.items()
    }


@each_run
def test_replay_is_the_kernels_own_trace(case: AnyCase, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traces, replayed = traced(op, case, monkeypatch), case.replayed(op)
    assert [t.kernel for t in traces] == [r.kernel for r in replayed]
    for trace, launch in zip(traces, replayed, strict=True):
        ours, real = expected(launch), observed(trace, case.config.split)
        assert ours.keys() == real.keys()
        for position, touches in real.items():
            assert [t[:2] for t in ours[position]] == [t[:2] for t in touches], position
            for replay, touch in zip(ours[position], touches, strict=True):
                assert np.array_equal(replay[2], touch[2]), (position, touch[0])


@each_run
def test_requested_and_unique_bytes_are_those_of_the_trace(
    case: AnyCase, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested, sectors = 0, defaultdict(set)
    for trace in traced(op, case, monkeypatch):
        for touches in observed(trace, case.config.split).values():
            for tensor, store, offsets in touches:
                requested += offsets.size
                sectors[tensor, store].update((offsets // SECTOR).tolist())
    for coarse in (False, True):
        memory = L2(1e9)
        for launch in case.replayed(op):
            for access in schedule(launch, 3):
                memory.access(access, coarse)
        memory.flush()
        assert memory.requested == requested
        assert memory.unique == SECTOR * sum(map(len, sectors.values()))
        # Nothing leaves so large a cache: what was not written here is read once, what was written leaves once.
        assert memory.written == SECTOR * sum(len(s) for (_, store), s in sectors.items() if store)
        assert memory.read == SECTOR * sum(len(s) for (t, store), s in sectors.items() if not store and t != "partial")


def naive(accesses: list[Access], lines: int) -> tuple[int, int]:
    """Bytes read and written by an LRU over a plain list, a byte range at a time."""
    held: list[tuple] = []
    valid, dirty = defaultdict(set), defaultdict(set)
    read = written = 0
    for access in accesses:
        for line in dict.fromkeys((access.tensor, byte // LINE) for byte in bytes_touched(access).tolist()):
            if line in held:
                held.remove(line)
            held.append(line)
            if len(held) > lines:
                old = held.pop(0)
                written += SECTOR * len(dirty.pop(old, ()))
                valid.pop(old, None)
            touched = {b // SECTOR for b in bytes_touched(access).tolist() if (access.tensor, b // LINE) == line}
            if access.store:
                dirty[line] |= touched
            else:
                read += SECTOR * len(touched - valid[line])
            valid[line] |= touched
    return read, written + SECTOR * sum(map(len, dirty.values()))


@pytest.mark.parametrize("lines", [1, 5, 17, 60])
@each_op
def test_cache_is_an_lru_of_lines(op: str, lines: int) -> None:
    case = Small("", m=19, config=replace(CONFIG, split=2))
    accesses = [a for launch in case.replayed(op) for a in schedule(launch, 3)]
    memory = L2(lines * LINE)
    for access in accesses:
        memory.access(access, coarse=False)
    memory.flush()
    assert (memory.read, memory.written) == naive([a for a in accesses if a.width], lines)


@pytest.mark.parametrize("l2", [40e3, 100e3, 300e3, 50e6])
@pytest.mark.parametrize(
    ("structure", "op"), [("block", op) for op in OPS] + [("random", op) for op in OPS + MERGED_OPS]
)
def test_coarse_units_move_the_bytes_of_single_lines(structure: str, op: str, l2: float) -> None:
    case = traffic.Case(m=192, n=256, k=512, structure=structure)
    layer, device = traffic.layer(case), replace(KNOWN[90], sms=6)
    coarse, fine = (traffic.measure(op, case, layer, device, l2, coarse=coarse) for coarse in (True, False))
    assert coarse["requested"] == fine["requested"] and coarse["unique"] == fine["unique"]
    assert coarse["dram"] == pytest.approx(fine["dram"], rel=0.02)
    assert coarse["dram"] == fine["dram"] or l2 < 50e6


def test_schedule_keeps_the_slots_full_and_in_step() -> None:
    lengths = (3, 1, 2, 1)

    def program(x: int, _: int):
        for step in range(lengths[x]):
            yield (Access("a", False, x, 1, step, 1, 1),)

    order = [(a.row, a.column) for a in schedule(Launch("", (4, 1), program), 2)]
    assert order == [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (2, 1), (3, 0)]


@each_op
@pytest.mark.parametrize("dropped", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)], ids=["wide", "tall"])
def test_an_ample_cache_leaves_the_compulsory_bytes(op: str, shape: tuple[int, int], dropped: float) -> None:
    case = traffic.Case(64, *shape, alpha=4, structure="block", dropped=dropped)
    layer = traffic.layer(case)
    row = traffic.measure(op, case, layer, l2=1e9)
    assert row["dram"] - row["scratch"] == pytest.approx(row["compulsory"], rel=0.02)
    assert row["compulsory"] < row["wide"]
    if not dropped and op != "dW":
        assert layer.layout.rows.shape[0] * 64 * 64 == case.n * case.k


@pytest.mark.parametrize("op", OPS + MERGED_OPS)
@pytest.mark.parametrize("alpha", [2, 8])
@pytest.mark.parametrize("shape", [(256, 1024), (1024, 512)], ids=["wide", "tall"])
def test_labels_and_one_read_of_the_weights_are_compulsory(op: str, alpha: int, shape: tuple[int, int]) -> None:
    case = traffic.Case(64, *shape, alpha=alpha)
    row = traffic.measure(op, case, traffic.layer(case), l2=1e9)
    assert row["dram"] - row["scratch"] == pytest.approx(row["compulsory"], rel=1e-9)
    inputs, children = (shape[0], shape[1]) if op.startswith("merged") else (shape[1], shape[0])
    bits = {2: 1, 8: 3}[alpha]
    assert row["compulsory"] == shape[0] * shape[1] * (16 + bits) // 8 + 2 * 64 * (inputs + alpha * children)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("share", [0.25, 0.75])
@pytest.mark.parametrize("shape", [(256, 1024), (64, 4096)], ids=["tall", "wide"])
def test_kept_values_and_a_bit_a_position_are_compulsory(op: str, share: float, shape: tuple[int, int]) -> None:
    case = traffic.Case(16, *shape, alpha=1, kept=share)
    row = traffic.measure(op, case, traffic.layer(case), l2=1e9)
    assert row["dram"] - row["scratch"] == pytest.approx(row["compulsory"], rel=2e-4)  # whole sectors of bases
    positions = shape[0] * shape[1]
    assert row["compulsory"] == (
        2 * share * positions + positions // 8 + 2 * positions // 1024 + 4 * positions // 65536 + 2 * 16 * sum(shape)
    )


@pytest.mark.parametrize("op", (*OPS, SPARSE))
@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256)], ids=["wide", "tall"])
def test_two_to_four_moves_half_a_byte_a_quad_beside_the_weights(op: str, shape: tuple[int, int]) -> None:
    case = traffic.Case(64, *shape, structure="2:4")
    row = traffic.measure(op, case, traffic.layer(case), l2=1e9)
    assert row["dram"] - row["scratch"] == pytest.approx(row["compulsory"], rel=1e-9)
    assert row["compulsory"] == shape[0] * shape[1] * 17 // 8 + 2 * 64 * (shape[1] + 2 * shape[0])


def test_command_prints_a_table_and_rows(tmp_path: Path) -> None:
    from fpe.bench.cli import cli

    shown = CliRunner().invoke(cli, ["lab", "traffic", "--quick", "--output", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "ratio" in shown.output and "dX" in shown.output
    sizes = ["--m", "16", "--shape", "128x256"]
    rows = CliRunner().invoke(cli, ["lab", "traffic", *sizes, "--json", "--output", str(tmp_path)])
    assert rows.exit_code == 0, rows.output
    parsed = [json.loads(line) for line in rows.output.splitlines()]
    assert [row["op"] for row in parsed] == [
        *OPS,
        *OPS,
        *MERGED_OPS,
        *OPS,
        SPARSE,
        *OPS,
        *MERGED_OPS,
    ]
    assert all((row["M"], row["N"], row["K"]) == (16, 128, 256) for row in parsed)
