"""The sanitizer lab: our kernels are clean, and what is planted is found."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("tilelens")
import triton
import triton.language as tl

from fpe.bench.lab.ptx.cases import Case
from fpe.bench.lab.sanitize import CASES, check, check_kernels, launch
from fpe.bench.lab.trace import family_kernels
from fpe.kernels.block import triton as kernels
from fpe.kernels.block.layout import BlockLayout
from fpe.kernels.device import Device
from fpe.kernels.partition import triton as partition_kernels


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernels_are_clean(case: Case) -> None:
    assert check_kernels([case]) == []


@pytest.mark.parametrize("family", ["block", "partition"])
def test_cases_reach_every_kernel_and_split(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()
    module = {"block": kernels, "partition": partition_kernels}[family]
    choose: Any = module.choose

    def spy(problem: Any, device: Device) -> Any:
        config = choose(problem, device)
        launched.add((problem.op, "split" if config.split > 1 else "whole"))
        return config

    monkeypatch.setattr(module, "choose", spy)
    for case in CASES:
        if case.family == family and (case.m in (19, 530, 600) or 1100 in case.shape or case.density == 2.0):
            launch(case)()
    ops = {"block": ("block_matmul", "block_grad"), "partition": ("split_matmul", "merge_matmul", "partition_grad")}
    assert launched >= {(op, how) for op in ops[family] for how in ("split", "whole")}


@triton.jit
def _reads_past(x_ptr, out_ptr, SIZE, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs), mask=offs < SIZE)


@triton.jit
def _reads_where_told(x_ptr, index_ptr, out_ptr, COUNT, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(COUNT):
        acc += tl.load(x_ptr + tl.load(index_ptr + i) * BLOCK + offs)
    tl.store(out_ptr + offs, acc)


@triton.jit
def _reads_a_corner(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = (offs[:, None] == BLOCK - 1) & (offs[None, :] == 0)
    x = tl.load(x_ptr + offs[:, None] * stride + offs[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], x)


@triton.jit
def _overlaps(out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, offs.to(tl.float32))


@triton.jit
def _reads_its_neighbour(x_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs + BLOCK))


@triton.jit
def _writes_twice(out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs // 2, offs.to(tl.float32))


def kinds(kernel: object, grid: tuple[int, ...], *args: object, **meta: int) -> set[tuple[str, str]]:
    module = SimpleNamespace(kernel=kernel)
    return {(f.kind, f.tensor) for f in check(((module, "kernel"),), lambda: module.kernel[grid](*args, **meta))}


def test_planted_load_out_of_bounds_is_found() -> None:
    # Room past the view's end, so that reading it is wrong and harmless.
    x, out = torch.zeros(64)[:20], torch.zeros(32)
    assert kinds(_reads_past, (2,), x, out, 20, BLOCK=16) == {("bounds", "x"), ("bounds, traced", "x")}
    assert kinds(_reads_past, (2,), torch.zeros(32), out, 32, BLOCK=16) == set()


def test_planted_store_out_of_bounds_is_found_and_not_made() -> None:
    room = torch.zeros(32)
    assert kinds(_overlaps, (2,), room[:20], BLOCK=16) == {("bounds", "out")}
    assert not room.any()


def test_planted_index_out_of_bounds_is_found() -> None:
    x, out = torch.zeros(256)[:64], torch.zeros(16)
    index = torch.tensor([0, 3, 4], dtype=torch.int32)
    assert kinds(_reads_where_told, (1,), x, index, out, 3, BLOCK=16) == {("bounds", "x"), ("bounds, traced", "x")}
    assert kinds(_reads_where_told, (1,), x, index, out, 2, BLOCK=16) == set()


def test_trace_sees_the_corner_that_the_sanitizer_misses() -> None:
    x, out = torch.zeros(512)[:160], torch.zeros(256)
    found = kinds(_reads_a_corner, (1,), x, out, 10, BLOCK=16)
    assert found == set()  # 15 * 10 lies inside
    assert ("bounds, traced", "x") in kinds(_reads_a_corner, (1,), x, out, 20, BLOCK=16)


def test_planted_races_are_found() -> None:
    assert kinds(_overlaps, (3,), torch.zeros(64), BLOCK=16) == {("race", "out")}
    assert kinds(_overlaps, (1,), torch.zeros(64), BLOCK=16) == set()
    assert kinds(_reads_its_neighbour, (3,), torch.zeros(64), BLOCK=16) == {("race", "x")}
    assert kinds(_writes_twice, (1,), torch.zeros(64), BLOCK=16) == {("race", "out")}


def test_fault_planted_in_a_block_kernels_index_is_found() -> None:
    layout = BlockLayout.from_mask(torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(), (64, 96), (32, 32))
    dy, values = torch.ones(32, 64).half(), torch.ones(layout.values_shape).half()
    x = torch.zeros(2 * 32 * 96).half()[: 32 * 96].view(32, 96)  # room behind it
    cols = layout.cols.clone()
    cols[-1] += 3  # reads past the last row's end
    found = check(family_kernels("block"), lambda: kernels.block_grad_triton(dy, x, layout._replace(cols=cols)))
    assert {(f.kernel, f.kind, f.tensor) for f in found} == {
        ("_block_outer", "bounds", "x"),
        ("_block_outer", "bounds, traced", "x"),
    }
    rows = torch.zeros_like(layout.longest_rows)  # every program computes the same row
    layout = layout._replace(longest_rows=rows)
    found = check(family_kernels("block"), lambda: kernels.block_matmul_triton(x, values, layout))
    assert {(f.kernel, f.kind, f.tensor) for f in found} == {("_block_multiply", "race", "out")}


def test_tilelens_race_detector_records_but_does_not_judge() -> None:
    """Why races are found in the trace; when this fails, TileLens has learned to, and it should be used."""
    from tilelens.clients import RaceDetector

    from fpe.bench.lab.trace import watching

    module, seen = SimpleNamespace(kernel=_overlaps), []
    with watching(((module, "kernel"),), RaceDetector, lambda _, detector: seen.extend(detector.records)):
        module.kernel[(3,)](torch.zeros(64), BLOCK=16)
    assert {(e.access_mode, e.tensor_name) for e in seen} == {("write", "out_ptr")}
    assert not any("race" in name for e in seen for name in vars(e))
